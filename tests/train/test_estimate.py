"""Estimates from shapes against what XLA allocates and counts for the compiled step."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import slowly

from train import estimate, loop, lora
from train.model import PRESETS, Decoder, next_token_loss, split
from train.options import Options
from train.speed import Speed

OPTIONS = Options("tiny", Path("x"), batch_size=8, length=64, dtype="float32")
TX = optax.adamw(1e-3)


def shapes(config=PRESETS["tiny"], adapters=False, **kinds):
    def build():
        decoder = Decoder(config, rngs=nnx.Rngs(0), **kinds)
        if adapters:
            lora.add_lora(decoder, rank=4, alpha=8, rngs=nnx.Rngs(0))
        return decoder

    graphdef, params, frozen = split(
        nnx.eval_shape(build), nnx.LoRAParam if adapters else nnx.Param
    )
    return graphdef, params, frozen, jax.eval_shape(TX.init, params)


def found(options=OPTIONS, config=PRESETS["tiny"], adapters=False):
    _, *trees = shapes(config, adapters)
    return estimate.estimate(config, options, *trees)


def compiled(adapters, **kinds):
    graphdef, params, frozen, opt_state = shapes(adapters=adapters, **kinds)
    tokens = jax.ShapeDtypeStruct((8, 65), jnp.int32)
    step = loop.train_step.lower(
        next_token_loss(graphdef),
        optax.with_extra_args_support(TX).update,
        *(params, opt_state, frozen, tokens),
    )
    return step.compile()


@pytest.mark.parametrize("adapters", [*slowly(False), True], ids=["full", "lora"])
@pytest.mark.parametrize("remat", [False, *slowly(True)])
def test_memory_and_arithmetic_are_near_those_of_the_compiled_step(adapters, remat):
    options = dataclasses.replace(OPTIONS, remat=remat)
    expected = found(options, adapters=adapters)
    # XLA may recompute early what stands side by side, and then saves nothing; a scan it cannot.
    step = compiled(adapters, remat=remat, scan=remat)
    memory = step.memory_analysis()
    held = expected.parts["parameters"] + expected.parts["optimizer state"]
    assert memory.argument_size_in_bytes == pytest.approx(held, rel=0.02)
    temporary = sum(expected.parts[name] for name in ("gradients", "activations", "logits"))
    assert 0.5 < temporary / memory.temp_size_in_bytes < 2.0
    if not remat:  # recomputation is arithmetic of the machine, not of the model
        assert expected.flops == pytest.approx(step.cost_analysis()["flops"], rel=0.15)


def test_what_saves_memory_is_seen_to():
    base = found()
    for change in ({"remat": True}, {"microbatches": 8}, {"loss_chunk": 8}):
        assert found(dataclasses.replace(OPTIONS, **change)).bytes < base.bytes, change
    assert found(adapters=True).parts["optimizer state"] < base.parts["optimizer state"] / 5
    assert found(adapters=True).flops == pytest.approx(base.flops * 2 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen/Qwen2.5-7B", 7.616), ("TinyLlama/TinyLlama_v1.1", 1.100)]
)
def test_published_sizes_are_counted_without_being_made(name, billions):
    config = PRESETS[name]
    expected = found(config=config)
    assert expected.parameters == pytest.approx(billions * 1e9, rel=1e-3)
    # 6 a parameter and token, less the look-up of embeddings, plus attention.
    per_token = expected.flops / expected.tokens
    assert per_token == pytest.approx(6 * expected.parameters, rel=0.1)


def test_a_run_that_cannot_fit_says_so_with_its_parts():
    expected = found(config=PRESETS["Qwen/Qwen2.5-7B"])
    with pytest.raises(ValueError, match=r"needs about \d+.* GB a device .*there are 80.0 GB"):
        estimate.check(expected, 80 * 10**9, devices=1)
    estimate.check(expected, 80 * 10**9, devices=8)
    estimate.check(expected, None, devices=1)


def test_the_description_names_size_memory_and_time():
    options = dataclasses.replace(OPTIONS, steps=1000, eval_every=100, eval_targets=512_000)
    cost = found()
    step = cost.flops / (1e12 * estimate.EXPECTED_SHARE)
    text = estimate.describe(cost, options, peak=1e12, devices=1)
    assert "0.657 M parameters" in text
    assert "MB a device (parameters 2.6 MB" in text
    assert "1000 steps of 512 tokens" in text
    # Nine times 1000 batches, forward alone; then all text, whose length nobody knows yet.
    seconds = f"{1000 * step:.0f} s and {9 * 1000 * step / 3:.0f} s of evaluations"
    assert f"{seconds}, and at the end all held-out text, at 35%" in text
    bounded = dataclasses.replace(options, eval_every=0, final_eval_targets=5_120_000)
    text = estimate.describe(cost, bounded, peak=1e12, devices=1)
    assert f"{2 * 10_000 * step / 3:.0f} s of evaluations, at 35%" in text


@pytest.mark.parametrize(("adapters", "share"), [(False, 1 / 3), (True, 1 / 2)])
def test_the_time_left_is_that_of_the_steps_and_the_forward_passes(adapters, share):
    options = dataclasses.replace(OPTIONS, steps=1000)
    left = estimate.TimeLeft(options, found(options, adapters=adapters), evaluated=10_240)
    steps, evaluations = left.seconds(step=100, tokens_per_second=5120.0)
    assert steps == pytest.approx(900 * 8 * 64 / 5120)
    assert evaluations == pytest.approx(share * 2)
    said = left.describe(100, 5120.0)
    assert said.startswith(
        "measured over the last steps: the 900 steps that are left take about 90"
    )
    # The share is that of the arithmetic, as XLA counts it.
    graphdef, params, frozen, _ = shapes(adapters=adapters)
    tokens = jax.ShapeDtypeStruct((8, 65), jnp.int32)
    forward = loop._evaluate.lower(next_token_loss(graphdef), params, frozen, tokens).compile()
    assert forward.cost_analysis()["flops"] / left.cost.flops == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
    ],
)
def test_devices_are_known_by_their_names(kind, peak):
    class Device:
        device_kind = kind

    assert estimate.peak_flops(Device()) == peak


def test_the_peak_of_an_unknown_device_is_measured():
    device = jax.devices("cpu")[0]
    assert 1e8 < estimate.peak_flops(device) < 1e14
    assert estimate.available_bytes(device) > 1e8


def test_speed_counts_the_newest_steps_and_no_pause():
    ends = np.concatenate([[0.0, 60.0], 60 + np.arange(1, 11) * 0.5, 200 + np.arange(3) * 0.25])
    clock = iter(ends)
    speed = Speed(tokens=100, flops=1e9, peak=1e10, window=4, clock=lambda: next(clock))
    seen = [speed.step() for _ in range(12)]
    assert seen[0] == seen[1] == {}
    assert seen[-1] == pytest.approx({"tokens_per_second": 200.0, "mfu": 0.2})
    speed.pause()
    assert [speed.step() for _ in range(3)][-1] == pytest.approx(
        {"tokens_per_second": 400.0, "mfu": 0.4}
    )
