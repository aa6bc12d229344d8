"""The paper's table, row by row: its numbers beside ours.

``--preset tiny`` runs anywhere, on small models that are pre-trained here first, with LoRA as in
the paper; ``--preset qwen2.5-7b`` runs the real ones, which need their weights and a large GPU.
Rows are kept in the result file as they end; those that are there are not run again.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import page, rows, tiny
from benchmarks.paper.rows import CASES, METHODS, Command
from train import jsonl

RESULTS = Path(__file__).resolve().parent.parent / "results"
GRIDS = {"lora": (1e-3, 2e-3, 4e-3, 8e-3), "full": (2.5e-4, 5e-4, 1e-3, 2e-3)}
"""Learning rates; the reference is the best of them."""
PRESETS = ("tiny", "qwen2.5-7b")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, print both tables side by side; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    path = options.results or RESULTS / f"paper_{options.preset}.jsonl"
    if options.preset == "tiny" and not options.list:
        tiny.prepare(options.data_dir)
        _tune(path)
    chosen = [case for case in CASES if not options.rows or case.name in options.rows]
    for case in chosen:
        for method in METHODS:
            rates = _rates(options.preset, path)
            command = rows.command(options.preset, case, method, rates)
            if options.list:
                print(command)
            else:
                _ensure(path, command, row=case.name, method=method)
    if not options.list:
        print(page.table(jsonl.read(path)))
    return 0


def _tune(path: Path) -> None:
    """AdamW over `GRIDS`, judged on the valid split; a grid grows until its best is inside."""
    for kind, grid in GRIDS.items():
        script, size = ("qwen_lora", "7B") if kind == "lora" else ("tinyllama_full", "TinyLlama")
        rates = list(grid)
        for rate in rates:
            command = rows.train_command("tiny", script, size, "adamw", rate, None, f"tune-{kind}")
            _ensure(path, command, row=f"tune-{kind}", method="adamw", rate=rate)
            if rate == rates[-1] == page.tuned(jsonl.read(path), kind):
                rates.append(2 * rate)


def _rates(preset: str, path: Path) -> dict[str, float]:
    """The reference learning rates: given for the large models, tuned for the tiny ones."""
    if preset != "tiny":
        return rows.LARGE_RATES
    records = jsonl.read(path)
    tuned = {kind: page.tuned(records, kind) for kind in GRIDS}
    return {
        kind: grid[1] if math.isnan(tuned[kind]) else tuned[kind] for kind, grid in GRIDS.items()
    }


def _ensure(path: Path, command: Command, **names: Any) -> None:
    """Run a command whose result is not in the file, and keep it there."""
    if not any(r["command"] == str(command) for r in jsonl.read(path)):
        jsonl.append(path, {**names, **_run(command)})


def _run(command: Command) -> dict[str, Any]:
    """One run in a process of its own; it goes on where an earlier one stopped."""
    print(command, file=sys.stderr)
    code = subprocess.run([sys.executable, *str(command).split()[1:]], check=False).returncode
    if code not in (0, 3):
        raise SystemExit(code)
    result = {"perplexity": {"valid": None, "test": None}}  # 3: the guard has given up
    if code == 0:
        result = json.loads((command.out / "result.json").read_text())
        result.pop("options")
    return {**result, "command": str(command), "exit_code": code}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="which models")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[case.name for case in CASES],
        metavar="NAME",
        help=f"only these: {', '.join(case.name for case in CASES)}",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="text for the tiny models, in the layout of WikiText-2 (default: standard library)",
    )
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--results", type=Path, help="result file, JSON Lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
