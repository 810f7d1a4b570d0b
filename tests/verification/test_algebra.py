"""The plan replayed where the original lies: the same bits as beside it, and nothing of the original is read late."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from normconvert.api import convert, verify
from normconvert.files.digest import sha256
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.probes import Probe
from normconvert.verification.algebra import algebra_model, named_tensors
from normconvert.verification.equivalence import verify_models
from normconvert.verification.proof import Edited, prove
from normconvert.verification.proof import Test as Setting
from tests.support.basis_models import MODELS, built, skeleton
from tests.support.perturb import perturb

SIZE = 16
Edits = dict[str, list[dict[str, Any]]]


def both(make: Any, plan: Plan) -> tuple[nn.Module, nn.Module]:
    """The edited model beside the original, and in its memory."""
    return algebra_model(make(), plan), algebra_model(make(), plan, spend=True)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = named_tensors(one), named_tensors(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


LAYERNORM, BASES = ["rmsnorm", "crmsnorm"], ["fold", "rotate", "scale"]
CASES = [(name, method) for name in ("gpt2", "bloom") for method in (*LAYERNORM, *BASES)]
CASES += [(name, method) for name in ("llama tied", "gemma") for method in BASES]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_same_bits_in_the_original_s_memory(name: str, method: str) -> None:
    assert name in MODELS
    plan = plan_model(skeleton(name), Options(seed=3, power="2"), method)
    assert plan.tensors
    assert_same(*both(lambda: built(name).double(), plan))


class Layers(nn.Module):
    """Two maps, a table, and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300 * SIZE, SIZE * SIZE)  # too large to be kept aside
        self.up = nn.Linear(SIZE * SIZE, 300 * SIZE)
        self.gain = nn.Parameter(torch.randn(SIZE * SIZE))
        self.head = nn.Linear(SIZE * SIZE, 300 * SIZE, bias=False)
        self.head.weight = self.table.weight
        self.long, self.other = (nn.Parameter(torch.rand(1 << 18) + 0.5) for _ in range(2))
        self.register_buffer("scale", torch.rand(SIZE * SIZE) + 0.5)
        perturb(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x) * self.scale + self.gain) + self.up.bias


