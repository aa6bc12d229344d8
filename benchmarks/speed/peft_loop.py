"""LoRA on one model in Hugging Face's format: our loop, a bare one, and torch with `peft`.

Each loop is a process of its own, told by a pipe when it is its turn: what one's idle threads do,
and what memory it keeps, is not the others' concern.
"""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optax
from flax import nnx

from benchmarks.speed.loops import (
    Shape,
    Stretch,
    batches,
    decoder,
    measured,
    options_of,
    ours,
    plain,
)
from train import lora, memory, model, weights
from train.options import Options

PACKAGES = ("torch", "transformers", "peft")
RANK, ALPHA, RATE = 8, 16, 1e-4


def compare(shape: Shape, rounds: int, steps: int) -> dict[str, Any] | None:
    """Adapters trained: a bare loop, `transformers` with `peft`, and ours; None without those."""
    if not all(importlib.util.find_spec(name) for name in PACKAGES):
        return None
    with contextlib.ExitStack() as opened:
        place = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        options = options_of(shape, place / "run", steps * (rounds + 1))
        weights.save(decoder(shape, options), place / "model")
        stretches = {
            name: opened.enter_context(_apart(loop, shape, options, steps))
            for name, loop in LOOPS.items()
        }
        result = measured(stretches, shape, steps, rounds, trains_all=False)
    return {**result, "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


Loop = Callable[..., Stretch]
"""Takes shape, options, steps, and a stack for what is to be closed at the end."""


@contextlib.contextmanager
def _apart(loop: Loop, *arguments: Any) -> Iterator[Stretch]:
    """The stretch of a loop that lives in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, loop, *arguments))
    process.start()
    there.close()  # so that the end of that process is the end of the pipe

    def stretch() -> float:
        here.send("your turn")
        return here.recv()

    try:
        yield stretch
    finally:
        here.close()
        process.join()


def _serve(turns: Connection, loop: Loop, *arguments: Any) -> None:
    with contextlib.ExitStack() as opened, contextlib.suppress(EOFError):
        stretch = loop(*arguments, opened)
        while turns.recv():
            turns.send(stretch())


def _plain(shape: Shape, options: Options, steps: int, _: contextlib.ExitStack) -> Stretch:
    return plain(_adapted(shape, options), nnx.LoRAParam, options, optax.adamw(RATE), steps)


def _ours(shape: Shape, options: Options, steps: int, opened: contextlib.ExitStack) -> Stretch:
    """As the scripts have it, which keep their memory."""
    memory.keep_freed()
    return ours(_adapted(shape, options), nnx.LoRAParam, options, steps, opened)


def _adapted(shape: Shape, options: Options) -> model.Decoder:
    fresh = decoder(shape, options)
    lora.add_lora(fresh, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
    return fresh


def _torch(shape: Shape, options: Options, steps: int, _: contextlib.ExitStack) -> Stretch:
    """A plain loop of torch: forward, backward, AdamW."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = transformers.AutoModelForCausalLM.from_pretrained(options.out.parent / "model")
    targets = [*lora.ATTENTION, *lora.MLP]
    adapters = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    adapted = peft.get_peft_model(base, adapters).to(device).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    batch, at = batches(shape.config, options), [0]

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            ids = torch.from_numpy(batch(at[0])).long().to(device)
            at[0] += 1
            logits = adapted(input_ids=ids[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    return stretch


def _torch_kept(*arguments: Any) -> Stretch:
    memory.keep_freed()
    return _torch(*arguments)


LOOPS = {"plain": _plain, "torch": _torch, "torch, memory kept": _torch_kept, "ours": _ours}
