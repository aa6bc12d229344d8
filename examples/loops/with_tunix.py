"""Tunix: two changed lines, marked, beside the imports."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.sft import peft_trainer

from lbw_optax import explain, lbw_guard
from lbw_optax.integrations.tunix import GuardedPeftTrainer


class Model(nnx.Module):
    """Counts: the next token is the last one and one."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.head = nnx.Embed(32, 16, rngs=rngs), nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, tokens, positions, cache, attention_mask):
        return self.head(nnx.relu(self.embed(tokens))), cache


def inputs_of(batch):
    (rows, length), tokens = batch.input_tokens.shape, batch.input_tokens
    return {
        "input_tokens": tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "attention_mask": jnp.ones((rows, length, length), bool),
    }


tokens = np.cumsum(np.ones((4, 12), int), axis=1) % 32
batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))
config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=60)
tx = lbw_guard(optax.adamw(1e-2))  # <-- was optax.adamw(1e-2)
trainer = GuardedPeftTrainer(Model(nnx.Rngs(0)), tx, config)  # <-- was PeftTrainer
trainer.with_gen_model_input_fn(inputs_of).train([batch] * 60)
print(explain(trainer.optimizer.opt_state))
