"""The metrics under the names that dashboards know them by: one list, and it stays as it is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Name(NamedTuple):
    """How a metric is shown.

    Attributes:
      group: "loss", "guard" (what it decides), "signals" (what it sees) or "run".
      help: what it is, in a line.
      is_counter: whether it counts up from the start of the run.
    """

    group: str
    help: str
    is_counter: bool = False


NAMES = {
    "loss": Name("loss", "The loss, as it was passed"),
    "scale": Name("guard", "Factor of the updates"),
    "mode": Name("guard", "0: the guard governs; 1: it only observes"),
    "regime": Name("guard", "0 nominal, 1 stressed, 2 unstable, 3 recovering"),
    "skips": Name("guard", "Skipped steps", is_counter=True),
    "skips_in_a_row": Name("guard", "Skipped steps in a row, up to now"),
    "events": Name("guard", "Interventions", is_counter=True),
    "outstanding": Name("guard", "Interventions that are not earned back"),
    "exhausted": Name("guard", "1: the guard has used up what it may do"),
    "rollback_asked": Name("guard", "Reason of the rollback that is asked for, 0 for none"),
    "gradient_norm": Name("signals", "Length of the gradients"),
    "update_norm": Name("signals", "Length of the step"),
    "parameter_norm": Name("signals", "Length of the parameters"),
    "relative_step": Name("signals", "Length of the step over that of the parameters"),
    "overshoot": Name("signals", "Cosine of the gradients with the way of late"),
    "overshoot_level": Name("signals", "Mean overshoot in standard deviations, held at 1"),
    "loss_trend": Name("signals", "Fast less slow mean of the loss, in first losses"),
    "nonfinite_gradients": Name("signals", "Leaves of the gradients with a NaN or an Inf"),
    "nonfinite_updates": Name("signals", "Leaves of the updates with a NaN or an Inf"),
    "nonfinite_loss": Name("signals", "1: the loss is not finite"),
    "updates_broken": Name("signals", "1: the updates jumped beyond any step of an optimizer"),
    "parameters_broken": Name("signals", "1: the parameters are not finite, or jumped"),
    "age": Name("signals", "Steps since the law began"),
    "rejected_share": Name("signals", "Share of the last 1000 steps that were rejected"),
    "frozen_groups": Name("guard", "Groups of leaves that stay as they are"),
    "broken_constraints": Name("guard", "Own signals that jump and constraints that do not hold"),
    "policy_share": Name("guard", "Share of the law's step that a policy of one's own left"),
    "risk_10": Name("signals", "Probability that the run diverges within 10 steps"),
    "risk_50": Name("signals", "Probability that the run diverges within 50 steps"),
    "hard_batch": Name("signals", "If the step stands out: probability that it is gone by itself"),
    "unstable_dynamics": Name("signals", "If the step stands out: that steps are too long"),
    "broken_state": Name("signals", "If the step stands out: that state or numbers are broken"),
    "activation_outlier_share": Name("signals", "Largest share of outliers of a layer"),
    "activation_peak": Name("signals", "Largest max over RMS of a layer's activations"),
    "activation_layer": Name("signals", "Layer that is farthest out, from 0; -1: none was given"),
    "activation_spread": Name("signals", "Standard deviation of the layers' log peaks"),
    "activation_drift": Name("signals", "The spread less its slow mean, in standard deviations"),
    "attention_logit": Name("signals", "Largest attention logit"),
    "nonfinite_activations": Name("signals", "Layers with a NaN or an Inf in their activations"),
    "qk_clips": Name("run", "Scaled layers, or heads that share a key", is_counter=True),
    "activation_peaks": Name("signals", "Max over RMS of the activations of layer k"),
    "stable_ranks": Name("signals", "Least stable rank of the matrices of layer k"),
    "gradient_log2": Name("signals", "Sampled gradient coordinates from 2^k to 2^(k+2)"),
    "learning_rate": Name("run", "As the schedule has it"),
    "tokens_per_second": Name("run", "Of the training step"),
    "mfu": Name("run", "Share of the device's peak"),
}
"""Every metric of `lbw_optax.metrics`, and what a loop may log beside them."""
LISTS = ("gradient_log2", "activation_peaks", "stable_ranks")
"""Those of several numbers: of a histogram's buckets, and of layers."""


class Parts(NamedTuple):
    """A metric's name, taken apart.

    Attributes:
      guard: path of the guard in the state, "" where there is one guard.
      base: key of `NAMES`; "" for a name that is none of ours.
      bucket: of a histogram, or layer, "" elsewhere.
    """

    guard: str
    base: str
    bucket: str


def tag(name: str) -> str:
    """A metric's name in its group, as TensorBoard, W&B and trackio show it.

    A name that is none of ours stays as it is. A test loss or perplexity goes beside the loss.

    >>> tag("loss"), tag("scale"), tag("gradient_log2/-4"), tag("rollback_host_bytes")
    ('loss/train', 'guard/scale', 'signals/gradient_log2/-4', 'run/rollback_host_bytes')
    >>> tag("inner_states/head/inner_state/scale"), tag("eval/accuracy"), tag("test_perplexity")
    ('guard/inner_states/head/inner_state/scale', 'eval/accuracy', 'loss/test_perplexity')
    """
    guard, base, _ = parts(name)
    if base == "loss":
        return "/".join(part for part in ("loss", guard, "train") if part)
    if base:
        return f"{NAMES[base].group}/{name}"
    if "/" not in name and name.endswith("_perplexity"):
        return f"loss/{name}"
    return f"run/{name}" if name.startswith("rollback_") else name


def grouped(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python numbers under their `tag`. Waits for the device.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> state = lbw_optax.adamw(1e-3).init(jnp.ones(3))
      >>> found = grouped(lbw_optax.metrics(state) | {"learning_rate": 1e-3})
      >>> found["guard/skips"], found["run/learning_rate"]
      (0, 0.001)
    """
    return {tag(name): x for name, x in plain(metrics).items()}


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python numbers, an array of `LISTS` as one for each element. Waits for the device.

    Raises:
      TypeError: if another is no scalar number.
    """
    read: dict[str, np.ndarray] = {}
    for name, x in jax.device_get(dict(metrics)).items():
        if name.rpartition("/")[2] in LISTS and np.ndim(x) == 1:
            read |= {f"{name}/{i}": np.asarray(element) for i, element in enumerate(x)}
        else:
            read[name] = np.asarray(x)
    for name, x in read.items():
        if x.ndim or not isinstance(x.item(), int | float):
            raise TypeError(f"The metric {name!r} must be a single number, got {x!r}.")
    return {name: x.item() for name, x in read.items()}


def parts(name: str) -> Parts:
    """A name taken apart.

    >>> parts("inner_states/head/inner_state/gradient_log2/-4")
    Parts(guard='inner_states/head/inner_state', base='gradient_log2', bucket='-4')
    """
    way, _, last = name.rpartition("/")
    guard, _, histogram = way.rpartition("/")
    if histogram in LISTS:
        return Parts(guard, histogram, last)
    return Parts(way, last, "") if last in NAMES else Parts("", "", "")
