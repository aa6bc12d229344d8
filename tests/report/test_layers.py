"""The layers over time: against a maximum by hand, read back from the picture."""

import html
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from lbw_optax.exporters import MetricsLog
from lbw_optax.report import heat, layers, reading, report

PEAKS = 4 * np.exp(np.random.default_rng(0).random((60, 5)) * 5)


def written(place):
    """Steps 1 to 40, a rollback to 30, and 31 to 50; a layer is not finite once."""
    made = [*range(1, 41), *range(31, 51)]
    with MetricsLog(place / "log.jsonl") as log:
        for step, row in zip(made, PEAKS, strict=True):
            row = np.where(np.arange(5) == 3, np.nan, row) if step == 5 else row
            log(step, {"loss": 2.0, "activation_peak": 9.0, "activation_peaks": row})
    return place


def test_each_cell_is_the_largest_of_what_was_kept(tmp_path):
    (found,) = layers.maps(reading.read(written(tmp_path)), (1.0, 51.0), columns=5)
    stays = np.concatenate([PEAKS[:30], PEAKS[40:]])
    expected = np.stack([part.max(0) for part in np.split(stays, 5)])
    expected[0, 3] = np.inf
    np.testing.assert_allclose(found.peak, expected, rtol=1e-12)
    np.testing.assert_allclose(found.edges, [1, 11, 21, 31, 41, 51])


def test_the_picture_has_the_shade_of_each_cell(tmp_path):
    run = reading.read(written(tmp_path))
    (found,) = layers.maps(run, (1.0, 50.0))
    page = report([tmp_path], None).read_text(encoding="utf-8")
    drawn = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", page))
    drawing = ElementTree.fromstring(drawn[html.escape(layers.TITLE)])
    area = np.zeros(5)
    for path in drawing.iter("path"):
        if path.get("class") == "heat":
            for x, y, end in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", path.get("d")):
                row = int((heat.TOP + 5 * heat.ROW - float(y)) // heat.ROW)
                area[row] += float(path.get("opacity")) * (float(end) - float(x))
    expected = (layers.level(found.peak) / heat.LEVELS).sum(0) * 898 / len(found.peak)
    np.testing.assert_allclose(area, expected, rtol=2e-3)
    first, last = found.peak[[0, -1]].argmax(1)
    assert re.search(f"layer {first} with .* layer {last} with", drawing.get("aria-label"))
    assert "Peak of the activations: max over RMS of the farthest layer" in drawn


def test_a_run_that_was_not_watched_has_no_such_picture(tmp_path):
    """Its guard says 0 of what it was never told."""
    lines = [
        {"step": i, "loss": 2.0, "activation_peak": 0.0, "attention_logit": 0.0} for i in (1, 2)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = report([tmp_path], None).read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == ["Loss"]


@pytest.mark.parametrize("count", [1, 5, 48, 130])
def test_no_number_of_layers_makes_it_high(count, tmp_path):
    line = {"step": 1, "loss": 2.0, "activation_peaks": [5.0] * count}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    page = report([tmp_path], None).read_text(encoding="utf-8")
    drawn = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", page))
    drawing = ElementTree.fromstring(drawn[html.escape(layers.TITLE)])
    height = float(drawing.get("viewBox").split()[3])
    assert height <= layers.HIGHEST + heat.TOP + 22
    labels = [x.text for x in drawing.iter("text") if x.get("class") == "tick end"]
    assert len(labels) == min(count, math.ceil(count / -(-count // layers.LABELS)))
