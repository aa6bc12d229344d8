"""Published rules that a user would pick instead of the guard, as small Optax transformations.

Only what Optax does not have itself: `adaptive_grad_clip`, `clip_by_global_norm` and the
learning-rate-free optimizers come from Optax. Defaults are the published constants.
"""

from benchmarks.peers.adagc import adagc
from benchmarks.peers.skip_spikes import levanter_skip, maxtext_skip
from benchmarks.peers.skip_step import skip_step
from benchmarks.peers.spam import scale_by_spam
from benchmarks.peers.stable_adamw import stable_adamw
from benchmarks.peers.stable_spam import scale_by_stable_spam
from benchmarks.peers.update_clip import clip_by_update_history
from benchmarks.peers.zclip import zclip

__all__ = [
    "adagc",
    "clip_by_update_history",
    "levanter_skip",
    "maxtext_skip",
    "scale_by_spam",
    "scale_by_stable_spam",
    "skip_step",
    "stable_adamw",
    "zclip",
]
