"""Every example runs, is short, and prints what it is there to show."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment, free_port

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {
    "adopt_midway": [],
    "any_loop": ["orbax"],
    "equinox_mlp": ["equinox"],
    "flax_linen": ["flax"],
    "flax_nnx": ["flax"],
    "log_to_wandb": ["wandb"],
    "own_checkpoints": ["orbax"],
    "several_hosts": ["orbax"],
}
# A third of what the bare optimizer ends at, at such a rate.
HELD = 0.1


@pytest.fixture
def said(request, monkeypatch, tmp_path, capfd):
    """What the example prints last. Its temporary files lie in the test's folder."""
    name = request.param
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install --group examples")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capfd.readouterr().out.splitlines()[-1]


def test_every_example_is_tested_and_shown():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    pages = (EXAMPLES.parent / "docs" / f"{page}.md" for page in ("recipes", "several-hosts"))
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert names == set(NEEDS)
    assert all(f"../examples/{name}.py" in shown for name in names)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("said", ["flax_nnx", "flax_linen", "equinox_mlp"], indirect=True)
def test_a_rate_that_is_too_high_is_held(said):
    loss, scale = map(float, re.findall(r"[\d.]+", said))
    assert loss < HELD
    assert 0.001 <= scale < 0.5


@pytest.mark.parametrize("said", ["adopt_midway"], indirect=True)
def test_the_guard_is_added_and_taken_away(said):
    before, after = map(float, re.findall(r"\d\.\d+", said))
    assert after < before
    assert said.endswith("moments kept: True; back: True")


@pytest.mark.parametrize("said", ["any_loop"], indirect=True)
def test_a_broken_state_is_left_behind(said, tmp_path):
    assert said == "step 100, healthy: True, parameters finite: True"
    (events,) = tmp_path.rglob("events.jsonl")
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    found = {line["action"]: line["signal"] for line in lines}
    assert found["skip"] == "nonfinite_gradients"
    assert found["rollback"] == "parameters"


@pytest.mark.parametrize("said", ["own_checkpoints"], indirect=True)
def test_a_restored_run_is_the_same_run(said):
    assert said.endswith("True")


@pytest.mark.parametrize("said", ["log_to_wandb"], indirect=True)
def test_an_intervention_reaches_the_log(said, tmp_path):
    assert "skip at 42" in said
    (path,) = tmp_path.rglob("run-*.wandb")
    content = path.read_bytes()
    assert b"Step 42: skipped, because gradients are not finite." in content  # the alert
    assert b"guard/scale" in content


@pytest.mark.slow
@pytest.mark.process
def test_four_processes_take_the_same_decisions():
    """What it prints is on the page; the last bits of the weights are this machine's."""
    pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "several_hosts.py"), str(free_port())],
        env=environment(JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    said = dict(re.findall(r"process (\d): (.*? ends as \w{16})", ran.stdout))
    assert sorted(said) == ["0", "1", "2", "3"]
    assert len(set(said.values())) == 1
    page = (EXAMPLES.parent / "docs" / "several-hosts.md").read_text(encoding="utf-8")
    told, _, _ = said["0"].partition("ends as")
    assert "1 skipped" in told
    assert page.count(told) == 4
