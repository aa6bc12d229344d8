"""The notebook runs, and shows what it says; the animation is that of its run, and is small."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install --group train")
pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from PIL import Image

from benchmarks import rescue


@pytest.mark.process
def test_the_notebook_shows_a_stress_figure_and_a_rescue(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    document = json.loads(rescue.NOTEBOOK.read_text(encoding="utf-8"))
    found = rescue.run(document)
    # As the text says: the guarded run ends about where it does at the first rate that is too high.
    bare, guarded = np.array(found["bare"]), np.array(found["guarded"])
    assert (guarded[3:] < 1.1 * guarded[3]).all()
    assert {f"{guarded[3:].min():.2f}", f"{guarded[3:].max():.2f}"} == {"0.19", "0.21"}
    assert bare[-1] > 50 * guarded[-1]
    assert f"{bare.min():.2f}" == "0.14"

    (back,) = found["rollback"].history
    assert (back.reason, back.from_step) == ("parameters", 202)
    assert np.isfinite(found["losses"][found["steps"] > 210]).all()
    assert np.isnan(found["alone"][100:]).all()
    outputs = [cell.get("outputs", []) for cell in document["cells"]]
    assert sum(x["output_type"] == "display_data" for cell in outputs for x in cell) == 2

    monkeypatch.setattr(rescue, "FRAMES", 10)
    monkeypatch.setattr(rescue, "HELD", 2)
    rescue.animate(found, tmp_path / "rescue.gif")
    is_twenty_seconds_and_small(tmp_path / "rescue.gif")


def is_twenty_seconds_and_small(path):
    """Equal frames that follow each other are one, which is shown for longer."""
    assert path.stat().st_size < 300_000
    milliseconds = 0
    with Image.open(path) as movie:
        for frame in range(movie.n_frames):
            movie.seek(frame)
            milliseconds += movie.info["duration"]
    assert milliseconds == 1000 * rescue.SECONDS


def test_what_is_committed_is_whole():
    document = json.loads(rescue.NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    is_twenty_seconds_and_small(rescue.GIF)
