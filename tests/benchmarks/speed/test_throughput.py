"""The throughput benchmark at a size that takes seconds; how ratios are made, by hand."""

import json

import pytest

pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from benchmarks.speed import loops as speed_loops
from benchmarks.speed import throughput
from train import model

SMALL = speed_loops.Shape(model.Config(300, 32, 64, 1, 4, 2, 8), 4, 16)


def test_turns_alternate_and_ratios_are_paired():
    """Each loop's seconds are given; the first turn of each warms up and does not count."""
    turns = []

    def loop(name, seconds):
        given = iter(seconds)

        def stretch():
            turns.append(name)
            return next(given)

        return stretch

    loops = {
        "plain": loop("plain", [9.0, 1.0, 2.0, 3.0]),
        "ours": loop("ours", [99.0, 2.0, 2.0, 2.0]),
    }
    shape = speed_loops.Shape(model.PRESETS["tiny"], batch_size=2, length=10)
    result = speed_loops.measured(loops, shape, 5, 3, trains_all=True)
    assert turns == ["plain", "ours", "plain", "ours", "ours", "plain", "plain", "ours"]
    assert result["tokens_per_second"] == {"plain": 50.0, "ours": 50.0}
    assert result["ours_over"] == {"plain": [0.75, 1.0, 1.25]}
    line = throughput.describe("loop", result, "cpu")
    assert "ours +0.0 % against plain (-25.0 % to +25.0 %)" in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_all_loops_run_and_the_file_says_where(tmp_path, monkeypatch):
    monkeypatch.setitem(throughput.SIZES, "small", SMALL)
    path = tmp_path / "throughput.json"
    throughput.main(["--rounds", "2", "--steps", "3", "--out", str(path)])
    result = json.loads(path.read_text())
    assert {"commit", "law", "device", "machine"} < set(result)
    assert set(result["loop"]["ours_over"]) == {"plain", "plain, guarded"}
    for part in ("loop", "torch"):
        if result[part] is not None:
            assert all(rate > 0 for rate in result[part]["tokens_per_second"].values())
            assert all(len(seconds) == 2 for seconds in result[part]["seconds"].values())
