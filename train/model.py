"""A Flax NNX decoder with the block of Qwen, Llama, Mixtral, OLMo 2 or Gemma, by its switches."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lbw_optax.activations import (
    Activations,
    activation_outliers,
    attention_logit_max,
)
from train.experts import Mixture, Routed, balance_loss
from train.generation import Generation
from train.losses import IGNORED, Batch, chunked_cross_entropy, cross_entropy, targets
from train.presets import PRESETS, Config, Llama3Rope, preset
from train.sharding import ROWS, constrain

__all__ = [
    "IGNORED",
    "PRESETS",
    "Batch",
    "Config",
    "Decoder",
    "Llama3Rope",
    "cross_entropy",
    "next_token_loss",
    "preset",
    "split",
]


# So many rows, at even distances, of what each layer adds are looked at.
WATCHED_ROWS = 128


class Dtypes(NamedTuple):
    """Of the computation (None: that of the parameters) and of the parameters."""

    compute: Any
    params: Any


class Decoder(nnx.Module):
    """Token ids of shape (batch, length) to float32 logits of shape (batch, length, vocabulary).

    Block: ``x += attention(norm(x)); x += down(silu(gate(n)) * up(n)), n = norm(x)``; other norms,
    another activation or a mixture of experts where the configuration says so.
    Inside, x is rows, (batch * length, hidden): XLA's CPU backend takes the products of a
    training step up to twice as fast in rank 2 as in rank 3, above all those of LoRA.

    Args:
      config: the shape.
      rngs: for the parameters.
      dtype: of activations and products; None takes that of the parameters. Statistics of
        norms, softmax, rotary angles, logits and loss are float32 whatever it is.
      param_dtype: of the parameters.
      scan: keep the layers as one stack, (layers, ...) a parameter, and loop over it: compiles
        in the time of one layer.
      remat: keep only the input of each layer for the gradient, and compute the rest again.

    `segments` and `positions` of a call are those of `Batch`, for the same tokens. Raises
    `ValueError` for more tokens than positions, and for `scan` where layers differ.

    >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 512)

    Source: Qwen2 Technical Report, arXiv 2407.10671; Llama, arXiv 2302.13971; Qwen3, 2505.09388;
    Mixtral, 2401.04088; OLMo 2, 2501.00656; Gemma, 2403.08295; Gemma 3, 2503.19786.
    """

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scan: bool = False,
        remat: bool = False,
    ):
        self.config, self.scan, self.remat = config, scan, remat
        dtypes = Dtypes(dtype, param_dtype)
        self.dtype = dtype or param_dtype
        self.generation: Generation | None = None  # of the checkpoint that it was loaded from
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=param_dtype,
            embedding_init=_INIT,
            rngs=rngs,
        )
        self.layers: Any = (_stack if scan else _list)(config, dtypes, rngs)
        self.norm = _norm(config.hidden_size, config, dtypes, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _head(config, dtypes, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        logits = self.logits(self.hidden(tokens, segments, positions))
        return logits.reshape(*tokens.shape, -1)

    def hidden(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """What the head is given, as rows: (batch * length, hidden)."""
        return self.hidden_and_aside(tokens, segments, positions)[0]

    def hidden_and_aside(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        counted: jax.Array | None = None,
        *,
        watched: bool = False,
    ) -> "tuple[jax.Array, Aside]":
        """Rows for the head, and what else there is to say of them.

        `counted` are the tokens of a mixture's balance, a bool each; None: all. With `watched`
        each layer gives a `Glimpse` of itself.
        """
        length = tokens.shape[1]
        if positions is None:
            positions = _positions(length, segments, self.config)
        angles = Angles(*(rotary_angles(positions, of) for of in self.config.rotations))
        mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None]
        # On a mesh the table is gathered before the rows are, not the rows spread twice.
        table = constrain(self.embed_tokens.embedding[...], "tensor", None)
        x = jnp.take(table, tokens.reshape(-1), axis=0).astype(self.dtype)
        if self.config.scaled_embedding:
            x = x * jnp.asarray(math.sqrt(self.config.hidden_size), self.dtype)
        rows = None if counted is None else counted.reshape(-1)
        x = constrain(x, ROWS, None)
        x, aside = self._through_layers(x, angles, mask, rows, watched)
        return self.norm(x), aside

    def logits(self, rows: jax.Array) -> jax.Array:
        """Rows to float32 logits over the vocabulary."""
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding[...].astype(rows.dtype)
            return jnp.dot(rows, table.T, preferred_element_type=jnp.float32)
        return self.lm_head(rows)

    def untie(self) -> None:
        """Give the head weights of its own, at first those of the embedding."""
        if not self.config.tie_word_embeddings:
            return
        self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
        dtypes = Dtypes(self.norm.dtype, self.embed_tokens.param_dtype)
        self.lm_head = _head(self.config, dtypes, nnx.Rngs(0), self.embed_tokens.embedding[...].T)

    def _through_layers(
        self,
        x: jax.Array,
        angles: "Angles",
        mask: jax.Array | None,
        counted: jax.Array | None,
        watched: bool,
    ) -> "tuple[jax.Array, Aside]":
        def apply(graphdef: nnx.GraphDef[Block], x: jax.Array, layer: nnx.State) -> Any:
            return nnx.merge(graphdef, layer)(x, angles, mask, counted, watched)

        if self.remat:
            apply = jax.checkpoint(apply, static_argnums=0)
        if self.scan:
            graphdef, stack = nnx.split(self.layers)
            x, every = jax.lax.scan(lambda x, layer: apply(graphdef, x, layer), x, stack)
            return x, _together(every)
        apart = []
        for layer in self.layers:
            if self.remat:
                graphdef, state = nnx.split(layer)
                x, aside = apply(graphdef, x, state)
            else:
                x, aside = layer(x, angles, mask, counted, watched)
            apart.append(aside)
        return x, _together(jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *apart))


class Glimpse(NamedTuple):
    """What is seen of a layer, or of all of them, with an axis of layers; the gradient is not.

    Attributes:
      rows: some of what the layer adds to the stream, (rows, hidden), in its type.
      logit: the largest attention logit of each head, float32[heads], of some queries.
    """

    rows: jax.Array
    logit: jax.Array

    def activations(self) -> Activations:
        """Of all layers, as `update` of a guard takes them."""
        return {"layers": jax.vmap(activation_outliers)(self.rows), "attention": self.logit}


class Aside(NamedTuple):
    """What a layer, or all of them, gives beside its rows: of a mixture, and where it is watched.

    `balance_loss` is made from `routed`, which is summed over layers.
    """

    routed: Routed | None
    glimpse: Glimpse | None


def _together(every: Aside) -> Aside:
    """Of all layers, from what each gives along a first axis."""
    return Aside(jax.tree.map(lambda of_layers: of_layers.sum(axis=0), every.routed), every.glimpse)


class Angles(NamedTuple):
    """Rotations of layers that see everything, and of those with a window."""

    far: tuple[jax.Array, jax.Array]
    near: tuple[jax.Array, jax.Array]


class Block(nnx.Module):
    """One decoder layer; it sees `window` tokens, None is all. Gives the rows, and an `Aside`."""

    def __init__(self, config: Config, window: int | None, dtypes: Dtypes, *, rngs: nnx.Rngs):
        names = _NORMS[config.norms]
        self.norms, self.is_near = config.norms, window is not None

        def add(name: str | None) -> None:
            if name is not None:
                setattr(self, name, _norm(config.hidden_size, config, dtypes, rngs))

        add(names.before_attention)
        self.self_attn = Attention(config, window, dtypes, rngs=rngs)
        add(names.after_attention)
        add(names.before_mlp)
        self.mlp: Any = _mixture(config, dtypes, rngs) or MLP(config, dtypes, rngs=rngs)
        add(names.after_mlp)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        mask: jax.Array | None = None,
        counted: jax.Array | None = None,
        watched: bool = False,
    ) -> tuple[jax.Array, Aside]:
        def normed(name: str | None, rows: jax.Array) -> jax.Array:
            return rows if name is None else getattr(self, name)(rows)

        names, routed = _NORMS[self.norms], None
        rotation = angles.near if self.is_near else angles.far
        attended, logit = self.self_attn(normed(names.before_attention, x), rotation, mask, watched)
        attended = normed(names.after_attention, attended)
        x = x + attended
        inner = normed(names.before_mlp, x)
        if isinstance(self.mlp, Mixture):
            made, routed = self.mlp(inner, counted)
        else:
            made = self.mlp(inner)
        made = normed(names.after_mlp, made)
        glimpse = None if logit is None else Glimpse(_some(attended) + _some(made), logit)
        return constrain(x + made, ROWS, None), Aside(routed, glimpse)


def _some(rows: jax.Array) -> jax.Array:
    """An odd stride meets other positions of a sequence in each sequence."""
    return jax.lax.stop_gradient(rows[:: len(rows) // WATCHED_ROWS | 1])


class _Norms(NamedTuple):
    """Hugging Face's names of a block's norms; one name is not the same norm in all of them."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


