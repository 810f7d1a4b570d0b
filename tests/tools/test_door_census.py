"""The page of the census of doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.census.doors import outcome, write

PAGE = """# Coverage

| type | class | norms | converted | result | float64 error | crmsnorm | reasons of the rest |
| --- | --- | --- | --- | --- | --- | --- | --- |
| bloom | BloomForCausalLM | 6 | 6 | complete | 3e-16 | complete |  |
| canine | Canine | 11 | 0 | none |  |  | post-norm 7 |

| module | model | class | norms | converted | result | float64 error | crmsnorm | reasons of the rest |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| beit | beit_base | Beit | 5 | 5 | complete | 1e-15 | complete |  |

| other | table |
| --- | --- |
| bloom | 1 |
"""
ROWS: list[dict[str, Any]] = [
    {"library": "transformers", "name": "bloom", "converted": 6,
     "doors": {"labels": "proved", "hidden_states": "shifted"}},
    {"library": "timm", "name": "beit_base", "converted": 5, "doors": {"forward_features": "SILENT DIFFERENCE"}},
    {"library": "transformers", "name": "canine", "skipped": "no norms"},
]  # fmt: skip


def test_the_column_stands_beside_each_model_and_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "coverage.md"
    path.write_text(PAGE)
    write(path, ROWS)
    path.write_text(f"{path.read_text()}\n## Behind\n\nit stays\n")
    page = path.read_text()
    lines = page.splitlines()
    assert (
        "| bloom | BloomForCausalLM | 6 | 6 | complete | 3e-16 | complete |  | 1 as before; hidden_states shifted |"
        in lines
    )
    assert "| canine | Canine | 11 | 0 | none |  |  | post-norm 7 |  |" in lines
    assert any(line.endswith("| forward_features SILENT DIFFERENCE |") for line in lines)
    assert "| bloom | 1 |" in lines
    assert "3 models, 2 converted: 3 doors, 1 proved, 0 exact, 1 shifted" in page
    write(path, ROWS)
    assert path.read_text() == page


def test_a_difference_that_nobody_lists_is_silent() -> None:
    found = [outcome("labels", error, 1e-10, {"labels"}, {"shifted"}, {"untraced"}) for error in (1e-12, 0.1, -1.0)]
    assert found == ["proved", "SILENT DIFFERENCE", "not called"]
    assert outcome("shifted", 0.1, 1e-10, set(), {"shifted"}, set()) == "shifted"
    assert outcome("untraced", 0.1, 1e-10, set(), set(), {"untraced"}) == "not traced"
