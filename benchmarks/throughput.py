"""Tokens a second: our loop against a bare one, and against torch; all in one process, in turns.

Run ``python -m benchmarks.throughput``. Two comparisons, each on one model and the same batches:

- the loop of `train.run` (guard, checkpoints, log, progress) against a plain loop of ``jax.jit``
  without any of it, and against a plain loop whose optimizer is guarded;
- LoRA on a model in Hugging Face's format, in our loop, in a plain loop of ``jax.jit``, and in
  `transformers` with `peft` (extra ``parity``; left out where they are not installed).

All are compiled and warmed up first, then run in turns, a stretch of steps each; reported are
medians, and median and middle half of the paired ratio.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads must not spin in our turns

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.provenance import provenance
from lbw_optax import lbw_guard
from train import data, estimate, lora, model, packing, run, weights
from train.options import Options
from train.watch import Watch

SIZES = {
    "small": (model.Config(2048, 256, 768, 6, 4, 2, 64), 16, 128),
    "0.5b": (model.PRESETS["Qwen/Qwen2.5-0.5B"], 8, 1024),
    "1.5b": (model.PRESETS["Qwen/Qwen2.5-1.5B"], 8, 1024),
}
"""Shape, sequences a step, tokens a sequence. The large ones are for a GPU, with random weights."""

Stretch = Callable[[], float]
"""Runs so many steps to the end, and gives their seconds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one sentence a comparison, and write the result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--batch", type=int, help="sequences a step; default: by size")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=25, help="steps a turn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    options = parser.parse_args(arguments)
    result = {**provenance(), **vars(options) | {"out": None}}
    batch = options.batch or SIZES[options.size][1]
    result["tokens"] = batch * SIZES[options.size][2]
    result["loop"] = compare_loops(options.size, batch, options.rounds, options.steps)
    result["torch"] = compare_torch(options.size, batch, options.rounds, options.steps)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("loop", "torch"):
        print(describe(name, result[name], result["device"]))


def compare_loops(size: str, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """All parameters trained: a bare loop, a guarded bare loop, and ours."""
    with contextlib.ExitStack() as opened:
        place = opened.enter_context(tempfile.TemporaryDirectory())
        options = _options(size, batch, Path(place), steps * (rounds + 1))
        decoder = _decoder(size, options)
        stretches = {
            "plain": _plain(decoder, nnx.Param, options, optax.adamw(1e-4), steps),
            "plain, guarded": _plain(
                decoder, nnx.Param, options, lbw_guard(optax.adamw(1e-4)), steps
            ),
            "ours": _ours(decoder, nnx.Param, options, steps, opened),
        }
        return _measured(stretches, options, steps, rounds, decoder.config, trains_all=True)


def compare_torch(size: str, batch: int, rounds: int, steps: int) -> dict[str, Any] | None:
    """Adapters trained: ours, and `transformers` with `peft` on the same weights and batches."""
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        return None
    with contextlib.ExitStack() as opened:
        place = opened.enter_context(tempfile.TemporaryDirectory())
        options = _options(size, batch, Path(place) / "run", steps * (rounds + 1))
        decoder = _decoder(size, options)
        weights.save(decoder, Path(place) / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(place) / "model")
        targets = [*lora.ATTENTION, *lora.MLP]
        adapted = peft.get_peft_model(
            theirs, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        )
        lora.add_lora(decoder, rank=8, alpha=16, rngs=nnx.Rngs(0))
        stretches = {
            "plain": _plain(decoder, nnx.LoRAParam, options, optax.adamw(1e-4), steps),
            "torch": _torch(torch, adapted, options, steps),
            "ours": _ours(decoder, nnx.LoRAParam, options, steps, opened),
        }
        result = _measured(stretches, options, steps, rounds, decoder.config, trains_all=False)
    versions = {name: m.__version__ for name, m in _named(torch, transformers, peft)}
    return {**result, "versions": versions, "threads": torch.get_num_threads()}


def _named(*modules: Any) -> Iterator[tuple[str, Any]]:
    return ((module.__name__, module) for module in modules)


def _options(size: str, batch: int, out: Path, steps: int) -> Options:
    on_gpu = jax.default_backend() == "gpu"
    return Options(
        model=size,
        out=out,
        steps=steps,
        batch_size=batch,
        length=SIZES[size][2],
        schedule="constant",
        warmup=0.0,
        dtype="bfloat16" if on_gpu else "float32",
        scan=size != "small",
        loss_chunk=128 if size != "small" else None,
    )


def _decoder(size: str, options: Options) -> model.Decoder:
    return model.Decoder(SIZES[size][0], rngs=nnx.Rngs(0), **run.kinds(options))


def _corpus(options: Options) -> data.Corpus:
    vocabulary = SIZES[options.model][0].vocab_size
    tokens = np.random.default_rng(0).integers(vocabulary, size=10**6).astype(np.int32)
    return data.Corpus(tokens, tokens[:2000], tokens[:2000], tokenizer=None)  # type: ignore[arg-type]


def _plain(decoder: model.Decoder, trained: Any, options: Options, tx: Any, steps: int) -> Stretch:
    """What one writes by hand: a jitted step that donates, batches from NumPy, nothing else."""
    graphdef, params, frozen = model.split(decoder, trained)
    loss_fn, tx = _loss(graphdef, options), optax.with_extra_args_support(tx)
    tokens = _corpus(options).train

    def step(params: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(lambda leaf: leaf.copy(), params)
    carry = [params, tx.init(params), 0]

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = data.sample(
                tokens, 0, carry[2], batch_size=options.batch_size, length=options.length
            )
            carry[:] = *compiled(carry[0], carry[1], frozen, batch), carry[2] + 1
        jax.block_until_ready(carry[0])
        return time.perf_counter() - began

    return stretch


def _ours(
    decoder: model.Decoder,
    trained: Any,
    options: Options,
    steps: int,
    opened: contextlib.ExitStack,
) -> Stretch:
    """The loop of `train.run`, as the scripts have it, a stretch at a time."""
    task = run.task(_copy(decoder), trained, _corpus(options), options, _cost(decoder, options))
    options.out.mkdir(parents=True, exist_ok=True)
    rollback = opened.enter_context(run.checkpoints(options))
    watch = opened.enter_context(Watch(options, task.cost))
    batch = opened.enter_context(packing.Prefetch(task.batch))
    walk = run.steps(task, options, rollback, watch, batch, jax.jit(task.tx.init)(task.params))
    next(walk)

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            _, state = next(walk)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    return stretch


def _copy(decoder: model.Decoder) -> model.Decoder:
    graphdef, state = nnx.split(decoder)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.copy(), state))


