"""The recipes of the page *Your framework*: each runs, and changes three lines at most."""

import re
import runpy
from pathlib import Path

import jax
import loops
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "examples" / "loops"
NEEDS = {
    "with_keras": "keras",
    "with_linen": "flax",
    "with_numpyro": "numpyro",
    "with_scans": "flax",
    "with_tunix": "tunix",
}


def text_of(name):
    return (RECIPES / f"{name}.py").read_text(encoding="utf-8")


def test_every_recipe_is_tested_and_shown():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES.glob("*.py")} == set(NEEDS)
    assert all(f"../examples/loops/{name}.py" in page for name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_a_recipe_changes_three_lines_at_most(name):
    assert 1 <= text_of(name).count("# <--") <= 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the framework's own
@pytest.mark.parametrize("name", NEEDS)
def test_a_recipe_runs_and_is_guarded(name, monkeypatch, capfd):
    loops.needs(NEEDS[name], NEEDS[name])
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with jax.numpy_rank_promotion("allow"):  # of the framework's own layers
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    said = capfd.readouterr().out.splitlines()[-1]
    assert re.search(r"updates at [\d.]+ %", said)
