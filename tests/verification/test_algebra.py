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
from normconvert.verification import proof
from normconvert.verification.algebra import algebra_model, named_tensors
from normconvert.verification.equivalence import verify_models
from normconvert.verification.proof import Edited, prove
from normconvert.verification.proof import Test as Setting
from normconvert.verification.stored_weights import with_exact_weights
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
    for again in (None, lambda: copy.deepcopy(model)):
        found = prove(copy.deepcopy(model), Edited(plan=wrong, again=again), setting())
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


def setting(tolerance: float = 1e-10) -> Setting:
    torch.manual_seed(1)
    return Setting(
        (Probe("x", {"x": torch.randn(3, SIZE, dtype=torch.float64)}, True),), torch.float64, 0, frozenset(), tolerance
    )


class Noisy(nn.Module):
    """Each one that is made adds other numbers, as buffers that no checkpoint holds may."""

    def __init__(self, kind: torch.dtype = torch.float64, eps: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map, self.kind, self.eps = nn.Linear(SIZE, SIZE), kind, eps
        torch.seed()
        self.register_buffer("noise", torch.randn(SIZE), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Remembers the dtype in which it was loaded.
        return self.map(x.to(self.kind).to(self.map.weight.dtype)) * (1.0 + self.eps) + self.noise


CENTRED = Plan("rmsnorm", tensors={"map.weight": [{"op": "times", "exponent": 0}]})


@pytest.mark.parametrize("eps", [0.0, 3e-9])
def test_an_original_that_is_another_one_when_it_is_made_again_widens_no_tolerance(eps: float) -> None:
    def again() -> nn.Module:
        return Noisy().double()

    edited = Edited(plan=CENTRED, converted=Noisy(eps=eps).double(), again=again)
    found = prove(again(), edited, setting())
    assert found.worst is not None
    assert (found.distances[found.worst].relative > 1e-10) == (eps > 0.0)
    assert not found.tolerances


def test_what_is_loaded_again_in_float64_has_the_numbers_of_the_original_that_was_run() -> None:
    edited = Edited(
        plan=CENTRED, converted=Noisy(torch.float32), reload=lambda: Noisy().double(), again=lambda: Noisy().double()
    )
    found = prove(Noisy().double(), edited, setting())
    assert found.worst is not None
    assert found.distances[found.worst].relative <= 1e-15


def test_memory_of_the_result_is_not_the_original_s_to_spend() -> None:
    truth = Noisy().double()
    plan = Plan("rmsnorm", tensors={"map.weight": [{"op": "times", "exponent": 1}]})
    # A module of a file of the user's may hand the same parameter to all models.
    converted = Noisy().double()
    converted.map.weight = truth.map.weight
    found = prove(truth, Edited(plan=plan, converted=converted, again=lambda: Noisy().double()), setting())
    assert found.stored is not None
    assert not found.stored.passed


def test_what_dtype_numbers_have_is_asked_before_they_are_edited() -> None:
    original, converted = Noisy(), Noisy()
    original.map.weight.data = original.map.weight.data.bfloat16().double()
    exact = original.map.weight.detach() / 3.0
    converted.map.weight.data = exact.bfloat16().float()  # stored in bfloat16, read by a model in float32
    original.double()

    def edited(seen: Any) -> nn.Module:
        original.map.weight.data.div_(3.0)
        seen("map.weight", original.map.weight.data)
        return original

    stored, _ = with_exact_weights(converted, edited, original)
    assert stored.passed, stored


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("spend", [False, True])
def test_a_tensor_without_memory_of_its_own_kind_is_in_no_way(persistent: bool, spend: bool) -> None:
    def make() -> nn.Module:
        model = ReturnsItsWeight().double()
        sparse = torch.eye(SIZE, dtype=torch.float64).to_sparse()
        model.register_buffer("links", sparse, persistent=persistent)
        model.load_state_dict(kept, strict=False)
        return model

    kept = ReturnsItsWeight().double().state_dict()
    plan = Plan("rmsnorm", tensors={"map.weight": [{"op": "times", "exponent": 0}]})
    found = prove(make(), Edited(plan=plan, converted=make(), again=make if spend else None), setting())
    assert found.stored is not None
    assert found.stored.units == 0.0


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_tensors_that_a_source_holds_itself_are_not_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = hf.GPTNeoXConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model: Any = perturb(hf.GPTNeoXForCausalLM(config))
    model.save_pretrained(tmp_path / "a")
    if kind == "pickle":
        (tmp_path / "a" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    spent: list[bool] = []

    def noting(*given: Any, spend: bool, **options: Any) -> nn.Module:
        spent.append(spend)
        return algebra_model(*given, spend=spend, **options)

    monkeypatch.setattr(proof, "algebra_model", noting)
    convert(str(tmp_path / "a"), tmp_path / "b", "rotate")
    verify(str(tmp_path / "a"), str(tmp_path / "b"))
    assert spent == [kind == "safetensors"] * 2


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