def _torch(torch: Any, adapted: Any, options: Options, steps: int) -> Stretch:
    """A plain loop of torch: forward, backward, AdamW."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapted.to(device).train()
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0
    )
    tokens, at = _corpus(options).train, [0]

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = data.sample(
                tokens, 0, at[0], batch_size=options.batch_size, length=options.length
            )
            at[0] += 1
            ids = torch.from_numpy(batch).long().to(device)
            logits = adapted(input_ids=ids[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    return stretch


def _loss(graphdef: Any, options: Options) -> Any:
    return model.next_token_loss(graphdef, chunk=options.loss_chunk, z_loss=options.z_loss)


def _cost(decoder: model.Decoder, options: Options) -> estimate.Estimate:
    return estimate.estimate(decoder.config, options, nnx.state(decoder, nnx.Param), None, None)


def _measured(
    stretches: dict[str, Stretch],
    options: Options,
    steps: int,
    rounds: int,
    config: model.Config,
    *,
    trains_all: bool,
) -> dict[str, Any]:
    """Each loop once to warm up, then `rounds` turns of each; the order turns with every round."""
    seconds: dict[str, list[float]] = {name: [] for name in stretches}
    for stretch in stretches.values():
        stretch()
    for i in range(rounds):
        order = list(stretches) if i % 2 == 0 else list(stretches)[::-1]
        for name in order:
            seconds[name].append(stretches[name]())
    tokens = steps * options.batch_size * options.length
    flops = estimate.flops_per_token(config, options.length, trains_all=trains_all)
    peak = estimate.peak_flops(jax.devices()[0])
    medians = {name: tokens / float(np.median(s)) for name, s in seconds.items()}
    ratios = {name: (np.array(s) / np.array(seconds["ours"])) for name, s in seconds.items()}
    return {
        "tokens_per_second": medians,
        "mfu": {name: rate * flops / peak for name, rate in medians.items()},
        "ours_over": {
            name: [float(q) for q in np.quantile(ratio, [0.25, 0.5, 0.75])]
            for name, ratio in ratios.items()
            if name != "ours"
        },
        "seconds": seconds,
    }


def describe(name: str, result: dict[str, Any] | None, device: str) -> str:
    """One line: tokens a second of each, and ours over the others."""
    if result is None:
        return f"{name}: left out, for torch, transformers and peft are not installed"
    rates = ", ".join(f"{who} {rate:,.0f}" for who, rate in result["tokens_per_second"].items())
    ratios = ", ".join(
        f"{_percent(middle)} against {who} ({_percent(low)} to {_percent(high)})"
        for who, (low, middle, high) in result["ours_over"].items()
    )
    return f"{name}, {device}: {rates} tokens/s; ours {ratios}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


if __name__ == "__main__":
    main()
