"""The names of dashboards: every metric has one, and it stays as it is."""

import json
import os

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import no_room

import lbw_optax
from lbw_optax.exporters import NAMES, MetricsLog, grouped, tag
from lbw_optax.exporters.names import parts
from train import logs


@pytest.fixture(scope="module")
def metrics():
    return lbw_optax.metrics(lbw_optax.adamw(1e-3).init(jnp.ones(3)))


def test_the_list_has_every_metric_and_what_a_loop_logs_beside_them(metrics):
    beside = {"learning_rate", "tokens_per_second", "mfu", "qk_clips"}
    beside |= {"activation_peaks", "stable_ranks"}
    assert set(NAMES) - beside == {parts(name).base for name in metrics}


def test_every_metric_is_in_a_group(metrics):
    groups = {name.partition("/")[0] for name in grouped(metrics)}
    assert groups == {"guard", "loss", "signals"}
    assert len(grouped(metrics)) == len(metrics)


def test_the_regimes_are_those_of_the_law():
    said = NAMES["regime"].help.split(", ")
    assert said == [f"{i} {regime}" for i, regime in enumerate(lbw_optax.REGIMES)]


def test_several_guards_have_the_same_groups():
    tx = optax.partition(
        {"a": lbw_optax.adamw(0.1), "b": lbw_optax.adamw(0.1)}, {"x": "a", "y": "b"}
    )
    found = grouped(lbw_optax.metrics(tx.init({"x": jnp.ones(2), "y": jnp.ones(2)})))
    assert found["guard/inner_states/a/inner_state/scale"] == pytest.approx(0.01)
    assert "loss/inner_states/b/inner_state/train" in found
    assert "signals/inner_states/b/inner_state/gradient_log2/-24" in found


@pytest.mark.parametrize("name", ["accuracy", "eval/accuracy", "scale_of_mine", "my/loss_2"])
def test_a_name_of_somebody_else_stays(name):
    assert tag(name) == name


@pytest.mark.parametrize("x", [np.ones(2), "nominal", None, 1j])
def test_only_numbers_are_logged(x):
    with pytest.raises(TypeError, match="metric 'mine' must be a single number"):
        grouped({"mine": x})


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with MetricsLog(path) as log:
        log(3, {"loss": np.inf, "parameters_broken": np.bool_(True)})
    found = logs.history(tmp_path)
    assert found["step"].tolist() == [1, 3]
    np.testing.assert_array_equal(found["loss"], [2.0, np.nan])


def test_lines_wait_for_room(tmp_path):
    path = tmp_path / "log.jsonl"
    with MetricsLog(path) as log:
        log(1, {"loss": 3.0})
        with no_room(path.stat().st_size + 9):
            with pytest.warns(RuntimeWarning, match=r"log\.jsonl cannot be written .*free space"):
                log(2, {"loss": 2.0})
            log(3, {"loss": 1.0})
            assert logs.history(tmp_path)["step"].tolist() == [1]
        log(4, {"loss": 0.5})
        with no_room(path.stat().st_size), pytest.warns(RuntimeWarning, match="free space"):
            log(5, {"loss": 0.25})
    assert logs.history(tmp_path)["loss"].tolist() == [3.0, 2.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("regime", "name"), [(3.0, "recovering"), (np.nan, None), (-1, None), (99, None)]
)
def test_a_regime_of_any_number_is_a_name_or_null(tmp_path, regime, name):
    with MetricsLog(tmp_path / "log.jsonl") as log:
        log(1, {"regime": regime})
    assert json.loads((tmp_path / "log.jsonl").read_text())["regime"] == name


@pytest.mark.parametrize("step", [None, 1.5, np.nan, "4", True])
def test_a_step_is_an_integer(tmp_path, step):
    with (
        MetricsLog(tmp_path / "log.jsonl") as log,
        pytest.raises(TypeError, match="step of a line in a log is an integer"),
    ):
        log(step, {"loss": 1.0})


@pytest.mark.parametrize("kind", [MetricsLog, lbw_optax.AuditLog])
def test_a_log_is_a_file(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/full"):
        with pytest.raises(ValueError, match="is a pipe or a device: pass the path of a file"):
            kind(path)
