"""The text file for Prometheus, read by Prometheus's own parser."""

import math
import os
import stat

import jax.numpy as jnp
import optax
import pytest

import lbw_optax
from lbw_optax.exporters import PrometheusFile

parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus_client")


def samples(path):
    """Each sample by its name and labels; the parser refuses what is no text format."""
    families = list(parser.text_string_to_metric_families(path.read_text(encoding="utf-8")))
    assert len({family.name for family in families}) == len(families)
    read = [sample for family in families for sample in family.samples]
    found = {(x.name, *sorted(x.labels.items())): x.value for x in read}
    assert len(found) == len(read)
    return found


def test_every_metric_arrives_under_its_name(tmp_path):
    metrics = lbw_optax.metrics(lbw_optax.adamw(1e-3).init(jnp.ones(3)))
    PrometheusFile(tmp_path / "a.prom")(12, metrics)
    found = samples(tmp_path / "a.prom")
    assert len(found) == len(metrics) + 1
    assert found[("lbw_step",)] == 12
    assert found[("lbw_scale",)] == pytest.approx(0.01)
    assert found["lbw_gradient_log2", ("k", "-24")] == 0
    counters = {name[0] for name in found if name[0].endswith("_total")}
    assert counters == {"lbw_skips_total", "lbw_events_total"}


def test_several_guards_are_told_apart_by_a_label(tmp_path):
    tx = optax.partition(
        {"a": lbw_optax.adamw(0.1), "b": lbw_optax.adamw(0.1)}, {"x": "a", "y": "b"}
    )
    state = tx.init({"x": jnp.ones(2), "y": jnp.ones(2)})
    PrometheusFile(tmp_path / "a.prom", {"run": "mine"})(1, lbw_optax.metrics(state))
    found = samples(tmp_path / "a.prom")
    guards = [dict(labels)["guard"] for name, *labels in found if name == "lbw_scale"]
    assert guards == ["inner_states/a/inner_state", "inner_states/b/inner_state"]


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, 1e-300, True])
def test_a_number_comes_back_as_it_was(tmp_path, x):
    PrometheusFile(tmp_path / "a.prom")(1, {"loss": x})
    assert samples(tmp_path / "a.prom")["lbw_loss",] == pytest.approx(float(x), nan_ok=True, rel=0)


def test_labels_and_names_that_need_care(tmp_path):
    label = 'a "run"\\of\nmine'
    PrometheusFile(tmp_path / "a.prom", {"run": label})(
        1, {"eval/accuracy": 0.5, "eval_accuracy": 1}
    )
    assert samples(tmp_path / "a.prom") == {
        ("lbw_step", ("run", label)): 1,
        ("lbw_eval_accuracy", ("run", label)): 1,
    }


def test_the_file_is_replaced_as_a_whole_and_readable_for_others(tmp_path):
    """A reader that has it open reads on in the old one; nothing else is left in the directory."""
    path = tmp_path / "a.prom"
    write = PrometheusFile(path)
    write(1, {"loss": 1.0})
    with path.open() as reader:
        write(2, {"loss": 2.0})
        assert "lbw_loss 1.0" in reader.read()
    assert samples(path)["lbw_loss",] == 2
    assert os.listdir(tmp_path) == ["a.prom"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_directory_that_is_gone_is_a_warning_once_and_comes_back(tmp_path, caplog):
    folder = tmp_path / "collector"
    folder.mkdir()
    write = PrometheusFile(folder / "a.prom")
    folder.rename(tmp_path / "elsewhere")
    for step in range(3):
        write(step, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Training goes on" in caplog.text
    folder.mkdir()
    write(3, {"loss": 1.0})
    assert samples(folder / "a.prom")["lbw_step",] == 3


@pytest.mark.parametrize(
    ("name", "labels", "said"),
    [
        ("a.txt", {}, r"reads \*\.prom"),
        ("missing/a.prom", {}, "directory that exists"),
        ("a.prom", {"my run": "1"}, "'my run' can be no label"),
        ("a.prom", {"guard": "1"}, "'guard' can be no label"),
    ],
)
def test_what_the_collector_would_not_read_is_refused(tmp_path, name, labels, said):
    with pytest.raises(ValueError, match=said):
        PrometheusFile(tmp_path / name, labels)
