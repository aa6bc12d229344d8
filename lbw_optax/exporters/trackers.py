"""Alerts of the guard as alerts of trackio and of W&B: functions for ``on_event``."""

from lbw_optax.alerts import Alert

# What W&B allows.
_LONGEST_TITLE = 63


def trackio_alert(alert: Alert) -> None:
    """An alert on the current run of trackio: in the terminal, the dashboard, and its webhook.

    Raises:
      ImportError: without trackio.
      RuntimeError: before ``trackio.init``. As ``on_event``, either is a warning, once.
    """
    import trackio

    level = {"warning": "warn"}.get(alert.level, alert.level)
    trackio.alert(_title(alert), text=alert.sentence, level=trackio.AlertLevel(level))


def wandb_alert(alert: Alert) -> None:
    """An alert on the current run of W&B, which sends one of a kind in a minute at the most.

    Raises:
      ImportError: without W&B.
      RuntimeError: before ``wandb.init``. As ``on_event``, either is a warning, once.
    """
    import wandb

    if wandb.run is None:
        raise RuntimeError("Call wandb.init() before wandb_alert.")
    level = {"warning": "WARN"}.get(alert.level, alert.level.upper())
    wandb.run.alert(title=_title(alert), text=alert.sentence, level=level)


def _title(alert: Alert) -> str:
    """The same for all of a kind."""
    return f"lbw_optax: {alert.line.get('action', alert.level)}"[:_LONGEST_TITLE]
