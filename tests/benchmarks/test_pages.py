"""The pages say what the result files say, and the README's example prints what it shows."""

import re
from pathlib import Path

import pytest

from benchmarks import pages

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text(encoding="utf-8")


def test_pages_are_up_to_date():
    assert pages.main(["--check"]) == 0


def test_a_stale_page_is_named_and_brought_up_to_date(tmp_path, monkeypatch, capsys):
    (tmp_path / "A.md").write_text("<!-- x -->\nold\n<!-- /x -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", {"A.md": {"x": lambda: "new"}})
    monkeypatch.setattr(pages, "WHOLE", {"B.md": lambda: "whole\n"})
    assert pages.main(["--check"]) == 1
    assert "A.md, B.md: not what the result files say" in capsys.readouterr().out
    assert not (tmp_path / "B.md").exists()
    assert pages.main([]) == 0
    assert (tmp_path / "A.md").read_text() == "<!-- x -->\nnew\n<!-- /x -->\n"
    assert (tmp_path / "B.md").read_text() == "whole\n"
    assert pages.main(["--check"]) == 0


def test_a_part_is_replaced_and_the_rest_stays():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!-- y -->\n<!-- /y -->"
    assert pages.fill(page, {"x": "new | \\1"}) == page.replace("old", "new | \\1")


def test_a_missing_part_is_named():
    with pytest.raises(ValueError, match="<!-- x -->"):
        pages.fill("nothing", {"x": "new"})


def test_the_example_prints_what_the_readme_shows(capsys):
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
    code, shown = next(
        (text, blocks[i + 1][1]) for i, (kind, text) in enumerate(blocks) if kind == "python"
    )
    exec(compile(code, "README.md", "exec"), {})
    bare, guarded = map(float, capsys.readouterr().out.split())
    bare_shown, guarded_shown = map(float, shown.split())
    assert guarded == pytest.approx(guarded_shown, abs=0.002)
    # A run that has collapsed ends where rounding leads it, so another machine shows another loss.
    assert min(bare, bare_shown) > 50 * guarded
