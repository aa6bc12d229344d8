"""The page of a run: its numbers against the files, its extremes, its size, and bad input."""

import functools
import html
import json
import math
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import storm

import lbw_optax
from lbw_optax.law.divergence import Reason
from lbw_optax.report import charts, command, frozen, heat, reading, report, sampling, words
from lbw_optax.state import Mode

BAD = (30, 31, 32, 55)


def log_line(step, state, loss):
    """What `train.logs` writes of a step."""
    metrics = {name: np.asarray(x).item() for name, x in lbw_optax.metrics(state).items()}
    metrics |= {"regime": lbw_optax.REGIMES[metrics["regime"]], "loss": loss, "time": 1e9 + step}
    histogram = {k: metrics.pop(f"gradient_log2/{k}") for k in range(-24, 8, 2)}
    metrics["gradient_log2"] = list(histogram.values())
    return json.dumps({"step": step, "learning_rate": 0.1, **metrics}) + "\n"


def logged(place, bad):
    """The directory of a real run of 80 steps with NaN gradients at these."""
    place.mkdir()
    with (
        (place / "log.jsonl").open("w") as log,
        lbw_optax.AuditLog(place / "events.jsonl") as audit,
    ):
        for step, state in storm(80, bad=bad):
            log.write(log_line(step + 1, state, None if step == 55 else 2 - step / 100))
            if step % 40 == 39:
                audit.record(step + 1, state)
    return place


@pytest.fixture(scope="module")
def stormy(tmp_path_factory):
    return logged(tmp_path_factory.mktemp("runs") / "stormy", BAD)


def page_of(*runs, out=None):
    return report(runs, out).read_text(encoding="utf-8")


