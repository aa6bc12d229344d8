"""The documentation names everything public, and no name that does not exist."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import lbw_optax

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PUBLIC = sorted([*lbw_optax.__all__, "RollbackManager"])


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_api(name):
    documented = re.findall(r"^\.\. auto\w+:: (?:lbw_optax\.)?(\w+)$", read("api.md"), re.MULTILINE)
    assert name in documented


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_only_what_exists(page):
    named = set(re.findall(r"\blbw_optax\.([a-zA-Z_]\w*)", page.read_text(encoding="utf-8")))
    unknown = {
        name
        for name in named
        if not hasattr(lbw_optax, name) and importlib.util.find_spec(f"lbw_optax.{name}") is None
    }
    assert not unknown


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [name for name in targets if not (page.parent / name).exists()] == []


def test_the_glossary_has_every_metric_and_no_other():
    state = lbw_optax.adamw(1e-3).init(jnp.ones(3))
    returned = {re.sub(r"/-?\d+$", "/k", name) for name in lbw_optax.metrics(state)}
    assert set(re.findall(r"^\| `([\w/]+)` \|", read("metrics.md"), re.MULTILINE)) == returned


def test_the_law_page_has_every_regime():
    assert re.findall(r"^\| `(\w+)` \|", read("law.md"), re.MULTILINE) == list(lbw_optax.REGIMES)


def test_the_readme_is_short_and_has_one_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert len(re.findall(r"^\| ---", text, re.MULTILINE)) == 1


def test_the_readme_prints_what_it_says():
    """In a process of its own, compiled as a user has it: its last digits are the compiler's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, said = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", text, re.DOTALL).groups()
    usual = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=usual, capture_output=True, text=True, check=True)
    printed = [float(line) for line in ran.stdout.split()]
    # Another jax rounds otherwise, and the last digit with it.
    assert printed == pytest.approx([float(line) for line in said.split()], abs=1.5e-3)


@pytest.mark.parametrize("number", ["26.1", "27.7", "11.0", "of 29"])
def test_a_number_of_the_readme_is_that_of_the_page(number):
    assert number in (ROOT / "README.md").read_text(encoding="utf-8")
    assert number in read("benchmarks.md")


def test_a_star_import_needs_no_orbax():
    code = (
        "import sys; sys.modules['orbax'] = None\n"
        "from lbw_optax import *\n"
        "import lbw_optax\n"
        "print(callable(lbw_guard), 'RollbackManager' in dir(lbw_optax), lbw_optax.__version__)\n"
        "try: lbw_optax.RollbackManager\n"
        "except ImportError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, error = ran.stdout.splitlines()
    assert re.fullmatch(r"True True \d+\.\d+\.\d+", said)
    assert "lbw_optax[rollback]" in error