_NORMS = {
    "before": _Norms("input_layernorm", None, "post_attention_layernorm", None),
    "after": _Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": _Norms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped keys and values (GQA)."""

    def __init__(self, config: Config, window: int | None, dtypes: Dtypes, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.window = None if window is None else (window - 1, 0)  # tokens before and after
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = _linear(config.hidden_size, queries, dtypes, rngs, bias)
        self.k_proj = _linear(config.hidden_size, keys, dtypes, rngs, bias)
        self.v_proj = _linear(config.hidden_size, keys, dtypes, rngs, bias)
        self.o_proj = _linear(queries, config.hidden_size, dtypes, rngs)
        self.joint_norm = config.joint_qk_norm
        if config.qk_norm or config.joint_qk_norm:
            sizes = (queries, keys) if config.joint_qk_norm else (config.head_dim, config.head_dim)
            self.q_norm = _norm(sizes[0], config, dtypes, rngs)
            self.k_norm = _norm(sizes[1], config, dtypes, rngs)
        scalar = config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array | None = None,
        watched: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The rows, and if it is watched the largest logit of each head, of some queries."""
        length = rotation[0].shape[1]

        def heads(rows: jax.Array) -> jax.Array:
            return rows.reshape(-1, length, rows.shape[-1] // self.head_dim, self.head_dim)

        query, key = self.q_proj(x), self.k_proj(x)
        if self.joint_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = heads(query), heads(key)
        if hasattr(self, "q_norm") and not self.joint_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        logit = self._largest_logit(query, key, mask) if watched else None
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            heads(self.v_proj(x)),
            mask=mask,
            scale=self.scale,
            is_causal=True,
            local_window_size=self.window,
            implementation=_implementation(query),
        )
        return self.o_proj(mixed.reshape(x.shape[0], -1)), logit

    def _largest_logit(self, query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
        query, key = jax.lax.stop_gradient((query, key))
        if self.window is not None:
            place = jnp.arange(query.shape[1])
            near = (place[:, None] - place[None] <= self.window[0])[None, None]
            mask = near if mask is None else mask & near
        return attention_logit_max(
            query, key, mask=mask, scale=self.scale, is_causal=True, per_head=True
        )


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, or with another activation. arXiv 2002.05202."""

    def __init__(self, config: Config, dtypes: Dtypes, *, rngs: nnx.Rngs):
        self.is_gelu = config.hidden_act == "gelu_pytorch_tanh"
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, dtypes, rngs)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, dtypes, rngs)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, dtypes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.gate_proj(x)
        gate = jax.nn.gelu(gate, approximate=True) if self.is_gelu else jax.nn.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class OffsetNorm(nnx.RMSNorm):
    """Gemma's: the normed rows times ``1 + scale``, in float32; scale begins at zero."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        rows = x.astype(jnp.float32)
        rows = rows * jax.lax.rsqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + self.epsilon)
        assert self.scale is not None
        scale = 1 + self.scale[...].astype(jnp.float32)
        return (rows * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_angles(positions: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Cosine, sine of ``position * frequency``, each (batch or 1, length, 1, head_dim/2)."""
    angles = positions[:, :, None].astype(jnp.float32) * frequencies(config)[None, None]
    angles = angles[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(config: Config) -> np.ndarray:
    """``theta^(-2i/head_dim)``, scaled as Llama 3.1 does where the config says so.

    Rounded where Hugging Face's code rounds: at position 32,000 one unit in the last place of a
    frequency turns a pair by 0.002. Source of the scaling: `transformers`' `llama3` rope type.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, trained = config.rope_scaling
    turns = trained * frequencies / np.float32(2 * np.pi)  # of a pair, within the trained length
    share = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return (1 - share) * frequencies / np.float32(factor) + share * frequencies


def _positions(length: int, segments: jax.Array | None, config: Config) -> jax.Array:
    """From 0 on in every run of one segment number; (1, length) without segments."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{length} tokens in a sequence, but the model has "
            f"max_position_embeddings={config.max_position_embeddings}: take shorter sequences"
        )
    places = jnp.arange(length)[None]
    if segments is None:
        return places
    begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn pair (i, i + head_dim/2) of each head by its angle: Hugging Face's half-split layout."""
    cosine, sine = rotation
    low, high = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate((low * cosine - high * sine, high * cosine + low * sine), axis=-1)
    return turned.astype(x.dtype)


