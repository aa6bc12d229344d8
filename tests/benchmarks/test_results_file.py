"""Appending and reading survive a killed writer, and every line is strict JSON."""

import json
import math

from benchmarks import results_file


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    records = [{"a": 1, "σ": [0.5, None]}, {"b": {"c": "x"}}]
    assert [results_file.append(path, record) for record in records] == records
    assert results_file.read(path) == records


def test_no_file_holds_no_record(tmp_path):
    assert results_file.read(tmp_path / "nothing.jsonl") == []


def test_a_torn_line_is_no_record_and_spoils_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    results_file.append(path, {"cell": 1})
    results_file.append(path, {"cell": 2, "text": "é"})
    path.write_bytes(path.read_bytes()[:-4])  # within the two bytes of é
    assert results_file.read(path) == [{"cell": 1}]
    results_file.append(path, {"cell": 3})
    assert results_file.read(path) == [{"cell": 1}, {"cell": 3}]


def test_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "results.jsonl"
    record = results_file.append(path, {"curve": [1.0, math.nan], "deep": {"x": -math.inf}})
    assert record == {"curve": [1.0, None], "deep": {"x": None}}
    json.loads(path.read_text(), parse_constant=_refuse)


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")
