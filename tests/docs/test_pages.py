"""Pages that several tools write: each replaces its own section and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.docs.pages import sections, write_section

ORDER = ["first", "second.part", "third-part"]


def test_sections_stand_in_their_order_whoever_writes_first(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    for name in ("third-part", "first", "second.part"):
        write_section(page, name, f"## {name}\n\nA line.\n", ORDER)
    before, found = sections(page.read_text())
    assert before == ""
    assert found == {name: f"## {name}\n\nA line.\n" for name in ORDER}
    assert list(found) == ORDER


def test_a_section_is_replaced_and_all_else_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    title = "# Title\n\n<!-- a note of several words -->\nIntroduction.\n"
    page.write_text(f"{title}\n<!-- own -->\nOwn.\n\n<!-- second.part -->\nOld.\n")
    write_section(page, "second.part", "New.\n\n<!-- a note of several words -->", ORDER)
    once = page.read_text()
    before, found = sections(once)
    assert before == title
    assert found == {"second.part": "New.\n\n<!-- a note of several words -->\n", "own": "Own.\n"}
    write_section(page, "second.part", "New.\n\n<!-- a note of several words -->", ORDER)
    assert page.read_text() == once, "writing the same again changes nothing"


@pytest.mark.parametrize(("name", "text"), [("two words", "Text."), ("first", "Text.\n<!-- second.part -->\nMore.\n")])
def test_what_would_break_the_page_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ValueError, match="section"):
        write_section(tmp_path / "page.md", name, text, ORDER)
    assert not (tmp_path / "page.md").exists()