SCALE: dict[str, Any] = {"op": "scale", "axis": 1, "by": "gain"}
CENTER: dict[str, Any] = {"op": "center", "axis": 1}
PLANS: dict[str, Edits] = {
    "a bias reads a large weight that is edited": {
        "up.weight": [SCALE],
        "up.bias": [{"op": "add_product", "weight": "up.weight", "axis": 1, "by": "gain"}],
        "gain": [{"op": "fill", "value": 1.0}],
    },
    "a vector reads itself": {"gain": [{"op": "scale", "axis": 0, "by": "gain"}]},
    "a large tensor reads itself": {
        "up.weight": [{"op": "copy", "from": "up.weight"}, CENTER],
        "up.bias": [{"op": "add_product", "weight": "up.weight", "axis": 1, "by": "gain"}],
    },
    "large tensors read each other": {
        "up.weight": [{"op": "copy", "from": "table.weight"}, CENTER],
        "table.weight": [{"op": "copy", "from": "up.weight"}, SCALE],
    },
    "long vectors read each other": {
        "long": [{"op": "scale", "axis": 0, "by": "other"}],
        "other": [{"op": "scale", "axis": 0, "by": "long"}],
    },
    "one takes what another has, and is read": {
        "up.weight": [{"op": "copy", "from": "table.weight"}, CENTER],
        "table.weight": [SCALE],
        "up.bias": [{"op": "add_product", "weight": "up.weight", "axis": 1, "by": "gain"}],
    },
    "a tied table is edited": {"table.weight": [SCALE]},
    "a tied table is edited under both names": {"table.weight": [SCALE], "head.weight": [SCALE]},
    "a tied head is untied": {
        "head.weight": [{"op": "copy", "from": "table.weight"}, SCALE],
        "table.weight": [CENTER],
        "gain": [{"op": "fill", "value": 1.0}],
    },
    "a buffer is edited and read": {
        "scale": [{"op": "scale", "axis": 0, "by": "gain"}],
        "up.weight": [{"op": "scale", "axis": 1, "by": "scale"}],
    },
    "a shape changes": {"gain": [{"op": "drop", "axis": 0}], "up.weight": [SCALE]},
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_no_edit_reads_what_another_has_written(name: str, reverse: bool) -> None:
    torch.manual_seed(0)
    model = Layers().double()
    rows = dict(reversed(PLANS[name].items())) if reverse else PLANS[name]
    assert_same(*both(lambda: copy.deepcopy(model), Plan("rmsnorm", tensors=rows)))


def test_memory_that_two_share_is_edited_for_one_of_them() -> None:
    model = Layers().double()
    model.up.weight = nn.Parameter(model.table.weight.detach().view(300 * SIZE, SIZE * SIZE))
    shared = algebra_model(model, Plan("rmsnorm", tensors={"up.weight": [SCALE]}), spend=True)
    expected = model.table.weight * model.gain
    assert torch.equal(named_tensors(shared)["up.weight"], expected)
    assert torch.equal(named_tensors(shared)["table.weight"], model.table.weight)


def test_it_is_the_original_s_memory() -> None:
    model = Layers().double()
    before = model.up.weight.data_ptr()
    spent = algebra_model(
        model, Plan("rmsnorm", tensors=PLANS["a bias reads a large weight that is edited"]), spend=True
    )
    assert named_tensors(spent)["up.weight"].data_ptr() == before
    assert named_tensors(algebra_model(model, Plan("rmsnorm")))["up.weight"].data_ptr() != before


class ReturnsItsWeight(nn.Module):
    """One output is a parameter itself, as prompts and position tables are in some models."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.table = nn.Linear(SIZE, SIZE), nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.map(x), self.table


def test_an_output_that_is_a_parameter_is_still_the_original_s() -> None:
    model = ReturnsItsWeight().double()
    wrong = Plan("rmsnorm", tensors={"table": [{"op": "center", "axis": 0}]})
    setting = Setting((Probe("x", {"x": torch.randn(3, SIZE)}, True),), torch.float64, 0, frozenset(), 1e-10)
    for again in (None, lambda: copy.deepcopy(model)):
        found = prove(copy.deepcopy(model), Edited(plan=wrong, again=again), setting)
        assert found.worst is not None
        assert found.distances[found.worst].relative > 0.1


def test_a_wrong_plan_is_found_and_located_by_the_original_made_again() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=40)).eval()
    perturb(model)
    wrong = Plan("rmsnorm", tensors={"transformer.h.1.mlp.c_fc.weight": [{"op": "times", "exponent": 1}]})
    made = [0]

    def truth() -> nn.Module:
        made[0] += 1
        return copy.deepcopy(model).double()

    fidelity = verify_models(
        truth=truth, algebra=None, plan=wrong, original=model, from_files=True,
        converted=lambda: algebra_model(copy.deepcopy(model).double(), wrong).float(),
        probes=[Probe("x", {"input_ids": torch.arange(24).reshape(2, 12)}, True)],
    )  # fmt: skip
    assert not fidelity.passed
    assert fidelity.worst_module == "transformer.h.1.mlp.c_fc"
    assert made[0] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_file_of_the_source_is_touched(tmp_path: Path, dtype: torch.dtype) -> None:
    config = hf.GPTNeoXConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model: Any = perturb(hf.GPTNeoXForCausalLM(config))
    model.to(dtype).save_pretrained(tmp_path / "a")
    files = sorted((tmp_path / "a").iterdir())
    before = [sha256(file) for file in files]
    convert(str(tmp_path / "a"), tmp_path / "b", "rotate")
    assert verify(str(tmp_path / "a"), str(tmp_path / "b")).passed
    assert [sha256(file) for file in files] == before
