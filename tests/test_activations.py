"""Outliers, attention logits and stable ranks against NumPy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lbw_optax import activation_outliers, attention_logit_max, stable_rank
from lbw_optax.activations import Outliers, layer_names, stacked
from lbw_optax.law import layers

RNG = np.random.default_rng(0)
SHAPES = [(), (257,), (3, 5, 7), (64, 96)]
rank = jax.jit(stable_rank)
outliers = jax.jit(activation_outliers)
logit_max = jax.jit(attention_logit_max, static_argnames=("is_causal", "queries"))
DTYPES = ["float8_e4m3fn", "float16", "bfloat16", "float32", "int32", "complex64"]


def values(shape, dtype):
    """Normal numbers with a few that stand out, as the type has them."""
    x = RNG.normal(size=shape) * 3
    x = np.where(RNG.random(shape) < 0.02, 20 * x, x)
    x = x + 1j * RNG.normal(size=shape) if dtype == "complex64" else x
    return jnp.asarray(x).astype(dtype)


def reference(x, k=6.0):
    exact = np.asarray(x.astype("complex64" if x.dtype == "complex64" else "float32"))
    size = np.abs(exact.astype(np.complex128))
    rms = np.sqrt(np.mean(size**2))
    return np.mean(size > k * rms), size.max() / rms if rms else 0.0


def assert_outliers(actual, expected):
    assert [x.dtype for x in actual] == ["float32", "float32"]
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outliers_are_those_of_numpy(shape, dtype):
    x = values(shape, dtype)
    for k in (6.0, 1.5):
        assert_outliers(outliers(x, k), reference(x, k))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("share", [1.0, 0.5, 1e-8, 1e-4])
def test_no_size_overflows_or_vanishes(dtype, share):
    """From the largest number that a type has down to small ones, where squares have no place."""
    x = values((40, 50), "float32")
    largest = float(jnp.finfo(dtype).max) * share / float(jnp.abs(x).max())
    x = (x * 0.99 * largest).astype(dtype)
    assert_outliers(outliers(x), reference(x))


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e37])
def test_large_and_small_float32(scale):
    x = jnp.asarray(RNG.normal(size=1000) * scale, jnp.float32).at[3].set(9 * scale)
    assert_outliers(outliers(x), reference(x))


def test_float64_is_measured_in_its_own_range():
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=500) * 1e300).at[3].set(3e301)
        assert_outliers(activation_outliers(x), reference_of_doubles(np.asarray(x)))


def reference_of_doubles(x):
    x = np.abs(x / np.abs(x).max())
    rms = np.sqrt(np.mean(x**2))
    return np.mean(x > 6 * rms), 1 / rms


def test_zeros_have_no_outliers():
    assert [float(x) for x in activation_outliers(jnp.zeros((3, 4), jnp.bfloat16))] == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_what_is_not_finite_stays_so(bad, rest):
    x = jnp.full(10, rest).at[4].set(bad)
    assert all(np.isnan(part) for part in jax.jit(activation_outliers)(x))


def test_more_elements_than_float32_counts_one_by_one():
    x = jnp.ones((1 << 13, 1 << 12), jnp.int8).at[0, 0].set(-100)
    share, peak = jax.jit(activation_outliers)(x)
    assert float(share) == pytest.approx(2.0**-25)
    assert float(peak) == pytest.approx(100 / np.sqrt(1 + 9999 / 2**25), rel=1e-6)


def of_stack(x):
    return jax.lax.scan(lambda _, row: (None, activation_outliers(row)), None, x)[1]


@pytest.mark.parametrize(
    "transformed",
    [
        jax.jit(jax.vmap(activation_outliers)),
        jax.jit(of_stack),
        jax.jit(lambda x: jax.lax.map(jax.checkpoint(activation_outliers), x)),
        lambda x: jax.tree.map(lambda *y: jnp.stack(y), *map(outliers, x)),
    ],
    ids=["vmap", "scan", "remat", "jit"],
)
def test_outliers_under_transformations(transformed):
    x = values((4, 30, 20), "bfloat16")
    np.testing.assert_allclose(
        np.stack(transformed(x), 1), [reference(row) for row in x], rtol=2e-6
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: activation_outliers(jnp.zeros((0, 3))), "at least one element"),
        (lambda: activation_outliers(jnp.ones(3), k=-1), "k must be a number above 0, got -1"),
        (lambda: activation_outliers(jnp.ones(3), np.float32(-1)), "k must be a number above 0"),
        (lambda: logit((1, 4, 2, 2), (1, 4, 2, 2), mask=jnp.zeros(4)), "must be bool, .* float32"),
        (lambda: stable_rank(jnp.float32(1)), r"with elements, got shape \(\)"),
        (lambda: stable_rank(jnp.ones(2), iterations=0), "iterations must be at least 1, got 0"),
        (lambda: logit((1, 4, 3, 2), (1, 4, 2, 2)), "3 query heads are no multiple of 2"),
        (lambda: logit((1, 4, 3, 2), (2, 4, 3, 2)), r"alike in batch and size, got shapes \(1, 4"),
        (lambda: logit((4, 3, 2), (4, 3, 3)), "alike in batch and size"),
        (lambda: logit((1, 4, 2, 2), (1, 4, 2, 2), queries=0), "queries must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def logit(q, k, **options):
    return attention_logit_max(jnp.ones(q), jnp.ones(k), **options)


def all_logits(query, key, scale=None):
    """(batch, heads, length, keys), as `jax.nn.dot_product_attention` has them, in float64."""
    query, key = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key))
    key = np.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale * np.einsum("btnd,bsnd->bnts", query, key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [1, 5, 99])
def test_logits_are_those_of_numpy(dtype, kv_heads, is_causal, queries):
    query, key = (
        jnp.asarray(RNG.normal(size=(2, 12, n, 8)), jnp.float32).astype(dtype)
        for n in (4, kv_heads)
    )
    mask = RNG.random((2, 1, 12, 12)) < 0.7
    seen = mask & (np.tril(np.ones((12, 12), bool)) if is_causal else True)
    logits = np.where(seen, all_logits(query, key, 0.3), -np.inf)
    stride = -(-12 // queries)
    expected = logits[:, :, ::-1][:, :, ::stride].max()
    options = {"mask": mask, "scale": 0.3, "is_causal": is_causal}
    found = logit_max(query, key, **options, queries=queries)
    assert found.dtype == "float32"
    assert float(found) == pytest.approx(expected, rel=1e-5)
    # No more than the largest of all, and that one where all are looked at.
    assert float(found) <= logits.max() + 1e-5
    if queries >= 12:
        assert float(found) == pytest.approx(logits.max(), rel=1e-5)


def test_logits_without_a_batch_and_with_other_keys():
    query, key = (jnp.asarray(RNG.normal(size=(n, 2, 4)), jnp.float32) for n in (5, 9))
    expected = all_logits(query[None], key[None]).max()
    assert float(attention_logit_max(query, key)) == pytest.approx(expected, rel=1e-5)
    mask = np.zeros((2, 5, 9), bool)
    mask[1, 2, 3] = True
    expected = all_logits(query[None], key[None])[0, 1, 2, 3]
    assert float(attention_logit_max(query, key, mask=mask)) == pytest.approx(expected, rel=1e-5)


def test_a_logit_that_is_not_seen_does_not_count():
    query = jnp.ones((1, 4, 1, 2)).at[0, 3].set(jnp.nan)
    mask = np.arange(4)[:, None] < 3
    assert float(attention_logit_max(query, jnp.ones((1, 4, 1, 2)), mask=mask)) == pytest.approx(
        np.sqrt(2)
    )
    assert np.isnan(attention_logit_max(query, query))


def test_the_logits_are_never_all_held():
    """Of a length at which they would be half a gigabyte."""
    shape = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    of = jax.jit(functools.partial(attention_logit_max, is_causal=True))
    used = of.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes
    assert used < 40e6


MATRICES = {
    "square": ((60, 60), (60, 60)),
    "wide": ((20, 300), (20, 300)),
    "vector": ((30,), (30, 1)),
    "heads": ((48, 4, 12), (48, 48)),
    "convolution": ((3, 3, 16, 32), (144, 32)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
@pytest.mark.parametrize(("shape", "matrix"), MATRICES.values(), ids=MATRICES)
def test_stable_rank_bounds_that_of_numpy(shape, matrix, dtype):
    w = jnp.asarray(RNG.normal(size=shape) * 1e20, jnp.float32).astype(dtype)
    exact = np.asarray(w.astype("complex64"), np.complex128).reshape(matrix)
    values = np.linalg.svd(exact, compute_uv=False)
    expected = np.sum(values**2) / values[0] ** 2
    found = float(rank(w))
    assert expected * (1 - 1e-5) <= found <= 1.15 * expected


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P("d", "e")])
def test_stable_rank_of_a_sharded_leaf(spec):
    w = RNG.normal(size=(8, 16)).astype("f")
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        found = rank(jax.device_put(w, NamedSharding(mesh, spec)))
    assert float(found) == pytest.approx(float(rank(w)), rel=1e-5)


def test_stable_rank_of_one_direction_and_of_nothing():
    w = 50 * np.outer(RNG.normal(size=60), RNG.normal(size=60)) + RNG.normal(size=(60, 60))
    values = np.linalg.svd(w, compute_uv=False)
    expected = np.sum(values**2) / values[0] ** 2
    assert float(rank(jnp.float32(w))) == pytest.approx(expected, rel=1e-5)
    assert float(rank(jnp.zeros((60, 60)))) == 0
    assert np.isnan(rank(jnp.ones((60, 60)).at[1, 1].set(jnp.inf)))
    assert jax.vmap(stable_rank)(jnp.ones((5, 3, 4))).tolist() == pytest.approx([1.0] * 5)


PAIR = Outliers(np.float32(0.1), np.float32(5.0))


def test_layers_are_counted_in_the_order_of_their_names():
    stack = Outliers(jnp.zeros(2), jnp.array([7.0, 8.0]))
    given = {"b.10": PAIR, "b.9/attention": 3.0, "b.9": (0.2, 6), "c": stack, "a": jnp.ones(2)}
    assert layer_names(given) == ["b.9", "b.10", "c/0", "c/1"]
    found = stacked(given)
    np.testing.assert_allclose(found.outliers.peak, [6, 5, 7, 8])
    np.testing.assert_allclose(found.outliers.share, [0.2, 0.1, 0, 0], rtol=1e-6)
    assert found.logits.tolist() == [1, 1, 3]
    through_jit = jax.jit(stacked)(given)
    jax.tree.map(np.testing.assert_array_equal, through_jit, found)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([PAIR], "must be a mapping from the name of a layer .* got list"),
        ({"a": jnp.ones((2, 3, 4))}, r"activations\['a'\] must be .* got shapes \(2, 3, 4\)"),
        ({"a": jnp.ones((2, 0))}, r"activations\['a'\] must be .* got shapes \(2, 0\)"),
        ({"a": Outliers(*jnp.ones((2, 2, 3)))}, r"activations\['a'\] must be"),
        ({"a": {"b": 1.0}}, r"activations\['a'\] must be"),
        ({"a": Outliers(0.1, jnp.ones(2))}, r"activations\['a'\] must be"),
        ({"a": "high"}, r"activations\['a'\] must be"),
        ({"a": jnp.ones(0)}, r"activations\['a'\] must be"),
        ({"a": None}, r"activations\['a'\] must be"),
        ({"a": np.str_("high")}, r"activations\['a'\] must be"),
        ({"a": np.array([None, 2.0])}, r"activations\['a'\] must be"),
        ({"a": jnp.ones(2, jnp.complex64)}, r"activations\['a'\] must be"),
        ({"a": jax.random.key(0)}, r"activations\['a'\] must be"),
        ({"a": 10**400}, r"activations\['a'\] must be"),
        (3.0, "must be a mapping .* got float"),
        (jnp.float32(3), "must be a mapping"),
        ((x for x in "ab"), "must be a mapping .* got generator"),
        ([], "must be a mapping .* got list"),
    ],
)
def test_activations_that_are_none_are_named(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        layers.absorb(layers.init(), given)
