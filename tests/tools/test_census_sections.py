"""A census writes its own section of a page and leaves the others as they are."""

from __future__ import annotations

from pathlib import Path

from tools.census.sections import write_under


def test_a_section_is_replaced_where_it_stands_and_else_put_at_the_end(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## A\n\nold\n\n## B\n\nkept\n", encoding="utf-8")
    write_under(page, "## A", ["## A", "", "new", ""])
    assert page.read_text(encoding="utf-8") == "# Page\n\n## A\n\nnew\n\n## B\n\nkept\n"
    write_under(page, "## C", ["## C", "", "last"])
    assert page.read_text(encoding="utf-8") == "# Page\n\n## A\n\nnew\n\n## B\n\nkept\n\n## C\n\nlast\n"
