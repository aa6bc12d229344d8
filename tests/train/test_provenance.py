"""Provenance names the commit, the libraries and the machine, and no private host."""

import json
import platform
import subprocess
from pathlib import Path

import jax

from train import provenance

ROOT = Path(provenance.__file__).resolve().parent.parent


def test_commit_and_versions_are_those_of_this_process():
    facts = provenance.provenance()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert facts["commit"] == (head.stdout.strip() or None)
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["versions"]["python"] == platform.python_version()


def test_is_plain_json_without_the_host_name():
    text = json.dumps(provenance.provenance())
    assert (platform.node() or "no host name") not in text


def test_a_changed_source_file_makes_the_tree_dirty(tmp_path, monkeypatch):
    for command in (["init", "-q"], ["add", "code.py"], _commit("first")):
        (tmp_path / "code.py").write_text("x = 1\n")
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert provenance._dirty() is False
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert provenance._dirty() is False
    (tmp_path / "code.py").write_text("x = 2\n")
    assert provenance._dirty() is True


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert provenance._git("rev-parse", "HEAD") is None
    assert provenance._dirty() is None


def _commit(message):
    return ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", message]
