"""The law's behaviour against stored numbers: whoever changes it must say so."""

import json

import jax
import numpy as np
import pytest
from golden import make_law
from support import slowly

from lbw_optax.law import control

GOLDEN = np.load(make_law.FILE)
STATED = json.loads(make_law.FILE.with_suffix(".json").read_text())
CHANGED = (
    "the law's behaviour has changed: raise LAW in lbw_optax/law/control.py, run the tables again, "
    "and write the golden numbers with python tests/golden/make_law.py"
)
SIGNALS = {name: GOLDEN[f"signals/{name}"] for name in make_law.SIGNALS}


def differences(found: dict[str, np.ndarray]) -> dict[str, list[str]]:
    return make_law.differences(found, GOLDEN, STATED["runs"])


def test_the_constants_are_the_stated_ones():
    stated = {"law": STATED["law"], **STATED["constants"]}
    assert {"law": control.LAW, **make_law.constants()} == stated, CHANGED


def test_the_decisions_are_the_stored_ones():
    assert differences(make_law.outputs(SIGNALS)) == {}, CHANGED


@pytest.mark.parametrize(
    "name", ["CEILING", "JUMP", *slowly("SET_POINT", "GROWTH", "CUT", "FIRST_STEP")]
)
def test_one_per_cent_of_a_constant_does_not_pass(name, monkeypatch):
    """Or else the comparison above would prove less than it seems to."""
    monkeypatch.setattr(control, name, 1.01 * getattr(control, name))
    jax.clear_caches()
    found = make_law.outputs(SIGNALS)
    monkeypatch.undo()
    jax.clear_caches()
    assert differences(found)


def test_other_numbers_under_the_same_name_need_a_reason(tmp_path, capsys):
    file, about = tmp_path / "law.npz", tmp_path / "law.json"
    about.write_text(json.dumps(STATED))
    np.savez(file, **{**GOLDEN, "outputs/skip": ~GOLDEN["outputs/skip"]})
    with pytest.raises(SystemExit) as stopped:
        make_law.main([], file)
    assert stopped.value.code == 2
    assert "raise LAW, or --same-law" in capsys.readouterr().err
    make_law.main(["--same-law", "it was never landed"], file)
    reasons = [*STATED.get("same_law", []), "it was never landed"]
    assert json.loads(about.read_text()) == STATED | {"same_law": reasons}
    assert make_law.differences(make_law.outputs(SIGNALS), np.load(file), STATED["runs"]) == {}
