"""QK-clip against NumPy in float64, and the logits of an attention after it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_same_bits

import lbw_optax
from lbw_optax import attention_logit_max, by_attention, lbw_guard, qk_clip
from lbw_optax.activations import largest_logits, stacked

LIMIT = 10.0
HEADS, KEYS, SIZE, WIDTH = 4, 2, 6, 5
# Of three layers: below the limit, above it, and not finite.
LAYERS = {
    "below": 10.0,
    "above": 40.0,
    "far": 3e38,
    "nan": np.nan,
    "inf": np.inf,
    "negative": -99.0,
}


def layer(seed=0, dtype="float32", apart=False):
    """Projections of queries, keys and values; `apart`: heads have an axis of their own."""
    draw = np.random.default_rng(seed)

    def projection(heads):
        shape = (heads, SIZE) if apart else (heads * SIZE,)
        return {
            "kernel": jnp.asarray(draw.normal(size=(WIDTH, *shape)), dtype),
            "bias": jnp.asarray(draw.normal(size=shape), dtype),
        }

    heads = {"q_proj": HEADS, "k_proj": KEYS, "v_proj": KEYS}
    return {name: projection(count) for name, count in heads.items()}


def model(count, **options):
    return {"layers": {str(i): {"attn": layer(i, **options)} for i in range(count)}}


def stack(params):
    every = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *every)}


def apply(tx, params, updates, logits, state=None):
    """Parameters after the step, and the state."""
    state = tx.init(params) if state is None else state
    updates, state = tx.update(updates, state, params, activations={"attention": logits})
    return optax.apply_updates(params, updates), state


def clips(state):
    return int(optax.tree.get(state, "qk_clips"))


def expected(p, u, logit):
    after = np.asarray(p, np.float64) + np.asarray(u, np.float64)
    return after * np.sqrt(LIMIT / logit) if np.isfinite(logit) and logit > LIMIT else after


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_projections_are_those_of_numpy_and_the_rest_is_left(dtype):
    params = model(len(LAYERS), dtype=dtype)
    updates = jax.tree.map(lambda x: (0.1 * x[::-1]).astype(dtype), params)
    logits = jnp.array(list(LAYERS.values()))
    found, state = qk_clip(LIMIT).update(
        updates, qk_clip(LIMIT).init(params), params, activations={"attention": logits}
    )
    after, tolerance = optax.apply_updates(params, found), float(jnp.finfo(dtype).eps)
    assert clips(state) == 2
    for i, (kind, logit) in enumerate(LAYERS.items()):
        for name in ("q_proj", "k_proj", "v_proj"):
            at = [tree["layers"][str(i)]["attn"][name] for tree in (params, updates, found, after)]
            if kind not in ("above", "far") or name == "v_proj":
                assert_same_bits(at[1], at[2])
                continue
            for p, u, new, x in zip(*map(jax.tree.leaves, at), strict=True):
                assert new.dtype == x.dtype == dtype
                room = 2 * tolerance * float(jnp.abs(p).max())
                exact = expected(p, u, logit)
                np.testing.assert_allclose(np.asarray(x, np.float64), exact, atol=room, rtol=0)


def test_layers_are_taken_in_the_order_of_the_numbers_in_their_names():
    params = model(12)
    logits = jnp.full(12, 1.0).at[10].set(4 * LIMIT)
    after, _ = apply(qk_clip(LIMIT), params, jax.tree.map(jnp.zeros_like, params), logits)
    biases = [
        [tree["layers"][str(i)]["attn"]["q_proj"]["bias"] for tree in (params, after)]
        for i in range(12)
    ]
    assert [i for i in range(12) if not np.array_equal(*biases[i])] == [10]


@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_stack_is_what_its_layers_are(per_head, size):
    params = model(3)
    updates = jax.tree.map(lambda x: 0.1 * x, params)
    shape = (3, HEADS) if per_head else (3,)
    logits = jnp.asarray(np.random.default_rng(1).uniform(0, size, shape), jnp.float32)
    apart, of_apart = apply(qk_clip(LIMIT), params, updates, logits)
    tx = qk_clip(LIMIT, layers=functools.partial(by_attention, stacked="layers"))
    together, of_together = apply(tx, stack(params), stack(updates), logits)
    jax.tree.map(np.testing.assert_array_equal, together, stack(apart))
    assert clips(of_apart) == clips(of_together)
    assert (clips(of_apart) > 0) == (size > LIMIT)


# --- an attention ------------------------------------------------------------------------------


def largest(params, x, per_head):
    """Of the products of its queries and keys, without norms."""

    def heads(name):
        kernel, bias = (params[name][part] for part in ("kernel", "bias"))
        rows = x @ kernel.reshape(WIDTH, -1).astype("float32")
        return (rows + bias.reshape(1, 1, -1)).reshape(*x.shape[:-1], -1, SIZE)

    query, key = heads("q_proj"), heads("k_proj")
    return attention_logit_max(query, key, per_head=per_head, queries=99)


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
def test_the_same_inputs_have_the_threshold_as_their_largest_logit(per_head, dtype, apart):
    """Without a step, of each key's heads together; what is below stays as it is."""
    params = layer(dtype=dtype, apart=apart)
    # The heads of the first key are far out, those of the second are not.
    factor = np.repeat([8.0, 0.05], SIZE).reshape((KEYS, SIZE) if apart else -1)
    key = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * factor, dtype), params["k_proj"])
    params = {"attn": params | {"k_proj": key}}
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, WIDTH)), jnp.float32)
    before = np.asarray(largest(params["attn"], x, per_head))
    zeros = jax.tree.map(jnp.zeros_like, params)
    logits = before.reshape(1, HEADS) if per_head else before
    after, state = apply(qk_clip(LIMIT), params, zeros, logits)
    now = np.asarray(largest(after["attn"], x, per_head))
    rtol = 1e-5 if dtype == "float32" else 2e-2
    assert clips(state) == 1
    if not per_head:
        assert before > 2 * LIMIT
        np.testing.assert_allclose(now, LIMIT, rtol=rtol)
        return
    keys, own = before.reshape(KEYS, -1), now.reshape(KEYS, -1)
    assert keys[0].max() > 2 * LIMIT > LIMIT > keys[1].max()
    np.testing.assert_allclose(own[0], keys[0] * LIMIT / keys[0].max(), rtol=rtol)
    np.testing.assert_array_equal(own[1], keys[1])


