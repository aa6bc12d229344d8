"""A Flax NNX decoder with the Qwen2/Llama block, under Hugging Face's names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

IGNORED = -1
"""A target with this value is padding: it has no loss and no weight."""


@dataclass(frozen=True)
class Config:
    """Shape of a decoder; the fields are those of a Hugging Face Qwen2/Llama `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    attention_bias: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs")


PRESETS = {
    "tiny": Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
}


class Decoder(nnx.Module):
    """Token ids of shape (batch, length) to float32 logits of shape (batch, length, vocabulary).

    Block: ``x += attention(norm(x)); x += down(silu(gate(n)) * up(n)), n = norm(x)``.
    Inside, x is rows, (batch * length, hidden): XLA's CPU backend takes the products of a
    training step up to twice as fast in rank 2 as in rank 3, above all those of LoRA.

    >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 512)

    Source: Qwen2 Technical Report, arXiv 2407.10671; Llama, arXiv 2302.13971.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=_INIT, rngs=rngs
        )
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_tokens(tokens.reshape(-1))
        rotation = rotary_angles(tokens.shape[1], self.config)
        for layer in self.layers:
            x = layer(x, rotation)
        x = self.norm(x)
        head = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(x).astype(jnp.float32).reshape(*tokens.shape, -1)


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.input_layernorm = _norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped keys and values (GQA)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = _linear(config.hidden_size, queries, rngs, bias)
        self.k_proj = _linear(config.hidden_size, keys, rngs, bias)
        self.v_proj = _linear(config.hidden_size, keys, rngs, bias)
        self.o_proj = _linear(queries, config.hidden_size, rngs)

    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
        length = rotation[0].shape[1]

        def heads(rows: jax.Array) -> jax.Array:
            return rows.reshape(-1, length, rows.shape[-1] // self.head_dim, self.head_dim)

        query = rotate(heads(self.q_proj(x)), rotation)
        key = rotate(heads(self.k_proj(x)), rotation)
        value = heads(self.v_proj(x))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.reshape(x.shape[0], -1))


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``. Source: arXiv 2002.05202."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, rngs)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, rngs)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_angles(length: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """Cosine, sine of ``position * theta^(-2i/head_dim)``, each (1, length, 1, head_dim/2)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), config.rope_theta**-exponent)
    angles = angles[None, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn pair (i, i + head_dim/2) of each head by its angle: Hugging Face's half-split layout."""
    cosine, sine = rotation
    low, high = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate((low * cosine - high * sine, high * cosine + low * sine), axis=-1)
    return turned.astype(x.dtype)


def next_token_loss(graphdef: nnx.GraphDef[Decoder]) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """The loss function ``loss_fn(params, frozen, tokens)`` of the decoder behind `graphdef`.

    `params` is what is trained and `frozen` the rest of the model's state (both as
    `split` gives them); `tokens` is (batch, length + 1) int32. The loss is the mean
    cross-entropy in nats over the targets ``tokens[:, 1:]`` that are not `IGNORED`.
    """

    def loss_fn(params: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, frozen)
        return cross_entropy(model(jnp.maximum(tokens[:, :-1], 0)), tokens[:, 1:])

    return loss_fn


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of ``logsumexp(logits) - logits[target]`` over targets that are not `IGNORED`."""
    counted = targets != IGNORED
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(counted, losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def split(model: nnx.Module, trained: Any = nnx.Param) -> tuple[nnx.GraphDef, Any, Any]:
    """Take `model` apart into (graphdef, trained parameters, frozen rest), both as plain dicts."""
    graphdef, params, frozen = nnx.split(model, trained, ...)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


_INIT = nnx.initializers.normal(0.02)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = False) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=_INIT, rngs=rngs)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
