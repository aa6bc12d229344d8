"""Train a decoder from scratch, guarded, with a byte-level BPE made from its own text.

Small models are what this is for: the bases that LoRA runs and tests start from.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from train import data, hub, memory, run, weights
from train.model import Decoder
from train.options import Options, guarded_main, parse

TINY = Options(
    model="tiny",
    out=Path("runs/pretrain"),
    data="standard-library",
    steps=700,
    batch_size=8,
    length=64,
    optimizer="lbw+clip",
    learning_rate=2e-3,
    warmup=0.1,
    b2=0.95,
    weight_decay=0.1,
    dtype="float32",
    eval_targets=16_384,
)
PRESETS = {"tiny": TINY}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(Options, PRESETS, arguments, prog="train.pretrain", description=__doc__ or "")
    return guarded_main("train.pretrain", lambda: 0 if pretrain(options).finished else 130)


def pretrain(options: Options) -> run.Result:
    """One run of a shape, by name or from a ``config.json``.

    Model and tokenizer go to ``model`` in the run directory, as transformers has them.
    """
    config = run.shape_of(options.model)

    def build() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(options.seed), **run.kinds(options))

    cost = run.announce(options, build, nnx.Param)
    corpus = data.load(options.data, vocab_size=config.vocab_size)
    result = run.train(build(), nnx.Param, corpus, options, cost)
    if result.finished:
        weights.save(result.decoder, options.out / "model", end=corpus.end)
        hub.save_tokenizer(corpus.tokenizer, corpus.end, options.out / "model")
    return result


def base(options: Options, steps: int) -> str:
    """Where a fine-tuning run takes its weights from: `options.model`.

    Only "tiny" is no place: a base of that shape is pre-trained on the run's own text, into
    ``base`` in the run directory, unless it is there already.
    """
    if options.model != "tiny":
        return options.model
    own = dataclasses.replace(
        TINY,
        out=options.out / "base",
        data=options.data,
        seed=options.seed,
        steps=steps,
        scan=options.scan,
        track=options.track,
    )
    model = own.out / "model"
    if not (model / "tokenizer.json").exists() and not pretrain(own).finished:
        raise KeyboardInterrupt
    return str(model)


if __name__ == "__main__":
    memory.keep_freed()
    raise SystemExit(main())