def drawings(page):
    """Every drawing of a page, by its title; well-formed, or this raises."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", page)
    assert len(found) == page.count("<figcaption>")
    return {title: ElementTree.fromstring(svg) for title, svg in found}


def values(chart, name):
    """What is drawn of a run, read back from the path: (step, value) pairs."""
    path = next(p for p in chart.iter("path") if p.get("data-n") == name)
    x0, x1, y0, y1 = (float(chart.get(f"data-{k}")) for k in ("x0", "x1", "y0", "y1"))
    numbers = np.array(re.findall(r"-?[\d.]+", path.get("d").replace("h.1", "")), float)
    x, y = numbers.reshape(-1, 2).T
    value = y0 + (y1 - y0) * (1 - (y - 14) / 150)
    return x0 + (x1 - x0) * (x - 62) / 898, 10**value if chart.get("data-log") == "1" else value


def test_the_page_of_a_guarded_run_has_what_its_files_have(stormy):
    page = page_of(stormy)
    charts = drawings(page)
    assert {"Loss", "Learning rate, before the scale", "Gradient norm"} <= charts.keys()
    lines = [json.loads(x) for x in (stormy / "log.jsonl").read_text().splitlines()]
    steps, losses = zip(
        *[(x["step"], x["loss"]) for x in lines if x["loss"] is not None], strict=True
    )
    drawn = values(charts["Loss"], "stormy")
    np.testing.assert_allclose(drawn[0], steps, atol=0.05)
    np.testing.assert_allclose(drawn[1], losses, atol=0.001)

    audit = [json.loads(x) for x in (stormy / "events.jsonl").read_text().splitlines()]
    times = charts["Regimes and interventions: stormy"]
    marks = [json.loads(p.get("data-line")) for p in times.iter("path") if p.get("data-line")]
    assert sorted(x["number"] for x in marks) == sorted(x["number"] for x in audit)
    assert all(mark in audit for mark in marks)
    first = next(x["step"] for x in audit if x["action"] in ("skip", "cut"))
    assert f"The first trouble was at step {first}: steps are too long for the param" in page
    assert "The guard skipped 4 steps" in page
    assert "the batches of steps 30 to 32 and 55" in page
    (crossed,) = [p for p in charts["Loss"].iter("path") if "nonfinite" in p.get("class")]
    assert crossed.get("aria-label") == "stormy: not finite, step 56"


def test_a_run_that_the_guard_gave_up_is_dated_to_where_its_end_began(tmp_path):
    page = page_of(logged(tmp_path / "lost", bad=[5, *range(45, 80)]))
    assert "used up what it may do; what ended it began at step 45: gradients are not" in page
    assert "restore a checkpoint from before step 45, and look at the batches of step 45" in page


def told(loss, audit, **columns):
    """The paragraph on a run with this loss and these interventions."""
    audit = [{"signal": "loss", **line} for line in audit]
    columns = {"step": np.arange(1.0, len(loss) + 1), "loss": np.asarray(loss, float), **columns}
    return words.paragraph(reading.Run("run", columns, audit, True, True, []))


EARLY = {"action": "cut", "step": 5, "signal": "relative_step"}
FALLING = np.linspace(6.0, 4.0, 223)


@pytest.mark.parametrize(
    ("after", "stays"),
    [
        (np.linspace(7.0, 5.4, 200), True),
        (np.concatenate([np.full(60, 7.0), np.full(140, 3.9)]), False),
        (np.full(200, 4.1), False),
        (np.full(30, 7.0), True),
    ],
    ids=["a source that goes bad", "it comes back", "less than a quarter", "a short log"],
)
def test_a_loss_that_stays_up_comes_first(after, stays):
    clipped = {"action": "clip", "step": 223, "last_step": 272, "count": 50}
    story = told(np.append(FALLING, after), [EARLY, clipped])
    where = "At step 223 the loss jumped, and the loss has stayed up: it was 4.04 before and ends"
    assert (f"step 1 to {223 + len(after)} and came to its end. {where}" in story) == stays
    assert ("restore a checkpoint from before step 223" in story) == stays
    assert ("look at the batches of all steps from 223 on" in story) == stays
    assert ("The first trouble was at step 5" in story) != stays


def test_cuts_that_were_earned_back_ask_for_nothing():
    story = told(FALLING, [EARLY], scale=np.ones(223))
    assert "The first intervention was at step 5" in story
    assert story.endswith("There is nothing to do.")


@pytest.mark.parametrize(("scale", "nothing"), [(1.0, True), (0.02, False)])
def test_a_guard_that_holds_the_updates_has_not_had_nothing_to_do(scale, nothing):
    story = told(FALLING, [], scale=np.full(223, scale))
    assert ("The guard had nothing to do." in story) == nothing
    assert ("held at 2 %" in story) != nothing


def test_after_a_rollback_a_step_has_a_later_batch():
    skipped = {"action": "skip", "signal": "nonfinite_gradients"}
    back = {"action": "rollback", "signal": "skips", "step": 117, "from_step": 141, "to_step": 117}
    lines = [skipped | {"step": 120, "last_step": 140, "count": 21}, back]
    lines.append(skipped | {"step": 117, "last_step": 147, "count": 31})
    story = told(np.full(148, 2.0), lines, exhausted=np.ones(148))
    assert "what ended it began at step 120: gradients are not finite" in story
    assert "look at the batches of step 120" in story
    assert "A step after the last rollback had the batch 24 further on" in story
    assert "further on" not in told(np.full(148, 2.0), lines[:1])


def test_a_rollback_that_nobody_made_comes_first():
    asked = np.repeat([0.0, 1.0], [237, 100])
    audit = [EARLY, {"action": "clip", "step": 236}]
    story = told(np.full(337, 6.0), audit, rollback_asked=asked, scale=np.full(337, 0.2))
    where = "From step 238 on the guard asked to go back, and nobody did: the parameters are broken"
    assert f"came to its end. {where}" in story
    assert "restore a state from before step 238, and look for broken memory" in story


def asks(reason, since, length=400, **columns):
    """What is told where the guard asks from that line on."""
    asked = np.repeat([0.0, float(reason)], [since - 1, length - since + 1])
    loss = np.where(np.arange(1, length + 1) > 300, 9.0, np.linspace(6.0, 4.0, length))
    return told(loss, [EARLY], rollback_asked=asked, **columns)


def test_a_risen_loss_is_dated_to_where_it_rose():
    """And not to where the guard was sure of it."""
    story = asks(Reason.LOSS, 307)
    assert "From step 307 on the guard asked to go back, and nobody did: the loss has" in story
    assert "That begins at about step 300. What to do: restore a checkpoint from before" in story
    assert "before step 300, and look at the batches of step 300 and just before" in story


@pytest.mark.parametrize(
    ("end", "came_of_it"),
    [
        (9.0, "rises again from about step 300 on. What to do: restore a checkpoint from before"),
        (2.0, "stayed there: there is nothing to do."),
    ],
)
def test_a_loss_that_came_down_after_a_rollback_was_asked_for_is_not_told_as_risen(end, came_of_it):
    loss = np.concatenate([np.full(20, 50.0), np.linspace(6.0, 2.0, 280), np.full(100, end)])
    story = told(loss, [EARLY], rollback_asked=np.repeat([0.0, float(Reason.LOSS)], [15, 385]))
    assert "At step 16 the guard asked to go back, and nobody did. The loss came down" in story
    assert came_of_it in story


@pytest.mark.parametrize(("rise", "is_told"), [(10.0, True), (1.5, False)])
def test_a_learning_rate_that_has_risen_with_the_loss_is_named(rise, is_told):
    rate = np.where(np.arange(400) < 300, 0.003, 0.003 * rise)
    story = asks(Reason.LOSS, 307, learning_rate=rate)
    named = "The learning rate has risen from 0.003, where the loss was lowest at about step 300"
    assert (named in story) == is_told
    assert story.count("has risen from") == is_told
    assert ("and lower the learning rate to about what it was at step 300, 0.003." in story) is (
        is_told
    )


def test_a_warm_up_is_no_rate_that_rose_too_far():
    rate = np.minimum(np.arange(1, 224) / 200, 1.0)
    assert "has risen" not in told(FALLING, [EARLY], learning_rate=rate)


def test_the_length_of_broken_parameters_is_told():
    norm = np.where(np.arange(1, 401) < 252, 9.6, 65.0)
    story = asks(Reason.PARAMETERS, 252, parameter_norm=norm)
    assert "the parameters are broken (their length went from 9.6 to 65). What to do" in story
    story = asks(Reason.PARAMETERS, 252, parameter_norm=np.where(norm > 10, np.nan, norm))
    assert "the parameters are broken (their length is not finite)" in story


def test_a_watched_run_whose_parameters_grew_at_once_is_told_of_its_rate():
    """The guard knows the step that it would have allowed, and a longer one was taken."""
    norm = np.where(np.arange(1, 401) < 252, 34.0, 75.4)
    watched = {"mode": np.full(400, 1.0), "parameter_norm": norm}
    story = asks(Reason.PARAMETERS, 252, **watched)
    assert "(their length went from 34 to 75.4). What to do: lower the learning rate" in story
    story = asks(
        Reason.PARAMETERS, 252, **watched | {"parameter_norm": np.where(norm > 40, np.nan, norm)}
    )
    assert "What to do: restore a state from before step 252" in story


def test_what_ended_a_run_comes_before_what_it_got_over():
    skipped = {"action": "skip", "step": 237, "last_step": 266, "count": 30}
    story = told(
        np.full(267, 6.2),
        [EARLY, skipped | {"signal": "nonfinite_updates"}],
        exhausted=np.ones(267),
    )
    assert "The guard has used up what it may do; what ended it began at step 237" in story
    assert "first trouble" not in story
    warned = [EARLY, skipped | {"signal": "nonfinite_updates"}]
    warned.append({"action": "alarm", "step": 236, "signal": "risk", "value": 0.5})
    story = told(np.full(267, 6.2), warned, exhausted=np.ones(267))
    assert "The classifier's alarm was raised once at step 236" in story
    risk = np.where(np.arange(1, 268) < 31, 0.0, 0.97)  # it began beside what has a line of its own
    story = told(np.full(267, 6.2), [EARLY], exhausted=np.ones(267), risk_10=risk)
    assert "was raised first at step 30: a divergence within ten steps, with a prob" in story
    assert "of up to 97 %" in story


def test_a_guard_that_only_watched_is_told_of():
    watched, acted = (told(FALLING, [EARLY], mode=np.full(223, x)) for x in (1.0, 0.0))
    assert "The guard only watched: no update was changed" in watched
    assert "only watched" not in acted
    both = told(FALLING, [EARLY], mode=np.repeat([0.0, 1.0], [100, 123]))
    assert "From step 101 on the guard only watched, and changed no update" in both


@functools.cache
def two_layers():
    """AdamW, observed, on a small made task; its tuned rate is about 0.005. (scales, loss)"""
    keys = jax.random.split(jax.random.key(1), 4)
    into, out = jax.random.normal(keys[0], (8, 12)) / 3, jax.random.normal(keys[1], (12, 2)) / 3
    params = [jax.random.normal(keys[2], (8, 24)) / 3, jax.random.normal(keys[3], (24, 2)) / 5]

    @jax.jit
    def run(rate):
        tx = lbw_optax.lbw_guard(optax.adamw(rate), mode="observe")

        def one(carry, key):
            x = jax.random.normal(key, (16, 8))
            y = jnp.tanh(x @ into) @ out + 0.1 * jax.random.normal(key, (16, 2))
            loss_of = lambda p: jnp.mean((jnp.tanh(x @ p[0]) @ p[1] - y) ** 2)  # noqa: E731
            loss, grads = jax.value_and_grad(loss_of)(carry[0])
            updates, state = tx.update(grads, carry[1], carry[0], value=loss)
            new = optax.apply_updates(carry[0], updates), state
            return new, (lbw_optax.metrics(state)["scale"], loss)

        key = jax.random.split(jax.random.key(2), 300)
        (_, state), (scale, loss) = jax.lax.scan(one, (params, tx.init(params)), key)
        return state, scale, loss

    return run


@pytest.mark.parametrize("times", [0.3, 10, 30, 100])
def test_an_observed_run_is_told_a_direction_and_no_number(times):
    """Nothing answers an observed scale, which falls with time: it read 648 at 3 times the rate."""
    state, scale, loss = two_layers()(0.005 * times)
    lines = [x._asdict() | {"rate_multiple": x.scale_after} for x in lbw_optax.events(state)]
    story = told(loss, lines, scale=np.asarray(scale), mode=np.ones(300))
    said = [story, lbw_optax.explain(state), *(charts.said_of(x, acts=False) for x in lines)]
    assert not [x for x in said if re.search(r"\d times too high|to about \d", x)]
    high = "the learning rate looks too high, by how much only a guard that governs can tell"
    assert (high in story) == (times > 1)
    assert ("What to do: lower the learning rate, or let the guard govern" in story) == (times > 1)


def test_the_share_of_rejected_steps_is_no_threshold_of_the_loss(tmp_path):
    lines = [json.dumps({"step": i, "loss": 4.0 + i / 100}) for i in range(1, 50)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    rejecting = {"step": 20, "action": "rejecting", "signal": "loss", "threshold": 0.05}
    (tmp_path / "events.jsonl").write_text(json.dumps({"number": 0, **rejecting}) + "\n")
    run = reading.read(tmp_path)
    (line,) = charts.lines_of(charts.CHARTS[0], run, 0, 1)
    assert not len(line.threshold[0])


@pytest.mark.parametrize(("mode", "would"), [("govern", ""), ("observe", "would have been ")])
def test_a_chart_says_what_is_drawn(mode, would, tmp_path):
    steps = range(1, 301)
    columns = {"scale": 0.5, "mode": Mode[mode.upper()].value, "loss_threshold": 9}
    lines = [{"step": i, "loss": 4 + np.sin(i), **columns} for i in steps]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clip = {"number": 0, "step": 100, "action": "clip", "signal": "loss"}
    (tmp_path / "events.jsonl").write_text(json.dumps(clip | {"count": 3, "last_step": 102}) + "\n")
    page = page_of(tmp_path)
    drawn = drawings(page)
    assert f"Scale: what the updates {would or 'are '}multiplied by" in drawn
    assert "×3" in "".join(drawn[f"Regimes and interventions: {tmp_path.name}"].itertext())
    assert "step" in [x.text for x in drawn["Loss"].iter("text")]
    key = page[page.index("How to read it") :]
    assert all(x in key for x in ["a number of each step", "its moving mean", "a threshold"])
    assert "undone and made again" not in key


def test_the_page_needs_nothing_but_itself(stormy):
    page = page_of(stormy)
    assert not re.search(r"(src|href)=|url\((?!#)|@import|<link|fetch\(", page)
    addresses = set(re.findall(r"https?://[^\s\"']+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, no address


def test_several_runs_are_laid_over_each_other(stormy, tmp_path):
    other = tmp_path / 'a & "b" <c>'
    shutil.copytree(stormy, other)
    charts = drawings(page_of(stormy, other, out=tmp_path / "both.html"))
    names = [p.get("data-n") for p in charts["Loss"].iter("path") if p.get("data-n")]
    assert names == ["stormy", 'a & "b" <c>']
    dashes = {p.get("class").split()[-1] for p in charts["Loss"].iter("path") if p.get("data-n")}
    assert len(dashes) == 2


def test_an_audit_log_alone_is_enough(stormy, tmp_path):
    text = (stormy / "events.jsonl").read_text()
    (tmp_path / "audit.jsonl").write_text(text + '{"number": 9, "ac')
    read = reading.read(tmp_path)
    page = page_of(tmp_path)
    assert "There are interventions only" in page
    assert "The guard skipped 4 steps" in page
    assert "Scale: what the updates are multiplied by" in drawings(page)
    (complaint,) = read.complaints
    assert "audit.jsonl, line" in complaint
    assert "What could not be read" in page


ROLLBACK = {
    "number": 0,
    "step": 6,
    "regime": "recovering",
    "signal": "loss",
    "action": "rollback",
    "scale_before": 1.0,
    "scale_after": 0.5,
    "from_step": 9,
    "to_step": 6,
    "rate_multiple": 0.5,
}


def test_what_a_rollback_undid_is_drawn_apart_and_counted(tmp_path):
    made = [*range(1, 10), 7, 8, 9, 10, 11, 12]
    left = [9.0 if step > 6 and i < 9 else 3.0 - step / 10 for i, step in enumerate(made)]
    log = [
        {"step": step, "loss": loss, "time": 2.0 * i}
        for i, (step, loss) in enumerate(zip(made, left, strict=True))
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    (tmp_path / "events.jsonl").write_text(json.dumps(ROLLBACK) + "\n")
    run = reading.read(tmp_path)
    assert words.run_again(run) == (3, 6.0)
    page = page_of(tmp_path)
    loss = drawings(page)["Loss"]
    step, value = values(loss, tmp_path.name)
    np.testing.assert_allclose(step, np.arange(1, 13), atol=0.02)
    np.testing.assert_allclose(value, 3 - np.arange(1, 13) / 10, atol=0.05)
    kinds = [p.get("class").split()[0] for p in loss.iter("path")]
    assert kinds.count("undone") == kinds.count("jump") == 1
    assert "went back once, over 3 steps, because the loss has risen and stays there" in page
    assert "<td>3 (20 %)</td><td>6 s</td><td>9 steps</td>" in page


HEAT = "Sizes of the gradient's coordinates; the stronger the colour, the more of them"


@pytest.mark.parametrize("is_list", [True, False])
def test_the_histogram_is_the_mean_of_what_was_kept(is_list, tmp_path):
    """Against sums by hand; a rollback to step 30 undid steps 31 to 40."""
    counts = np.random.default_rng(0).integers(0, 50, (60, 16))
    made = [*range(1, 41), *range(31, 51)]
    with (tmp_path / "log.jsonl").open("w") as log:
        for step, row in zip(made, counts.tolist(), strict=True):
            named = {f"gradient_log2/{k}": x for k, x in zip(range(-24, 8, 2), row, strict=True)}
            line = {"step": step, "loss": 2.0, **({"gradient_log2": row} if is_list else named)}
            log.write(json.dumps(line) + "\n")
    (found,) = heat.maps(reading.read(tmp_path), (1.0, 51.0), columns=5)
    stays = np.concatenate([counts[:30], counts[40:]])
    expected = [(part / part.sum(1, keepdims=True)).mean(0) for part in np.split(stays, 5)]
    np.testing.assert_allclose(found.share, expected, rtol=1e-12)
    np.testing.assert_allclose(found.edges, [1, 11, 21, 31, 41, 51])


def test_the_shades_of_the_histogram_are_those_of_its_shares(stormy):
    run = reading.read(stormy)
    (found,) = heat.maps(run, charts.extent([run]))
    drawing = drawings(page_of(stormy))[html.escape(HEAT)]
    area = 0.0
    for path in drawing.iter("path"):
        if path.get("class") == "heat":
            ends = np.array(re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", path.get("d")), float)
            area += float(path.get("opacity")) * (ends[:, 1] - ends[:, 0]).sum()
    column = 898 / len(found.share)
    assert area == pytest.approx((heat.level(found.share) / heat.LEVELS).sum() * column, rel=1e-3)


def test_a_metric_that_is_a_list_a_line_is_none(tmp_path):
    lines = [{"step": i, "loss": 2.0, "lr": [1e-3], "norms": [[1], [2]]} for i in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert drawings(page_of(tmp_path)).keys() == {"Loss"}


def test_a_log_of_one_step_may_have_any_number(tmp_path):
    """As a time in nanoseconds, to which 1 cannot be added in float64."""
    (tmp_path / "log.jsonl").write_text('{"step": 1760000000000000000, "loss": 2.0, "scale": 1.0}')
    assert "Loss" in drawings(page_of(tmp_path))


@pytest.mark.parametrize("histogram", [[1, 2, 3], [], 16 * [[1]], 16 * [None], 16 * ["a"], 7])
def test_a_histogram_of_another_shape_is_not_drawn(histogram, tmp_path):
    line = {"step": 1, "loss": 2.0, "gradient_log2": histogram}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert drawings(page_of(tmp_path)).keys() == {"Loss"}


def test_a_png_has_the_same_charts(stormy, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    sizes = {}
    for name, runs in {"one": [stormy], "two": [stormy, stormy]}.items():
        out = [tmp_path / f"{name}.html", tmp_path / f"{name}.png"]
        arguments = [*map(str, runs), "-o", str(out[0]), "--png", str(out[1])]
        assert command.main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == [str(x) for x in out]
        picture = image.imread(out[1])
        sizes[name] = picture.shape
        assert (picture[:, :, :3].min(2) < 0.5).mean() > 0.01  # it is not empty
    assert sizes["one"][1] == sizes["two"][1] == 1100
    assert sizes["two"][0] > sizes["one"][0] > 1000


def test_without_matplotlib_one_sentence_says_what_to_install(
    stormy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = [tmp_path / "page.html", tmp_path / "page.png"]
    assert command.main([str(stormy), "-o", str(out[0]), "--png", str(out[1])]) == 2
    assert "pip install 'lbw_optax[report]'" in capsys.readouterr().err
    assert out[0].exists()
    assert not out[1].exists()


@pytest.mark.parametrize(
    ("alarms", "said"),
    [
        ({}, None),
        (
            {7: 0.5},
            "raised once at step 7: a divergence within ten steps, with a probability of up ",
        ),
        ({7: 0.5, 9: 0.25}, "raised twice, first at step 7: a divergence within ten steps, with a"),
        ({7: None}, "raised once at step 7: a divergence within ten steps."),
    ],
)
def test_the_paragraph_tells_the_classifiers_alarms_apart_from_what_was_done(
    alarms, said, tmp_path
):
    lines = [{"step": i, "loss": 2.0, "scale": 1.0} for i in range(20)]
    marks = [
        {"action": "alarm", "signal": "risk", "step": k, "value": x} for k, x in alarms.items()
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(x) + "\n" for x in marks))
    told = words.paragraph(reading.read(tmp_path))
    assert "The guard had nothing to do." in told
    assert ("alarm" in told) == (said is not None)
    assert said is None or said in told


def _froze(step, end, group="layers/3"):
    line = {"group": group, "signal": "nonfinite_gradients"}
    back = [{"action": "thaw", "step": end, **line}] if end else []
    return [{"action": "freeze", "step": step, **line}, *back]


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        (
            _froze(40, 52),
            "to 200 and came to its end. From step 40 on layers/3 stayed as it was while the rest "
            "trained (frozen), because its gradient is not finite; it trained again from step 52 "
            "on. At the end the optimizer's updates are applied in full. ",
        ),
        (_froze(40, None), "because its gradient is not finite; it does so to the end. At the"),
        (
            [*_froze(40, 52), *_froze(60, None, "embed"), *_froze(90, 95)],
            "3 times, 2 layers in all. The first was layers/3 at step 40, because its gradient is "
            "not finite. At the end embed is frozen still.",
        ),
        (
            [*_froze(40, 52), {"action": "clip", "step": 90, "signal": "gradient_norm"}],
            "on. The first other trouble was at step 90: the gradient is far longer",
        ),
    ],
    ids=["once", "to the end", "several", "then a jump"],
)
def test_the_paragraph_names_the_layers_that_were_frozen(audit, said):
    story = told(np.linspace(6.0, 4.0, 200), audit, scale=np.ones(200))
    assert said in story
    look = "batches of step 90" if len(audit) == 3 else "look at layers/3 and at the batch of step"
    assert look in story


def test_the_map_of_frozen_layers_is_filled_where_they_were():
    audit = [*_froze(40, 60), *_froze(150, None), *_froze(101, 102, "embed")]
    run = reading.Run("run", {"step": np.arange(257.0)}, audit, True, True, [])
    found = frozen.map_of(run, (0.0, 256.0), columns=256)
    assert found.names == ["layers/3", "embed"]
    filled = [np.flatnonzero(row) for row in found.shade.T]
    np.testing.assert_array_equal(filled[0], [*range(40, 60), *range(150, 256)])
    np.testing.assert_array_equal(filled[1], [101])
    (drawn,) = frozen.pictures([run], (0.0, 256.0))
    assert ">layers/3</text>" in drawn
    assert "They are layers/3, embed" in drawn


def test_a_png_has_every_kind_of_mark_and_names_as_they_are(tmp_path):
    """Two dollars in a name are no formula."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    run = tmp_path / "costs_$a^$"
    run.mkdir()
    marks = [{"action": action, "step": i} for i, action in enumerate([*charts.LANES, "yours"])]
    (run / "events.jsonl").write_text("".join(json.dumps(x) + "\n" for x in marks))
    lines = [{"step": i, "$a^$": {"scale": 1.0, "gradient_log2": [1] * 16}} for i in range(3)]
    (run / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert command.main([str(run), "--png", str(tmp_path / "page.png")]) == 0


@pytest.mark.parametrize("content", [b'{"step": 1}\n', b"\x89PNG\r\n\x1a\n" + 300 * b"0", None])
def test_a_png_replaces_no_file_that_is_none_of_ours(content, stormy, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    place, out = tmp_path / "there.png", tmp_path / "page.html"
    arguments = [str(stormy), "-o", str(out), "--png", str(place)]
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    assert command.main(arguments) == 2
    assert str(place) in capsys.readouterr().err
    assert place.is_dir() if content is None else place.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == [out, place]
    place.rmdir() if content is None else place.unlink()
    for _ in range(2):  # its own it does
        assert command.main(arguments) == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_least_and_the_largest_of_every_place_are_kept(seed):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.integers(0, 5000, 3000)).astype(float)
    y = rng.standard_cauchy(3000)
    kept = sampling.extremes(x, y, 0.0, 5000.0, 100)
    assert len(kept) <= 200
    assert (np.diff(kept) > 0).all()
    for k in range(100):
        inside = np.flatnonzero((x >= 50 * k) & (x < 50 * (k + 1)))
        drawn = np.intersect1d(inside, kept)
        assert (y[drawn].min(), y[drawn].max()) == (y[inside].min(), y[inside].max())


def test_a_smooth_curve_is_a_mean_of_neighbours():
    y = np.random.default_rng(0).normal(size=50)
    expected = [y[max(i - 2, 0) : i + 3].mean() for i in range(50)]
    np.testing.assert_allclose(sampling.smooth(y, 5), expected, atol=1e-12)


def long_run(place, stormy, steps, audit_every=20):
    """A log of so many steps with all metrics of a real one, noise in each, and one spike."""
    place.mkdir()
    line = json.loads((stormy / "log.jsonl").read_text().splitlines()[40])
    events = [json.loads(x) for x in (stormy / "events.jsonl").read_text().splitlines()]
    floats = [name for name, x in line.items() if isinstance(x, float)]
    rng = np.random.default_rng(0)
    noise = np.exp(0.3 * rng.normal(size=(steps, len(floats))))
    noise[steps // 3, floats.index("loss")] = 1e4
    regimes = rng.integers(0, 4, steps)
    counts = rng.integers(0, 99, (steps, 16)).tolist()
    with (place / "log.jsonl").open("w") as log:
        for i in range(steps):
            values = dict(zip(floats, noise[i].tolist(), strict=True))
            regime = lbw_optax.REGIMES[regimes[i]]
            own = {"step": i + 1, "regime": regime, "gradient_log2": counts[i]}
            log.write(json.dumps({**line, **values, **own}) + "\n")
    with (place / "events.jsonl").open("w") as audit:
        for number, step in enumerate(range(0, steps, audit_every)):
            event = {**events[number % len(events)], "number": number, "step": step}
            event = {k: x for k, x in event.items() if k not in ("count", "last_step")}
            audit.write(json.dumps(event) + "\n")
    return place


def small_and_with_its_spike(place, steps):
    page = page_of(place)
    assert len(page.encode()) <= 300_000
    step, value = values(drawings(page)["Loss"], place.name)
    assert abs(step[value.argmax()] - (steps // 3 + 1)) < steps / 500
    assert math.isclose(value.max(), 1e4, rel_tol=0.02)


def test_ten_thousand_steps_are_small_and_keep_their_spike(stormy, tmp_path):
    small_and_with_its_spike(long_run(tmp_path / "long", stormy, 10_000, audit_every=5), 10_000)


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_as_small_and_made_in_seconds(stormy, tmp_path):
    place = long_run(tmp_path / "long", stormy, 100_000)
    began = time.process_time()
    small_and_with_its_spike(place, 100_000)
    assert time.process_time() - began < 12  # a quarter of it where nothing else runs


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_hardly_a_step_is_drawn(steps, tmp_path):
    lines = [json.dumps({"step": i, "loss": 2.0}) + "\n" for i in range(steps)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    assert "Loss" in drawings(page_of(tmp_path))


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "loss": null, "scale": null, "regime": 77, "gradient_norm": -1}',
        '{"step": null, "loss": 1e308}',
        '{"step": 1e300, "loss": -1e308, "scale": 0}',
        '{"action": "skip", "step": 3}',
        '{"action": "lost", "interventions": 4, "rate_multiple": 1.0}',
        '{"action": "rollback", "step": 2, "signal": "request", "from_step": 1, "to_step": 9}',
        '{"action": "something new", "step": 2, "signal": "odd", "value": "x"}',
        '{"action": "skip", "step": "x", "last_step": []}',
    ],
)
def test_odd_lines_are_no_error(line, stormy, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stormy, run)
    for name in ("log.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write(line + "\n")
    drawings(page_of(run))


def test_the_command_says_what_happened_and_where_it_is(stormy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert command.main([str(stormy), str(tmp_path / "empty"), "-o", str(tmp_path / "x.html")]) == 0
    said = capsys.readouterr()
    assert "stormy: The run is logged from step 1 to 80. The first trouble was at" in said.out
    assert said.out.splitlines()[-1] == str(tmp_path / "x.html")
    assert "empty holds no log" in said.err
    assert command.main([str(tmp_path / "empty")]) == 2
    assert command.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such file or directory." in capsys.readouterr().err


def test_a_file_that_is_none_of_ours_is_not_written_over(stormy, tmp_path, capsys):
    other = tmp_path / "notes.html"
    other.write_text("mine")
    assert command.main([str(stormy), "-o", str(other)]) == 2
    assert "is there and no report of ours" in capsys.readouterr().err
    assert other.read_text() == "mine"
    ours = tmp_path / "ours.html"
    for _ in range(2):
        report([stormy], ours)


def test_a_log_of_another_program_is_drawn_with_what_a_guard_would_have_seen(tmp_path):
    loss = np.where(np.arange(200) < 150, 2.0, np.nan)
    table = "step,loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(loss))
    (tmp_path / "log.csv").write_text(table)
    path = report([tmp_path / "log.csv"])
    assert path.name == "log.csv.report.html"
    page = path.read_text()
    assert "A run without the guard. The first trouble is at step 150" in page
    marks = drawings(page)["What a guard would have seen: log.csv"].iter("path")
    said = [p.get("aria-label") for p in marks if p.get("aria-label")]
    assert any(x.startswith("Step 150: the loss is not finite, 50 times") for x in said)


@pytest.mark.process
def test_the_module_is_the_command(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n2,1\n")
    ran = subprocess.run(
        [sys.executable, "-m", "lbw_optax.report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Nothing stands out in 2 entries" in ran.stdout


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# What a person does: go through the marks by key, leave, and read a curve with the pointer.
HANDS = """<script>addEventListener("load", () => {
  const out = [], tip = document.getElementById("tip");
  const key = (at, k) => at.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
  const lane = document.querySelector('.lane[aria-label="stormy: skipped"]');
  const marks = lane.querySelectorAll(".mark");
  marks[0].focus();
  out.push(tip.hidden, tip.textContent.includes('"action": "skip"'));
  key(marks[0], "ArrowRight");
  out.push(document.activeElement === marks[1]);
  key(document, "Escape");
  out.push(tip.hidden);
  const chart = document.querySelector("svg.chart"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2,
    clientY: box.top + 20, bubbles: true}));
  out.push(tip.firstChild.textContent);
  document.title = out.join(" ");
});</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser_there_is_no_error_and_marks_answer_to_keys(stormy, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page_of(stormy) + HANDS)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    ran = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in ran.stderr
    # The pointer is at whole pixels.
    assert re.search("<title>false true true true step (39|40)</title>", ran.stdout)
