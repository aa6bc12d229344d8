"""What all cells of the stress benchmark share: tokens, model, and the pre-trained base.

The base is trained on Python's standard library and the first tenth of the train split, and
fine-tuned on the other nine tenths, which it has not seen: as a general model is tuned to a domain
it knows a little of. Without a data directory the corpus is the standard library itself, and the
base has its first tenth. From scratch all of the train split is used.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.records import RUNS
from train import data, loop, lora, model

# What a result line says of the model; the other fields of its config are at their defaults.
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rope_theta", "rms_norm_eps", "attention_bias", "tie_word_embeddings"),
)


class Size(NamedTuple):
    """What decides how long a run takes and how well it can end."""

    name: str
    config: model.Config
    length: int
    batch_size: int
    base_steps: int
    steps: dict[str, int]  # by regime
    evaluated: int  # targets per split, for the final perplexity
    curve_windows: int  # windows of the valid split behind each point of the curve
    rank: int


class Bench(NamedTuple):
    """All that the cells share. Made by `prepare`."""

    size: Size
    facts: dict[str, Any]  # what decides a run's numbers, as its record states it
    about: dict[str, Any]  # and what does not
    tokens: dict[str, np.ndarray]  # "pretrain", "finetune", "scratch"
    held_out: dict[str, np.ndarray]  # windows of valid and test
    curve: np.ndarray  # one batch of valid's windows
    base: dict[str, Any]
    losses: dict[bool, loop.LossFn]  # with and without adapters


def prepare(directory: str | Path | None, size: Size) -> Bench:
    """Read and tokenise the corpus, train the base; both are kept for the next time."""
    corpus = data.load(directory, vocab_size=size.config.vocab_size)
    held_out = {
        split: data.windows(
            getattr(corpus, split), batch_size=32, length=size.length, limit=size.evaluated
        )
        for split in ("valid", "test")
    }
    rows = held_out["valid"].reshape(-1, size.length + 1)
    bench = Bench(
        size=size,
        facts=_facts(corpus, size),
        about={
            "data": "standard library" if directory is None else Path(directory).name,
            "tokenizer": f"byte-level BPE, {size.config.vocab_size}, trained on the train split",
        },
        tokens=_tokens(corpus, mixed=directory is not None),
        held_out=held_out,
        curve=rows[:: len(rows) // size.curve_windows][: size.curve_windows],
        base={},
        losses={adapters: _loss_fn(size.config, size.rank, adapters) for adapters in (False, True)},
    )
    return bench._replace(base=_base(bench))


def start(bench: Bench, seed: int, *, from_base: bool, adapters: bool) -> tuple[Any, Any]:
    """Trained and frozen parameters at step 0."""
    fresh = model.Decoder(bench.size.config, rngs=nnx.Rngs(seed))
    if from_base:
        nnx.update(fresh, nnx.State(bench.base))
    _, params, frozen = _taken_apart(fresh, bench.size.rank, seed, adapters)
    return params, frozen


def _taken_apart(
    decoder: model.Decoder, rank: int, seed: int, adapters: bool
) -> tuple[Any, Any, Any]:
    if not adapters:
        return model.split(decoder)
    lora.add_lora(decoder, rank=rank, alpha=2 * rank, rngs=nnx.Rngs(seed))
    return model.split(decoder, nnx.LoRAParam)


@functools.cache  # one function per shape, so that what is compiled for it is compiled once
def _loss_fn(config: model.Config, rank: int, adapters: bool) -> loop.LossFn:
    fresh = model.Decoder(config, rngs=nnx.Rngs(0))
    return model.next_token_loss(_taken_apart(fresh, rank, 0, adapters)[0])


def _tokens(corpus: data.Corpus, *, mixed: bool) -> dict[str, np.ndarray]:
    train = np.asarray(corpus.train)
    known, new = np.split(train, [len(train) // 10])
    if mixed:
        source = data.encode(corpus.tokenizer, data.standard_library()["train"])
        known = np.concatenate([known, source])
    return {"pretrain": known, "finetune": new, "scratch": train}


def _facts(corpus: data.Corpus, size: Size) -> dict[str, Any]:
    """What a record says about data and model."""
    return {
        "tokens": fingerprint(corpus),
        "size": size.name,
        "model": {name: getattr(size.config, name) for name in SHAPE},
        "length": size.length,
        "batch_size": size.batch_size,
        "base_steps": size.base_steps,
        "rank": size.rank,
        "evaluated": size.evaluated,
    }


def fingerprint(corpus: data.Corpus) -> str:
    """A digest that stands for all tokens of a corpus."""
    digest = hashlib.sha256()
    for split in data.SPLITS:
        digest.update(np.ascontiguousarray(getattr(corpus, split)).tobytes())
    return digest.hexdigest()[:16]


def _base(bench: Bench) -> dict[str, Any]:
    """Parameters of the base, from its file when one was trained with these settings before."""
    key = hashlib.sha256(repr(sorted((bench.facts | bench.about).items())).encode()).hexdigest()[
        :16
    ]
    path = RUNS / f"stress-base-{key}.npz"
    params, frozen = start(bench, 0, from_base=False, adapters=False)
    tree = jax.tree.structure(params)
    return kept(path, tree, functools.partial(_pretrain, bench, params, frozen))


def kept(path: Path, tree: Any, make: Callable[[], Any]) -> Any:
    """The parameters in this file, of this tree structure; made and stored first where it lacks."""
    if path.exists():
        with np.load(path) as stored:
            return jax.tree.unflatten(tree, [stored[f"arr_{i}"] for i in range(tree.num_leaves)])
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.npz")
    np.savez(draft, *jax.tree.leaves(made))
    draft.rename(path)  # a killed run leaves no half base
    return made


def _pretrain(bench: Bench, params: Any, frozen: Any) -> Any:
    size, tokens = bench.size, bench.tokens["pretrain"]
    steps, warmup = size.base_steps, size.base_steps // 20
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )

    def batch(step: int) -> np.ndarray:
        return data.sample(tokens, 0, step, batch_size=2 * size.batch_size, length=size.length)

    return loop.fit(bench.losses[False], params, tx, batch, steps, frozen=frozen).params