def _implementation(query: jax.Array) -> Literal["cudnn"] | None:
    """cuDNN's flash attention where it can be had: 16 bits on an NVIDIA GPU."""
    fits = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0
    return "cudnn" if fits and jax.devices()[0].device_kind.startswith("NVIDIA") else None


def next_token_loss(
    graphdef: nnx.GraphDef[Decoder],
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    balance: float = 0.0,
    watched: bool = False,
) -> Callable[[Any, Any, Any], Any]:
    """The loss function ``loss_fn(params, frozen, batch)`` of the decoder behind `graphdef`.

    `params` is what is trained and `frozen` the rest of the model's state (both as
    `split` gives them); `batch` is (batch, length + 1) int32 tokens, or a `Batch`. The loss is
    the mean cross-entropy in nats over `targets(batch)`. With `chunk` the logits of so many
    positions of every sequence are held at a time (`chunked_cross_entropy`), without it all;
    `z_loss` is the weight of ``logsumexp(logits)^2``, and `balance` that of a mixture's
    `train.experts.balance_loss` over the tokens that are no padding. With `watched` the function
    gives (loss, activations), what the guard's `update` takes: outliers of what each layer adds to
    the stream, of `WATCHED_ROWS` rows, and the largest attention logit of each head.
    """

    def loss_fn(params: Any, frozen: Any, batch: Any) -> Any:
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        model = nnx.merge(graphdef, params, frozen)
        if batch.step is not None:
            _drop(model, batch.step)
        wanted = targets(batch)
        segments, positions = (
            x if x is None else x[:, :-1] for x in (batch.segments, batch.positions)
        )
        given = batch.tokens[:, :-1]
        tokens, counted = jnp.maximum(given, 0), given != IGNORED
        rows, (routed, glimpse) = model.hidden_and_aside(
            tokens, segments, positions, counted, watched=watched
        )
        added = 0.0 if routed is None or not balance else balance * balance_loss(routed)
        if chunk is None:
            logits = model.logits(rows).reshape(*wanted.shape, -1)
            loss = cross_entropy(logits, wanted, z_loss)
        else:
            hidden = rows.reshape(*wanted.shape, -1)
            loss = chunked_cross_entropy(model.logits, hidden, wanted, chunk=chunk, z_loss=z_loss)
        return loss + added if glimpse is None else (loss + added, glimpse.activations())

    return loss_fn


