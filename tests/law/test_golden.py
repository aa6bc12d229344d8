"""The law's behaviour against stored numbers: whoever changes it must say so."""

import json

import jax
import numpy as np
import pytest
from golden import make_law

from lbw_optax.law import control

GOLDEN = np.load(make_law.FILE)
STATED = json.loads(make_law.FILE.with_suffix(".json").read_text())
TOLERANCE = {"log_scale": 5e-4, "log_applied": 5e-4, "outstanding": 1e-3, "loss_excess": 2e-3}
"""Absolute; all else is equal. Float32 on another processor or jax differs by less than a tenth."""
CHANGED = (
    "the law's behaviour has changed: raise LAW in lbw_optax/law/control.py, run the tables again, "
    "and write the golden numbers with python tests/golden/make_law.py"
)
SIGNALS = {name: GOLDEN[f"signals/{name}"] for name in make_law.SIGNALS}


def differences(found: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """The runs in which an output is not the stored one, by output."""
    differ: dict[str, list[str]] = {}
    for name, x in found.items():
        stored = GOLDEN[f"outputs/{name}"]
        off = np.abs(x.astype(float) - stored.astype(float)) > TOLERANCE.get(name, 0)
        runs = [STATED["runs"][i] for i in np.flatnonzero(off.any(axis=1))]
        if runs:
            differ[name] = runs
    return differ


def test_the_constants_are_the_stated_ones():
    stated = {"law": STATED["law"], **STATED["constants"]}
    assert {"law": control.LAW, **make_law.constants()} == stated, CHANGED


def test_the_decisions_are_the_stored_ones():
    assert differences(make_law.outputs(SIGNALS)) == {}, CHANGED


@pytest.mark.parametrize("name", ["SET_POINT", "GROWTH", "CUT", "CEILING", "JUMP", "FIRST_STEP"])
def test_one_per_cent_of_a_constant_does_not_pass(name, monkeypatch):
    """Or else the comparison above would prove less than it seems to."""
    monkeypatch.setattr(control, name, 1.01 * getattr(control, name))
    jax.clear_caches()
    found = make_law.outputs(SIGNALS)
    monkeypatch.undo()
    jax.clear_caches()
    assert differences(found)
