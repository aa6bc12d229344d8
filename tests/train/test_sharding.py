"""Eight simulated devices: where parameters lie, and that training is that of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lbw_optax import lbw_guard
from train import lora, model, presets, sharding, weights

CONFIG = model.Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)
BARE = optax.adamw(0.01)


def mesh_of():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def start(scan, adapters):
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0), scan=scan, remat=scan)
    if not adapters:
        return model.split(decoder)
    lora.add_lora(decoder, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
    return model.split(decoder, nnx.LoRAParam)


def batches():
    rng = np.random.default_rng(0)
    segments = np.repeat([[0, 0, 0, 0, 1, 1, 1, 1, 1]], 8, axis=0)
    for _ in range(3):
        yield model.Batch(rng.integers(64, size=(8, 9)).astype(np.int32), segments)


def trained(tx, graphdef, params, state, frozen, put):
    """(losses, parameters, optimizer state) after three steps."""
    tx = optax.with_extra_args_support(tx)
    loss_fn = model.next_token_loss(graphdef, chunk=3)

    @jax.jit
    def step(params, state, frozen, batch):
        loss, gradients = jax.value_and_grad(loss_fn)(params, frozen, batch)
        updates, state = tx.update(gradients, state, params, value=loss)
        return loss, optax.apply_updates(params, updates), state

    losses = []
    for batch in batches():
        loss, params, state = step(params, state, frozen, put(batch))
        losses.append(float(loss))
    return losses, params, state


@pytest.mark.parametrize(
    ("tx", "scan", "adapters"),
    [
        pytest.param(BARE, False, False, id="full"),
        pytest.param(lbw_guard(BARE), True, True, id="guarded lora", marks=pytest.mark.slow),
    ],
)
def test_training_on_a_mesh_is_that_of_one_device(tx, scan, adapters):
    graphdef, params, frozen = start(scan, adapters)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        placed, rest = sharding.shard(params, mesh), sharding.shard(frozen, mesh)
        state = sharding.initialise(lambda: tx.init(placed), mesh)
        placements = jax.tree.map(lambda leaf: leaf.sharding, placed)
        put = functools.partial(sharding.shard_batch, mesh=mesh)
        losses, sharded, sharded_state = trained(tx, graphdef, placed, state, rest, put)
    expected, alone, _ = trained(tx, graphdef, params, tx.init(params), frozen, lambda batch: batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] != losses[0]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), sharded, alone
    )
    same = jax.tree.map(
        lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), sharded, placements
    )
    assert all(jax.tree.leaves(same))
    moments = optax.tree.get(sharded_state, "mu")
    jax.tree.map(
        lambda moment, leaf: moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim) or 1 / 0,
        moments,
        sharded,
    )


MIXTURE = dataclasses.replace(
    CONFIG,
    num_hidden_layers=1,
    experts=presets.Experts(4, 2, 16),
    attention_bias=False,
    qk_norm=True,
)


def test_experts_on_a_mesh_are_those_of_one_device():
    """Loss with its balance, and the gradient of every parameter, in rows of unlike length."""
    graphdef, params, frozen = model.split(model.Decoder(MIXTURE, rngs=nnx.Rngs(0)))
    gradient = jax.jit(jax.value_and_grad(model.next_token_loss(graphdef, balance=0.5)))
    rng = np.random.default_rng(0)
    batch = rng.integers(64, size=(8, 9)).astype(np.int32)
    batch[:3, 5:] = model.IGNORED
    expected = gradient(params, frozen, batch)
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = sharding.shard(params, mesh)
        loss, found = gradient(placed, frozen, sharding.shard_batch(batch, mesh))
    kernel = placed["layers"][0]["mlp"]["experts"]["up_proj"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 8)
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected[1]
    )


def shapes(scan, adapters):
    """(parameters, frozen rest) without any array."""
    return jax.eval_shape(lambda: start(scan, adapters)[1:])


def specs(tree):
    found = sharding.shardings(tree, mesh_of())
    return {
        "/".join(sharding._names(path)): place.spec
        for path, place in jax.tree_util.tree_leaves_with_path(found)
    }


def test_every_parameter_has_its_rule():
    found = specs(shapes(False, False)[0])
    attention = "layers/1/self_attn"
    assert found["embed_tokens/embedding"] == P("tensor", "fsdp")
    assert found["lm_head/kernel"] == P("fsdp", "tensor")
    assert found[f"{attention}/q_proj/kernel"] == P("fsdp", "tensor")
    assert found[f"{attention}/q_proj/bias"] == P("tensor")
    assert found[f"{attention}/o_proj/kernel"] == P("tensor", "fsdp")
    assert found["layers/0/mlp/down_proj/kernel"] == P("tensor", "fsdp")
    whole = {name for name, spec in found.items() if spec == P()}
    assert whole == {name for name in found if "norm" in name}


def test_stacks_and_adapters_follow_the_rule_of_their_kernel():
    found = specs(shapes(True, True)[0])
    assert found["layers/self_attn/q_proj/lora_A"] == P(None, "fsdp", None)
    assert found["layers/self_attn/q_proj/lora_B"] == P(None, None, "tensor")
    assert found["layers/mlp/down_proj/lora_A"] == P(None, "tensor", None)
    base = specs(shapes(True, True)[1])
    assert base["layers/mlp/down_proj/base/kernel"] == P(None, "tensor", "fsdp")
    assert base["layers/self_attn/k_proj/base/bias"] == P(None, "tensor")


@pytest.mark.parametrize("scan", [False, True])
def test_weights_are_read_into_their_places(scan, tmp_path):
    decoder = model.Decoder(CONFIG, rngs=nnx.Rngs(0))
    weights.save(decoder, tmp_path)
    mesh = mesh_of()
    loaded = model.split(weights.load(tmp_path, mesh=mesh, scan=scan))[1]
    expected = sharding.shardings(loaded, mesh)
    jax.tree.map(lambda leaf, place: leaf.sharding == place or 1 / 0, loaded, expected)
    jax.tree.map(
        np.testing.assert_array_equal, weights.to_hf(loaded), weights.to_hf(model.split(decoder)[1])
    )


def test_initialise_makes_what_one_device_makes():
    def make():
        return model.split(model.Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]

    mesh = mesh_of()
    placed = sharding.initialise(make, mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), placed, make())
    kernel = placed["layers"][0]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 16)}


def test_a_mesh_takes_all_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    found = dict(sharding.make_mesh(tensor=2, expert=2).shape)
    assert found == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    with pytest.raises(ValueError, match=r"data=3, fsdp=2 and tensor=1 has 6 devices.*there are 8"):
        sharding.make_mesh(data=3, fsdp=2)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"6 sequences.*4 devices.*a multiple of 4"):
        sharding.shard_batch(np.zeros((6, 9), np.int32), mesh_of())
    spread = sharding.shard_batch(model.Batch(np.zeros((8, 9)), step=np.uint32(1)), mesh_of())
    assert {shard.data.shape for shard in spread.tokens.addressable_shards} == {(2, 9)}


def test_arrays_that_the_mesh_does_not_divide_are_all_named():
    tree = {
        "q_proj": {"kernel": jnp.zeros((6, 9)), "bias": jnp.zeros(9)},
        "other": {"kernel": jnp.zeros(5)},
    }
    with pytest.raises(ValueError, match="does not divide") as raised:
        sharding.shardings(tree, mesh_of())
    assert "q_proj.kernel (6, 9) by tensor=2" in str(raised.value)
    assert "q_proj.bias (9,) by tensor=2" in str(raised.value)
    assert "fsdp" not in str(raised.value)
