"""Fine-tune Qwen2.5 with LoRA, guarded: a held-out perplexity, an adapter in PEFT's format.

The preset "tiny" runs anywhere, in minutes: where --model is "tiny", a base of that shape is
pre-trained first, in the run directory.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from train import data, lora, memory, pretrain, run, weights
from train.command import guarded_main, parse
from train.model import Decoder
from train.options import Count, Names, Options, Positive, Share


@dataclasses.dataclass(frozen=True)
class LoraOptions(Options):
    """Options of a run that trains adapters alone."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Numerator of the adapters' scale, which is alpha / rank."""
    dropout: Share = 0.0
    """Share of an adapter's inputs that is dropped during training."""
    targets: Names = lora.ATTENTION + lora.MLP
    """Linear layers that get an adapter."""
    base_steps: Count = 700
    """Steps of pre-training, for the model "tiny"."""


LARGE = LoraOptions(
    model="Qwen/Qwen2.5-7B",
    out=Path("runs/qwen_lora"),
    steps=1000,
    batch_size=16,
    length=1024,
    learning_rate=1e-4,
    param_dtype="bfloat16",
    loss_chunk=128,
    remat=True,
    scan=True,
)
PRESETS = {
    "qwen2.5-7b": LARGE,
    "qwen2.5-0.5b": dataclasses.replace(LARGE, model="Qwen/Qwen2.5-0.5B", remat=False),
    "qwen2.5-1.5b": dataclasses.replace(LARGE, model="Qwen/Qwen2.5-1.5B", remat=False),
    "qwen2.5-3b": dataclasses.replace(LARGE, model="Qwen/Qwen2.5-3B"),
    "qwen2.5-14b": dataclasses.replace(LARGE, model="Qwen/Qwen2.5-14B", microbatches=2),
    "tiny": LoraOptions(
        model="tiny",
        out=Path("runs/qwen_lora_tiny"),
        data="standard-library",
        steps=300,
        batch_size=8,
        length=64,
        learning_rate=1e-3,
        schedule="constant",
        warmup=0.0,
        rank=8,
        alpha=16.0,
        dtype="float32",
        eval_targets=16_384,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(
        LoraOptions, PRESETS, arguments, prog="train.qwen_lora", description=__doc__ or ""
    )
    return guarded_main("train.qwen_lora", lambda: run.once(options, "adapter", finetune))


def finetune(options: LoraOptions) -> run.Result:
    """One run; the adapter goes to ``adapter`` in the run directory."""
    run.check(options)
    config = run.shape_of(options.model)

    def adapted(decoder: Decoder) -> Decoder:
        lora.add_lora(
            decoder,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            targets=options.targets,
            rngs=nnx.Rngs(options.seed),
        )
        return decoder

    def build() -> Decoder:
        return adapted(Decoder(config, rngs=nnx.Rngs(options.seed), **run.kinds(options)))

    cost = run.announce(options, build, nnx.LoRAParam)
    source = pretrain.base(options, options.base_steps)
    corpus = data.load(options.data, tokenizer=source, encoding=options.encoding)
    weights.check_vocabulary(corpus.tokenizer, config)
    decoder = adapted(weights.load(source, mesh=run.mesh(options), **run.kinds(options)))

    def save(decoder: Decoder) -> None:
        weights.save_adapter(decoder, options.out / "adapter", base=source)

    dropout = options.dropout > 0
    return run.train(decoder, nnx.LoRAParam, corpus, options, cost, dropout=dropout, save=save)


if __name__ == "__main__":
    memory.keep_freed()
    raise SystemExit(main())
