"""The model card: what it keeps of the source's, what it says of the conversion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import normconvert
from normconvert.apply.card_metadata import metadata
from normconvert.apply.model_card import hub_id, model_card, split_front_matter
from normconvert.plan.conversion_plan import Plan, Verdict

README = """---
license: mit
base_model:
- someone/else
language: [en]
tags:
- text  # kept
- normconvert
model-index:
- name: measured
  results:
    - task: {type: text-generation}

    - metrics: []
datasets:
- bible
---
# The model

About it.
"""


def test_the_card_keeps_the_licence_and_the_original_text() -> None:
    plan = Plan(
        "rmsnorm",
        verdicts=[
            Verdict("a.ln", "LayerNorm", True, "fine", "converted"),
            Verdict("b.ln", "LayerNorm", False, "`q | k` reads it", "post-norm"),
        ],
        notes=["mind the gap"],
    )
    card = model_card(
        "org/name@main", plan, {"algebra": 1.234e-16}, auto_class="AutoModelForCausalLM", source_readme=README,
        revision="0123456789abcdef" * 2, name="out", task="text-generation",
    )  # fmt: skip
    front, body = split_front_matter(card)
    lines = front.splitlines()
    assert yaml.safe_load(front) == {
        "license": "mit",
        "language": ["en"],
        "datasets": ["bible"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["text", "normconvert", "rmsnorm"],
        "base_model": "org/name",
        "base_model_relation": "finetune",
    }
    assert "revision [`0123456789ab`](https://huggingface.co/org/name/tree/0123456789abcdef" in body
    assert "license: mit" in lines
    assert lines.count("base_model: org/name") == 1
    assert "someone/else" not in card
    assert "- text" in lines
    assert "1 of 2 norms" in body
    assert "arxiv.org/abs/2305.14858" in body
    assert "| algebra | 1.23e-16 |" in body
    assert "`b.ln` (LayerNorm) | `q \\| k` reads it" in body
    assert "- mind the gap" in body
    assert "# The model\n\nAbout it." in body
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in body


def test_a_card_names_no_local_path(tmp_path: Path) -> None:
    card = model_card(str(tmp_path), Plan("rmsnorm"), library="timm", architecture="vit_tiny_patch16_224")
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "not verified" in card
    assert [hub_id("gpt2"), hub_id("a/b@v1"), hub_id("demo:gpt2"), hub_id("x.safetensors")] == [
        "gpt2",
        "a/b",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: mit\ntags: [a, 'b c']\npipeline_tag: fill-mask", {"license": "mit", "pipeline_tag": "fill-mask"}),
        ("'model-index':\n- name: x\nlicense: mit", {"license": "mit"}),
        ("# a comment\nlicense: mit  # as it was\n", {"license": "mit"}),
        ("{license: mit, model-index: []}", {}),
        ("license: |\nmit\nmodel-index: []", {}),
        ("base_model: x/y\nlibrary_name: peft", {"base_model": "x/y", "library_name": "peft"}),
    ],
)
def test_what_a_front_matter_says_is_kept_but_for_what_was_measured(front: str, kept: dict[str, str]) -> None:
    said = yaml.safe_load(metadata(front, None, "transformers", "fuse-bn", "text-generation"))
    tags = said.pop("tags")
    assert tags == [*(["a", "b c"] if "b c" in front else []), "normconvert", "fuse-bn"]
    assert said == {"library_name": "transformers", "pipeline_tag": "text-generation", **kept}


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
def test_every_block_of_a_timm_card_runs_beside_the_folder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normconvert.convert("demo:vit", tmp_path / "my out", method, verify=False)
    card = (tmp_path / "my out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "model-index" not in card
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(blocks) == {"rmsnorm": 2, "crmsnorm": 1}[method]
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block, scope)
        assert scope["model"](torch.zeros(1, 1, 8, 8)).shape == (1, 10)
