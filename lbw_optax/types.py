"""Names for what Python's own types do not tell apart."""

from typing import Any

from jax.typing import ArrayLike

PyTree = Any
"""Of arrays: parameters, gradients, updates, the state of an optimizer or of a training run."""

Loss = ArrayLike | None
"""A scalar, or None where it is not known."""
