"""The figure: what is drawn where, and a clear sentence without matplotlib."""

import sys

import numpy as np
import pytest
from matplotlib.image import imread

from lbw_optax.law.events import Event
from train import figure


def event(step, action, after=0.1):
    return Event(0, step, "stressed", "overshoot", 3.0, 0.0, action, 0.2, after)


def curves():
    falling = np.linspace(6, 3, 50)
    scale = np.full(50, 0.1)
    marked = [event(5, "cut"), event(9, "skip"), event(20, "recover")]
    return [
        figure.Curve("AdamW", falling, group="tuned"),
        figure.Curve("AdamW", np.append(falling[:25], [np.nan] * 25), group="100×"),
        figure.Curve("guard", falling, scale, group="tuned"),
        figure.Curve("guard", falling, scale, marked, group="100×"),
    ]


def drawn(draw, curves):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw(axes, curves)
    return axes


def test_a_figure_is_an_image_with_ink(tmp_path):
    path = tmp_path / "runs.png"
    figure.figure({"left": curves(), "right": curves()[:2]}, path)
    image = imread(path)[..., :3]
    assert image.shape[1] > image.shape[0] > 500
    assert 0.005 < np.mean(image < 0.9) < 0.5
    figure.figure({"left": curves()}, path)
    assert imread(path).shape[1] < image.shape[1]


def test_guarded_curves_are_solid_and_groups_share_a_colour():
    axes = drawn(figure._draw_losses, curves())
    dashed = [line.is_dashed() for line in axes.get_lines()]
    assert dashed == [True, True, False, False]
    first, second, third, fourth = (line.get_color() for line in axes.get_lines())
    assert (first, second) == (third, fourth)
    assert first != second
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["AdamW tuned", "AdamW 100×", "guard tuned", "guard 100×"]


@pytest.mark.parametrize(("worst", "scale"), [(9.0, "linear"), (90.0, "log"), (-1.0, "linear")])
def test_the_loss_axis_is_logarithmic_only_for_a_wide_range(worst, scale):
    runs = [figure.Curve("a", np.full(30, 3.0)), figure.Curve("b", np.full(30, worst))]
    assert drawn(figure._draw_losses, runs).get_yscale() == scale


def test_interventions_are_marked_where_they_happened():
    axes = drawn(figure._draw_scales, curves())
    marks = {
        line.get_marker(): list(zip(*line.get_data(), strict=True))
        for line in axes.get_lines()
        if line.get_linestyle() == "None" and len(line.get_xdata())
    }
    assert marks == {"v": [(5, 0.1)], "X": [(9, 0.1)]}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"cut", "skipped step"}


def test_smoothing_is_a_trailing_mean_over_finite_values():
    loss = np.random.default_rng(0).normal(size=40)
    loss[[7, 8, 9, 30]] = [np.nan, np.inf, -np.inf, np.nan]
    smoothed = figure.smooth(loss)
    for step in range(40):
        window = loss[max(0, step - figure.SMOOTHED + 1) : step + 1]
        assert smoothed[step] == pytest.approx(window[np.isfinite(window)].mean())
    assert np.all(np.isnan(figure.smooth(np.full(5, np.nan))))


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lbw_optax\[train\]'"):
        figure.figure({"left": curves()}, tmp_path / "runs.png")