def test_the_largest_of_each_head_is_that_of_its_logits():
    draw = np.random.default_rng(3)
    query, key = (jnp.asarray(draw.normal(size=(2, 7, n, 4)), jnp.float32) for n in (4, 2))
    products = np.einsum("btnd,bsnd->bnts", query, np.repeat(key, 2, axis=2)) / 2
    seen = np.where(np.tril(np.ones((7, 7), bool)), products, -np.inf)
    found = attention_logit_max(query, key, is_causal=True, per_head=True)
    np.testing.assert_allclose(found, seen.max(axis=(0, 2, 3)), rtol=1e-5)
    unbatched = attention_logit_max(query[0], key[0], is_causal=True, per_head=True)
    np.testing.assert_allclose(unbatched, seen[0].max(axis=(1, 2)), rtol=1e-5)


def test_the_guard_is_told_the_largest_of_heads():
    activations = {"b": jnp.array([[1.0, 5.0], [2.0, -3.0]]), "a": jnp.array([[7.0, 0.0]])}
    assert stacked(activations).logits.tolist() == [7, 5, 2]
    assert largest_logits(activations).tolist() == [[7, 0], [1, 5], [2, -3]]


# --- in a run ----------------------------------------------------------------------------------


def test_one_program_serves_all_logits_and_counts_what_it_did():
    tx, traced = optax.chain(lbw_optax.adamw(1e-2), qk_clip(LIMIT)), []

    @jax.jit
    def step(params, state, logits):
        traced.append(1)
        grads = jax.tree.map(jnp.ones_like, params)
        given = {"value": jnp.float32(1), "activations": {"attention": logits}}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    params = model(2)
    state = tx.init(params)
    counted = []
    for logits in ([1, 1], [11, 9], [11, np.nan], [1e9, 10.5], [np.inf, 2]):
        params, state = step(params, state, jnp.array(logits, jnp.float32))
        counted.append(clips(state))
    assert counted == [0, 1, 2, 4, 4]
    assert len(traced) == 1
    assert float(lbw_optax.metrics(state)["attention_logit"]) == 2


def test_the_counter_ends_where_its_type_does():
    params = model(2)
    full = qk_clip(LIMIT).init(params)._replace(qk_clips=jnp.int32(2**31 - 2))
    _, state = apply(qk_clip(LIMIT), params, params, jnp.full(2, 99.0), full)
    assert clips(state) == 2**31 - 1


