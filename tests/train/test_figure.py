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
    draw(axes, curves, figure._colours(curves))
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
    assert dashed == [True, True, False, False, False]
    first, second, lost, third, fourth = (line.get_color() for line in axes.get_lines())
    assert lost == second  # the cross where the second curve ends
    assert (first, second) == (third, fourth)
    assert first != second
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    curve_labels = [label for label in labels if "finite" not in label]
    assert curve_labels == ["AdamW tuned", "AdamW 100×", "guard tuned", "guard 100×"]


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


def test_a_run_that_is_lost_ends_at_a_cross_on_its_last_finite_loss():
    loss = np.append(np.linspace(6, 4, 25), [np.nan] * 25)
    line, cross = drawn(figure._draw_losses, [figure.Curve("AdamW", loss)]).get_lines()
    assert len(line.get_xdata()) == 25
    assert (cross.get_marker(), cross.get_xydata().tolist()) == ("X", [[24, line.get_ydata()[-1]]])
    assert cross.get_label() == "not finite from here on"
    whole = np.where(np.arange(50) == 20, np.nan, 3.0)  # a NaN in between is not the end
    assert len(drawn(figure._draw_losses, [figure.Curve("AdamW", whole)]).get_lines()) == 1
    nothing = figure.Curve("AdamW", np.full(50, np.nan))
    assert len(drawn(figure._draw_losses, [nothing]).get_lines()) == 1


def test_bad_batches_are_shaded_once_though_two_runs_meet_them():
    runs = [figure.Curve(name, np.full(50, 3.0), bad=(20, 30)) for name in ("AdamW", "guard")]
    (band,) = drawn(figure._draw_losses, runs).patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (20, 30)
    assert band.get_label() == "bad batches"


def test_a_run_shows_validation_points_gradient_norm_and_learning_rate(tmp_path):
    valid = np.full(50, np.nan)
    valid[[9, 29]] = 4.0, 3.5
    rate = np.linspace(1e-3, 0, 50)
    run = figure.Curve(
        "lbw", np.full(50, 3.0), np.ones(50), (), "", valid, rate, gradient_norm=np.ones(50)
    )
    assert [*figure._rows([run])][2:] == ["gradient norm", "learning rate"]
    assert len(figure._rows(curves())) == 2
    points = drawn(figure._draw_losses, [run]).get_lines()[1]
    assert points.get_xydata().tolist() == [[9, 4.0], [29, 3.5]]
    (line,) = drawn(figure._draw_learning_rates, [run]).get_lines()
    np.testing.assert_array_equal(line.get_ydata(), rate)
    figure.figure({"run": [run]}, tmp_path / "run.png")
    figure.figure({"run": curves()[:1]}, tmp_path / "other.png")
    assert imread(tmp_path / "run.png").shape[0] > imread(tmp_path / "other.png").shape[0]


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
    with pytest.raises(ImportError, match=r"pip install --group train"):
        figure.figure({"left": curves()}, tmp_path / "runs.png")
