"""The snippets of docs/python.md about models in memory run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import normconvert

PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_the_snippets_of_models_in_memory_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").split("## Models in memory\n")[1].split("\nAll of the following")[0]
    *snippets, factory = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 4
    names: dict[str, object] = {"__name__": "python_page"}
    for snippet in snippets:
        exec(compile(snippet, "python.md", "exec"), names)
    assert (tmp_path / "plan.json").is_file()

    (tmp_path / "my_code.py").write_text(snippets[0].partition("\nnet, x = ")[0])
    (tmp_path / "net.py").write_text(factory)
    net = names["Net"]()  # type: ignore[operator]
    assert isinstance(net, nn.Module)
    torch.save(net.state_dict(), tmp_path / "last.pt")
    report = normconvert.convert("last.pt", "out", arch="net.py:small", trust_remote_code=True)
    assert report.converted == 3
    normconvert.load("out", arch="net.py:small", trust_remote_code=True)
