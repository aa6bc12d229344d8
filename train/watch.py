"""What is seen of a run while it runs: log, bar, speed and audit, a step late."""

import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Self

import jax

import lbw_optax
from lbw_optax.alerts import Alert
from lbw_optax.exporters import PrometheusFile, Webhook
from lbw_optax.orders import Orders
from lbw_optax.rollback.manager import Rollback
from lbw_optax.rollback.tiers import Tiers
from train import estimate, recipes
from train.logs import Logs
from train.options import Options, as_json
from train.progress import Progress
from train.speed import Speed

AUDIT_EVERY = 50
"""Steps; the guard's ring holds 64. So often alerts are sent, and Prometheus's file is replaced."""
TIMED_STEPS, TIMED_SECONDS = 8, 3.0
"""At least so much is timed, or a third of the run, before the time that is left is told."""
COPIES = (
    *("snapshot_every", "step_seconds", "copy_seconds", "overhead"),
    *("device_bytes", "host_bytes", "disk_bytes"),
)
"""What is logged of the copies of the state, under names with "rollback_" before them."""
LISTS, LISTS_EVERY = ("gradient_log2", "activation_peaks"), 10
"""Many numbers, which move slowly: they are logged every so many steps."""


class _Step(NamedTuple):
    number: int
    metrics: dict[str, jax.Array]
    seen: dict[str, float]


class Watch:
    """Shows and logs each step when the next one has been dispatched, so that nothing waits.

    Args:
      options: of the run.
      cost: of one step, for tokens a second and the share of the device's peak.
      evaluated: tokens that the whole run predicts in evaluations, for the time that is left.
    """

    def __init__(self, options: Options, cost: estimate.Estimate, evaluated: int = 0):
        devices = jax.devices()
        peak = estimate.peak_flops(devices[0]) * len(devices)
        self._speed = Speed(tokens=cost.tokens, flops=cost.flops, peak=peak)
        self._logs = Logs(options.out, options.track, as_json(options))
        self._webhook, self._prometheus = receivers(options)
        self._audit = lbw_optax.AuditLog(options.out / "events.jsonl", on_event=self._webhook or ())
        self._orders = Orders(options.out)
        self._progress = Progress(options.steps)
        self._progress.start(options.out.name, options.steps)
        self._governs = options.optimizer.startswith("lbw")
        self._rate = recipes.newest_rate(options)
        self._time_left = estimate.TimeLeft(options, cost, evaluated)
        self._steps, self._timed, self._is_told = options.steps, list[float](), False
        self._before: _Step | None = None
        self._copies: Tiers | None = None

    def step(self, number: int, metrics: dict[str, jax.Array], opt_state: Any) -> None:
        """Take note of update `number`, from 1; `opt_state` is the state after it."""
        self._show()
        whole = number % LISTS_EVERY == 0
        kept = {name: x for name, x in metrics.items() if whole or not name.startswith(LISTS)}
        kept["learning_rate"] = self._rate(opt_state)
        seen = {"time": round(time.time(), 3), **self._speed.step()}
        self._before = _Step(number, kept, seen)
        self._tell_time(number, seen)
        if number % AUDIT_EVERY == 0:
            self.audit(number, opt_state)

    def audit(self, number: int, opt_state: Any) -> None:
        """Write the guard's interventions so far, and stop if it can do no more."""
        self._audit.record(number, opt_state)
        if self._governs:
            lbw_optax.check(opt_state)

    def obey(self, number: int, state: Any, rollback: lbw_optax.RollbackManager) -> Any:
        """The state after update `number` and after what `lbw-watch` has ordered since."""
        try:
            return self._orders.obey(state, number, log=self._audit, rollbacks=rollback)
        except ValueError as error:  # the optimizer has no guard
            self.note(f"the order is not obeyed: {error}")
            return state

    def evaluated(self, name: str, perplexity: float) -> None:
        """Add a measurement to the newest step; the time that it took is no step's."""
        if self._before is not None:
            self._before.seen[name] = perplexity
            self.note(f"step {self._before.number}: {name.replace('_', ' ')} {perplexity:.3f}")
        self._speed.pause()

    def batches(self, name: str, batches: Collection[Any]) -> Iterator[Any]:
        """Give the batches of an evaluation one by one, and show how many are done."""
        return self._progress.batches(name, batches)

    def _tell_time(self, number: int, seen: dict[str, float]) -> None:
        """Once, when enough steps have been timed, say how long the run will take."""
        if self._is_told or "tokens_per_second" not in seen:
            return
        self._timed.append(seen["time"])
        enough = self._timed[-1] - self._timed[0] >= TIMED_SECONDS or 3 * number >= self._steps
        if enough and len(self._timed) >= TIMED_STEPS:
            self._is_told = True
            self.note(self._time_left.describe(number, seen["tokens_per_second"]))

    def move(self, steps: int) -> None:
        """The run goes on so many steps further on, or back."""
        self._show()
        self._speed.pause()
        self._progress.move(steps)

    def rolled_back(self, event: Rollback) -> None:
        """The run goes on from an earlier step."""
        self.move(event.to_step - event.from_step)
        self.note(
            f"rolled back from step {event.from_step} to {event.to_step} ({event.reason}, "
            f"from {event.tier}); {event.skipped_batches} batches are left out"
        )

    def copies(self, tiers: Tiers) -> None:
        """Tell and log where copies of the state are kept and how often, when that changes."""
        told, self._copies = self._copies, tiers
        if told is not None and told.snapshot_every == tiers.snapshot_every:
            return
        self.note(str(tiers))
        if self._before is not None:
            numbers = {name: getattr(tiers, name) for name in COPIES}
            known = {f"rollback_{name}": x for name, x in numbers.items() if x is not None}
            self._before.seen.update(known)

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self._progress.note(line)

    def _show(self) -> None:
        if self._before is None:
            return
        number, metrics, seen = self._before
        self._before = None
        values = {**jax.device_get(metrics), **seen}
        self._logs.write(number, values)
        is_due = number % AUDIT_EVERY == 0 or number == self._steps
        if self._prometheus is not None and is_due:
            self._prometheus(number, values)
        self._progress.step(number - 1, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        last = self._before.number if self._before is not None else 0
        self._show()
        self._logs.__exit__(*error)
        self._progress.__exit__(*error)
        self._audit.close()
        if self._webhook is not None:
            if isinstance(ended := error[1], lbw_optax.GuardExhausted):
                self._webhook(Alert("error", str(ended), last, {"action": "exhausted"}))
            self._webhook.close()


def receivers(options: Options) -> tuple[Webhook | None, PrometheusFile | None]:
    """Who is told of alerts and of metrics outside of the run's directory.

    Raises:
      ValueError: for a URL that is none, and a file that Prometheus would not read.
    """
    webhook, prometheus = None, None
    if options.alert_webhook is not None:
        try:
            webhook = Webhook(options.alert_webhook)
        except ValueError as error:
            raise ValueError(f"--alert-webhook: {error}") from error
    if options.prometheus is not None:
        try:
            prometheus = PrometheusFile(options.prometheus, {"run": options.out.name})
        except ValueError as error:
            raise ValueError(f"--prometheus: {error}") from error
    return webhook, prometheus
