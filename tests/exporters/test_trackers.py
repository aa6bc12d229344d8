"""Alerts on trackio, as it keeps them, and without a run. On W&B: the example of it."""

import pytest

from lbw_optax.alerts import Alert, Listeners
from lbw_optax.exporters import trackio_alert, wandb_alert

ALERTS = [
    Alert("info", "Step 3: updates grow again.", 3, {"action": "recover"}),
    Alert("warning", "Step 4: skipped.", 4, {"action": "skip"}),
    Alert("error", "The guard is exhausted.", 9, {}),
]


def test_trackio_keeps_the_alerts(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # before it is imported
    trackio = pytest.importorskip("trackio", reason="needs trackio: pip install trackio")
    trackio.init(project="lbw", name="mine", embed=False)
    for alert in ALERTS:
        trackio_alert(alert)
    trackio.finish()
    kept = trackio.Api().alerts("lbw")
    assert sorted((x["level"], x["title"], x["text"]) for x in kept) == [
        ("error", "lbw_optax: error", "The guard is exhausted."),
        ("info", "lbw_optax: recover", "Step 3: updates grow again."),
        ("warn", "lbw_optax: skip", "Step 4: skipped."),
    ]


@pytest.mark.parametrize("function", [trackio_alert, wandb_alert])
def test_without_a_run_it_is_a_warning_once(function, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    listeners = Listeners("on_event", function)
    for _ in range(3):
        listeners(ALERTS[1])
    (warning,) = [r.getMessage() for r in caplog.records if "on_event" in r.getMessage()]
    assert "init() before" in warning or "ModuleNotFoundError" in warning
