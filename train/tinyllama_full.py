"""Train all parameters of TinyLlama-1.1B, guarded, from its published weights.

The preset "tiny" runs anywhere, in minutes: where --model is "tiny", a base of that shape is
pre-trained first, in the run directory.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from train import data, hub, memory, pretrain, run, weights
from train.command import guarded_main, parse
from train.model import Decoder
from train.options import Count, Options


@dataclasses.dataclass(frozen=True)
class FullOptions(Options):
    """Options of a run that trains all parameters."""

    base_steps: Count = 700
    """Steps of pre-training, for the model "tiny"."""


PRESETS = {
    "tinyllama-1.1b": FullOptions(
        model="TinyLlama/TinyLlama_v1.1",
        out=Path("runs/tinyllama_full"),
        steps=1000,
        batch_size=32,
        microbatches=4,
        length=1024,
        learning_rate=2e-5,
        b2=0.95,
        weight_decay=0.1,
        optimizer="lbw+clip",
        loss_chunk=256,
        remat=True,
        scan=True,
    ),
    "tiny": FullOptions(
        model="tiny",
        out=Path("runs/tinyllama_full_tiny"),
        data="standard-library",
        steps=300,
        batch_size=8,
        length=64,
        learning_rate=3e-4,
        b2=0.95,
        weight_decay=0.1,
        optimizer="lbw+clip",
        dtype="float32",
        eval_targets=16_384,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(
        FullOptions, PRESETS, arguments, prog="train.tinyllama_full", description=__doc__ or ""
    )
    return guarded_main("train.tinyllama_full", lambda: run.once(options, "model", finetune))


def finetune(options: FullOptions) -> run.Result:
    """One run; model and tokenizer go to ``model`` in the run directory."""
    run.check(options)
    config = run.shape_of(options.model)

    def build() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(options.seed), **run.kinds(options))

    cost = run.announce(options, build, nnx.Param)
    source = pretrain.base(options, options.base_steps)
    corpus = data.load(options.data, tokenizer=source, encoding=options.encoding)
    weights.check_vocabulary(corpus.tokenizer, config)
    decoder = weights.load(source, mesh=run.mesh(options), **run.kinds(options))

    def save(decoder: Decoder) -> None:
        weights.save(decoder, options.out / "model")
        hub.save_tokenizer(corpus.tokenizer, corpus.end, options.out / "model")

    return run.train(decoder, nnx.Param, corpus, options, cost, save=save)


if __name__ == "__main__":
    memory.keep_freed()
    raise SystemExit(main())