def _drop(model: Decoder, step: jax.Array) -> None:
    """Switch dropout on, each adapter's own key folded with the step."""
    fold = functools.partial(jax.random.fold_in, data=step)

    def folded(keys: jax.Array) -> jax.Array:  # one, or one a layer
        return jax.vmap(fold)(jnp.atleast_1d(keys)).reshape(keys.shape)

    nnx.update(model, jax.tree.map(folded, nnx.state(model, nnx.RngKey)))
    model.set_attributes(deterministic=False, raise_if_not_found=False)


def split(model: nnx.Module, trained: Any = nnx.Param) -> tuple[nnx.GraphDef, Any, Any]:
    """Take `model` apart into (graphdef, trained parameters, frozen rest), both as plain dicts."""
    graphdef, params, frozen = nnx.split(model, trained, ...)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


_INIT = nnx.initializers.normal(0.02)


def _list(config: Config, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.List:
    layers = range(config.num_hidden_layers)
    return nnx.List([Block(config, config.window(i), dtypes, rngs=rngs) for i in layers])


def _stack(config: Config, dtypes: Dtypes, rngs: nnx.Rngs) -> Block:
    """All layers as one block whose parameters have a leading axis."""
    windows = {config.window(i) for i in range(config.num_hidden_layers)}
    if len(windows) > 1:
        name = "max_window_layers"
        if config.sliding_window_pattern is not None:
            name = "sliding_window_pattern"
        raise ValueError(
            f"{name}={getattr(config, name)} makes layers differ, and scan=True "
            "needs them alike: use scan=False"
        )
    keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    return nnx.vmap(lambda key: Block(config, config.window(0), dtypes, rngs=nnx.Rngs(key)))(keys)


def _linear(
    inputs: int,
    outputs: int,
    dtypes: Dtypes,
    rngs: nnx.Rngs,
    bias: bool = False,
    init: nnx.Initializer = _INIT,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtypes.compute,
        param_dtype=dtypes.params,
        kernel_init=init,
        rngs=rngs,
    )


def _mixture(config: Config, dtypes: Dtypes, rngs: nnx.Rngs) -> Mixture | None:
    if config.experts is None:
        return None
    types = {"dtype": dtypes.compute, "param_dtype": dtypes.params}
    return Mixture(config.hidden_size, config.experts, **types, init=_INIT, rngs=rngs)


def _head(
    config: Config, dtypes: Dtypes, rngs: nnx.Rngs, kernel: jax.Array | None = None
) -> nnx.Linear:
    """The layer that gives float32 logits, with this kernel or a random one."""
    init = _INIT if kernel is None else lambda *_: kernel
    head = _linear(config.hidden_size, config.vocab_size, dtypes, rngs, init=init)
    head.preferred_element_type = jnp.float32
    return head


def _norm(size: int, config: Config, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.RMSNorm:
    kind, first = (OffsetNorm, 0.0) if config.norm_offset else (nnx.RMSNorm, 1.0)
    return kind(
        size,
        epsilon=config.rms_norm_eps,
        dtype=dtypes.compute,
        param_dtype=dtypes.params,
        scale_init=nnx.initializers.constant(first),
        rngs=rngs,
    )
