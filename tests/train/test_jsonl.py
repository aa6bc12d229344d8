"""Appending and reading survive a killed writer, and every line is strict JSON."""

import json
import math

from train import jsonl


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    records = [{"a": 1, "σ": [0.5, None]}, {"b": {"c": "x\u2028\x85y"}}]
    assert [jsonl.append(path, record) for record in records] == records
    assert jsonl.read(path) == records


def test_lines_that_belong_together_are_written_together(tmp_path):
    path = tmp_path / "results.jsonl"
    assert jsonl.append(path, {"a": 1}, {"b": math.inf}) == {"b": None}
    assert jsonl.read(path) == [{"a": 1}, {"b": None}]


def test_no_file_holds_no_record(tmp_path):
    assert jsonl.read(tmp_path / "nothing.jsonl") == []


def test_a_torn_line_is_no_record_and_spoils_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    jsonl.append(path, {"cell": 1})
    jsonl.append(path, {"cell": 2, "text": "é"})
    path.write_bytes(path.read_bytes()[:-4])  # within the two bytes of é
    assert jsonl.read(path) == [{"cell": 1}]
    jsonl.append(path, {"cell": 3})
    assert jsonl.read(path) == [{"cell": 1}, {"cell": 3}]


def test_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "results.jsonl"
    record = jsonl.append(path, {"curve": [1.0, math.nan], "deep": {"x": -math.inf}})
    assert record == {"curve": [1.0, None], "deep": {"x": None}}
    json.loads(path.read_text(), parse_constant=_refuse)


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")
