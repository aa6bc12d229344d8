"""Train a decoder from scratch, guarded, with a byte-level BPE made from its own text.

Small models are what this is for: the bases that LoRA runs and tests start from.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from train import data, hub, memory, run, weights
from train.command import guarded_main, parse
from train.interrupt import Stopped
from train.model import Decoder
from train.options import Options

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
    return guarded_main("train.pretrain", lambda: run.once(options, "model", pretrain))


def pretrain(options: Options) -> run.Result:
    """One run of a shape, by name or from a ``config.json``.

    Model and tokenizer go to ``model`` in the run directory, as transformers has them.
    """
    run.check(options)
    config = run.shape_of(options.model)

    def build() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(options.seed), **run.kinds(options))

    cost = run.announce(options, build, nnx.Param)
    corpus = data.load(options.data, vocab_size=config.vocab_size, encoding=options.encoding)

    def save(decoder: Decoder) -> None:
        weights.save(decoder, options.out / "model", end=corpus.end)
        hub.save_tokenizer(corpus.tokenizer, corpus.end, options.out / "model")

    return run.train(build(), nnx.Param, corpus, options, cost, save=save)


def base(options: Options, steps: int) -> str:
    """Where a fine-tuning run takes its weights from: `options.model`.

    Only "tiny" is no place: a base of that shape is pre-trained on the run's own text, into
    ``base`` in the run directory, unless it is there already.

    Raises:
      Stopped: if that run is stopped.
    """
    if options.model != "tiny":
        return options.model
    own = dataclasses.replace(
        TINY,
        out=options.out / "base",
        data=options.data,
        encoding=options.encoding,
        seed=options.seed,
        steps=steps,
        scan=options.scan,
        track=options.track,
        final_eval_targets=options.final_eval_targets,
    )
    model = own.out / "model"
    if not (model / "tokenizer.json").exists():
        print(f"first a base is pre-trained, in {own.out}", file=sys.stderr)
        if not pretrain(own).finished:
            raise Stopped
    return str(model)


if __name__ == "__main__":
    memory.keep_freed()
    raise SystemExit(main())