@pytest.mark.parametrize("guard", [lbw_guard, lambda tx: optax.chain(lbw_guard(), tx)])
def test_no_decision_of_a_guard_before_it_is_another_one(guard):
    params = model(2)
    grads = jax.tree.map(jnp.ones_like, params)
    given = {"value": jnp.float32(1), "activations": {"attention": jnp.array([99.0, 1.0])}}
    alone = optax.with_extra_args_support(guard(optax.adam(1e-2)))
    both = optax.chain(alone, qk_clip(LIMIT))
    updates, state = alone.update(grads, alone.init(params), params, **given)
    clipped, after = both.update(grads, both.init(params), params, **given)
    assert_same_bits(after[0], state)
    of_layer = [x["layers"]["1"] for x in (updates, clipped)]
    assert_same_bits(*of_layer)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_leaves_are_scaled_where_they_are(kind):
    """Heads over one axis of a mesh, a stack of layers; shardings stay."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    params = stack(model(2))
    logits = jnp.array([[1.0, 2.0, 30.0, 4.0], [90.0, 5.0, 6.0, 7.0]])
    tx = qk_clip(LIMIT, layers=functools.partial(by_attention, stacked="layers"))
    zeros = jax.tree.map(jnp.zeros_like, params)
    expected, _ = apply(tx, params, zeros, logits)
    place = NamedSharding(mesh, P(None, None, "b"))
    bias = NamedSharding(mesh, P("a", "b"))
    spread = jax.tree.map(lambda x: jax.device_put(x, place if x.ndim == 3 else bias), params)
    with jax.set_mesh(mesh):
        found, state = jax.jit(lambda p, s: apply(tx, p, jax.tree.map(jnp.zeros_like, p), s))(
            spread, logits
        )
    assert clips(state) == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    if kind is AxisType.Explicit:
        where = [
            x.sharding.is_equivalent_to(y.sharding, x.ndim)
            for x, y in zip(*map(jax.tree.leaves, (found, spread)), strict=True)
        ]
        assert all(where)


def test_a_step_without_activations_is_left_as_it_is():
    params = model(1)
    updates, state = qk_clip(LIMIT).update(params, qk_clip(LIMIT).init(params), params)
    assert_same_bits(updates, params)
    assert clips(state) == 0


def init(params, **options):
    return qk_clip(**options).init(params)


def update(logits, params=None, **options):
    params = params or model(2)
    return apply(qk_clip(**options), params, params, jnp.asarray(logits, jnp.float32))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: qk_clip(0.0), "threshold must be a number above 0, got 0.0"),
        (lambda: qk_clip(np.nan), "threshold must be a number above 0, got nan"),
        (lambda: qk_clip([1.0, 2.0]), r"threshold must be a number above 0, got \[1.0, 2.0\]"),
        (lambda: qk_clip("100"), "threshold must be a number above 0, got '100'"),
        (lambda: qk_clip(layers="q_proj"), "layers must be a function from the path of a leaf"),
        (lambda: by_attention(3), "by_attention takes the path of a leaf, a str, got int"),
        (lambda: init({"mlp": jnp.ones(3)}), "finds no projection of queries or keys"),
        (
            lambda: init({"a": {"q_proj": {"lora_A": jnp.ones((3, 2))}}}),
            "'a/q_proj/lora_A' is an a",
        ),
        (
            lambda: init({"a": {"q_norm": {"scale": jnp.ones(3)}}}),
            "'a/q_norm/scale' is one: a norm",
        ),
        (lambda: update([1, 2, 3]), r"of 2 \(layers/0/attn and so on\), and activations hold 3"),
        (lambda: update(np.ones((2, 5))), "24 and 12 outputs are not those of 5 heads"),
        (lambda: update(np.ones((2, 2, 2))), r"activations\['attention'\] must be what"),
        (lambda: qk_clip().update(model(1), init(model(1))), r"pass them, tx\.update\(grads, s"),
        (
            lambda: lbw_optax.chain(lbw_guard(), optax.sgd(1.0), qk_clip()).init(model(1)),
            r"put it behind the guard, optax.chain\(lbw_guard\(optimizer\), lbw_optax.qk_clip",
        ),
        (
            lambda: largest_logits({"a": jnp.ones((1, 2)), "b": jnp.ones(2)}),
            "of as many heads in every layer, got 2, 1",
        ),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)
