"""The paper's rows as commands that the scripts accept, and the page from its result file."""

import pytest

pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from benchmarks.paper import page, rows, run, tiny
from benchmarks.paper.rows import CASES, LARGE_RATES, METHODS
from train import command as scripts
from train import jsonl, qwen_lora, tinyllama_full

SCRIPTS = {
    "qwen_lora": (qwen_lora.LoraOptions, qwen_lora.PRESETS),
    "tinyllama_full": (tinyllama_full.FullOptions, tinyllama_full.PRESETS),
}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("preset", run.PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_a_command_that_its_script_takes(preset, method, case):
    command = rows.command(preset, case, method, LARGE_RATES)
    kind, presets = SCRIPTS[command.script]
    parsed = scripts.parse(kind, presets, command.arguments, prog="train.x", description="")
    assert parsed.out == command.out
    assert parsed.optimizer == method + ("" if case.clip is None else "+clip")
    assert parsed.clip == (case.clip or 1.0)
    reference = LARGE_RATES["full" if case.size == "TinyLlama" else "lora"]
    assert parsed.learning_rate == pytest.approx(case.multiple * reference)
    assert str(command).split()[3:] == list(command.arguments)
    if preset != "tiny":
        assert case.size.lower() in parsed.model.lower()
        assert parsed.data == "wikitext-103"


def test_the_rates_are_the_papers_and_its_own_multiples():
    rates = {case.name: case.multiple * LARGE_RATES["lora"] for case in CASES}
    assert rates["lr-1e-3"] == pytest.approx(1e-3)
    assert rates["lr-3e-3"] == pytest.approx(3e-3)


def test_the_list_prints_commands_and_runs_nothing(capsys, tmp_path):
    path = tmp_path / "results.jsonl"
    given = ["--preset", "qwen2.5-7b", "--list", "--rows", "14b", "--results", str(path)]
    assert run.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [
        line.startswith("python -m train.qwen_lora --preset qwen2.5-14b") for line in lines
    ] == [
        True,
        True,
    ]
    assert not path.exists()


def record(row, method, valid, test, **more):
    perplexity = {"valid": valid, "test": test}
    return {"row": row, "method": method, "perplexity": perplexity, "exit_code": 0, **more}


def test_the_tuned_rate_is_the_best_on_the_valid_split(tmp_path):
    path = tmp_path / "results.jsonl"
    for rate, valid, test in ((1e-3, 20.0, 19.0), (2e-3, 18.0, 25.0), (4e-3, 30.0, 1.0)):
        line = record("tune-lora", "adamw", valid, test, rate=rate)
        jsonl.append(path, line)
    jsonl.append(path, record("reference", "adamw", 1.0, 1.0))
    assert run._rates("tiny", path)["lora"] == 2e-3
    assert run._rates("qwen2.5-7b", path) == LARGE_RATES


def test_the_table_shows_paper_and_ours_with_their_ratios():
    records = [
        record("reference", "adamw", 20.0, 21.0, seconds=12.3),
        record("reference", "lbw", 20.0, 20.0, seconds=11.8),
        record("lr-1e-3", "adamw", 80.0, 84.0),
        {**record("lr-1e-3", "lbw", None, None), "exit_code": 3},
        record("lr-3e-3", "adamw", None, None),
    ]
    lines = page.table(records).splitlines()
    shown = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert (
        "13.21 (1.00 ×) | 10.74 (0.81 ×) | 21.00 (1.00 ×) | 20.00 (0.95 ×)"
        in shown["reference rate"]
    )
    assert "392.54 s | 357.02 s | 12 s | 12 s" in shown["its time"]
    assert "659.76 (49.94 ×) | 10.33 (0.78 ×) | 84.00 (4.00 ×) | stopped" in shown["LR 1e-3"]
    assert "not finite | –" in shown["LR 3e-3"]
    assert shown["LR 1e-3, clip 0.5"].count("–") == 3


def test_every_size_has_a_tiny_shape_that_transformers_can_describe():
    assert {case.size for case in CASES} == set(tiny.SHAPES)
    for shape in tiny.SHAPES.values():
        assert shape.from_hf(shape.to_hf()) == shape


def test_the_page_is_what_the_result_file_says():
    assert page.main(["--check"]) == 0


def test_large_rows_name_memory_and_device():
    lines = page.large().splitlines()[2:]
    assert len(lines) == len(CASES)
    need = {size: page._need(size) for size in ("3B", "7B", "14B", "TinyLlama")}
    assert 6e9 < need["3B"] < need["7B"] < need["14B"] < 80e9
    assert need["TinyLlama"] > 1.1e9 * (4 + 8 + 4)  # parameters, two moments, gradients
