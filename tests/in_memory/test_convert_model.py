"""`convert_model`: what becomes of the module itself, its modes, ties, hooks and caches, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconvert
from normconvert.errors import FidelityError, InputError, NothingToConvert, TraceError
from normconvert.in_memory.editing import put_in
from normconvert.plan.conversion_plan import Plan
from normconvert.runtime import RMSNorm
from tests.support.library_models import NanoGPT, ids, image, lightning, torchvision_resnet
from tests.support.perturb import perturb

CALL = {"idx": ids()}


def gpt(layers: int = 1) -> NanoGPT:
    model = NanoGPT(layers=layers)
    perturb(model)
    return model.double()


def logits(model: nn.Module, call: Any = CALL) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).eval()(**call)[0]
    return found


def state(model: nn.Module) -> dict[str, Any]:
    """All that there is to see of a model."""
    tables = {path: {k: id(v) for k, v in vars(m).items() if k != "_parameters"} for path, m in model.named_modules()}
    hooks = {path: [*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for path, m in model.named_modules()}
    values = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    return {"tables": tables, "hooks": hooks, "kinds": [type(m) for m in model.modules()], "values": values}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert {k: v for k, v in a.items() if k != "values"} == {k: v for k, v in b.items() if k != "values"}
    for name, (identity, value, wanted) in a["values"].items():
        other = b["values"][name]
        assert (identity, wanted) == (other[0], other[2])
        assert torch.equal(value, other[1]), name


def test_in_place_the_model_stays_the_object_that_it_is_and_so_do_its_parameters() -> None:
    model = gpt()
    model.lm_head.weight.requires_grad_(False)
    model.eval().transformer["h"].train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before, parameters = logits(model), dict(model.named_parameters(remove_duplicate=False))
    modes = {path: module.training for path, module in model.named_modules()}
    converted, report = normconvert.convert_model(model, example_inputs=CALL, inplace=True)
    assert converted is model
    assert report.converted == 3
    assert isinstance(model.get_submodule("transformer.ln_f"), RMSNorm)
    assert dict(model.named_parameters(remove_duplicate=False)).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert model.transformer["wte"].weight is model.lm_head.weight, "tied as it was"
    assert not model.lm_head.weight.requires_grad
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert all(p in set(model.parameters()) for group in optimizer.param_groups for p in group["params"])
    assert float((logits(model) - before).norm() / before.norm()) < 1e-12


def test_a_tie_goes_where_the_plan_says_so() -> None:
    model = gpt()
    before = logits(model)
    converted, report = normconvert.convert_model(model, example_inputs=CALL, tied="untie", verify="quick")
    assert not any(edit["op"] == "center" for edit in report.plan.modules)
    assert converted.transformer["wte"].weight is not converted.lm_head.weight
    assert model.transformer["wte"].weight is model.lm_head.weight
    assert float((logits(converted) - before).norm() / before.norm()) < 1e-12


def test_a_model_that_differs_or_cannot_be_edited_as_a_whole_stays_as_it_was() -> None:
    model = gpt()
    before = state(model)
    with pytest.raises(FidelityError, match="the model is as it was") as caught:
        normconvert.convert_model(model, example_inputs=CALL, inplace=True, limits={"algebra": 1e-30})
    assert caught.value.report.fidelity.algebra > 1e-30  # type: ignore[attr-defined]
    assert_same(state(model), before)
    plan = normconvert.inspect(model, "crmsnorm", example_inputs=CALL).plan
    broken = Plan("crmsnorm", modules=[*plan.modules, {"op": "absorb", "path": "nowhere", "keep": []}])
    with pytest.raises(InputError, match=r"the plan does not fit the model: .*no module 'nowhere'"):
        put_in(model, broken, {})
    assert_same(state(model), before)
    late = Plan("crmsnorm", tensors={"lm_head.weight": [{"op": "center", "axis": 1}]}, modules=plan.modules)
    with pytest.raises(AttributeError):  # the last step of all
        put_in(model, late, {"lm_head.weight": None})  # type: ignore[dict-item]
    assert_same(state(model), before)


class Recorder:
    """A hook that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.detach())

    def __deepcopy__(self, memo: Any) -> Recorder:
        return self


def test_what_a_hook_is_given_stays_what_it_was() -> None:
    model, seen = gpt(2).eval(), Recorder()
    model.transformer["h"][0].register_forward_hook(seen)
    report = normconvert.inspect(model, example_inputs=CALL)
    assert {(v.code, "a hook of transformer.h.0 is given" in v.reason) for v in report.plan.kept} == {
        ("returned", True)
    }
    assert report.converted == 0
    made, example = lightning()
    network: Any = perturb(made).double().eval()
    network.net[0].register_forward_hook(seen)
    fused, report = normconvert.convert_model(network, "fuse-bn", example_inputs=example, verify="quick")
    assert report.plan.verdicts[0].reason.startswith("into relu"), "not into the convolution before it"
    seen.seen.clear()
    network(example[0].double()), fused(example[0].double())
    assert torch.equal(*seen.seen)
    network.net[2] = nn.GELU()
    with pytest.raises(NothingToConvert, match="before it, the model returns what it reads"):
        normconvert.convert_model(network, "fuse-bn", example_inputs=example)
    open_model = gpt(2)
    open_model.transformer["ln_f"].register_forward_hook(seen)  # it is given the norm's input, the stream, as well
    assert normconvert.inspect(open_model, example_inputs=CALL).converted == 0


def test_hooks_of_transformers_keep_nothing_that_is_not_returned() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = perturb(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)))
    model.double().eval()
    idx = torch.arange(10).reshape(1, 10)
    before = model(idx, output_hidden_states=True)  # its hooks for them stay
    model.enable_input_require_grads()  # as gradient checkpointing asks for
    assert any(module._forward_hooks for module in model.modules())
    converted, report = normconvert.convert_model(model, verify="quick")
    assert report.converted == 5
    after = converted(idx, output_hidden_states=True)
    assert float((after.logits - before.logits).norm() / before.logits.norm()) < 1e-12
    centred = before.hidden_states[1] - before.hidden_states[1].mean(-1, keepdim=True)
    torch.testing.assert_close(after.hidden_states[1], centred)


class Holder:
    """An object that is no container to anybody."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Boxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.box, self.norm = nn.Identity(), nn.LayerNorm(8)
        self.embed = nn.Embedding(11, 8)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        self.box([({"deep": x}, 3)])
        return self.norm(x)


def test_what_a_hook_is_given_is_found_in_containers_and_refused_in_objects() -> None:
    model: Any = perturb(Boxed()).double()
    call = {"idx": ids(11)}
    assert normconvert.inspect(model, example_inputs=call).converted == 1
    model.box.register_forward_pre_hook(lambda module, args: None)
    assert {v.code for v in normconvert.inspect(model, example_inputs=call).plan.kept} == {"returned"}

    class InObject(Boxed):
        def forward(self, idx: Tensor) -> Tensor:
            x = self.embed(idx)
            self.box(Holder(x))
            return self.norm(x)

    other: Any = perturb(InObject()).double()
    other.box.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(TraceError, match="a hook of box is given a Holder, which may hold anything"):
        normconvert.inspect(other, example_inputs=call)


class CachedHead(nn.Module):
    """Scores by cosine with the table; the normalised table is worked out once while the model does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.other = nn.Embedding(11, 8)
        self._head: Tensor | None = None
        self.scale = torch.tensor([2.0], dtype=torch.float64)

    def forward(self, idx: Tensor) -> Tensor:
        if self._head is None or self.training:
            self._head = F.normalize(self.embed.weight, dim=-1)
        y = self.norm(self.linear(self.other(idx)) + self.embed(idx))
        return y @ self._head.t() * self.scale


@pytest.mark.parametrize("inplace", [True, False])
def test_what_a_model_keeps_of_its_weights_is_forgotten(inplace: bool) -> None:
    model = CachedHead()
    perturb(model).double().eval()
    idx = ids(11)
    before = model(idx).detach()  # the head is kept from here on, and with it who reads the table
    converted, report = normconvert.convert_model(model, example_inputs=(idx,), inplace=inplace, min_gain=1)
    assert not any("embed" in name for name in report.plan.tensors), "the table's other reader was seen"
    assert converted._head is None
    assert (model._head is None) == inplace
    assert torch.allclose(converted(idx), before, rtol=0, atol=1e-12)
    assert converted.scale is not None, "a constant that nobody works out again"


class Branching(nn.Module):
    """Gives its stream away where the text is long."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        return x if idx.shape[1] > 4 else self.norm(x)


def test_what_is_proved_is_the_calls_that_are_given() -> None:
    model = perturb(Branching()).double()
    short, long = {"idx": ids(11, 3)}, {"idx": ids(11, 9)}
    assert normconvert.convert_model(model, example_inputs=short)[1].converted == 1
    with pytest.raises(NothingToConvert, match="none of 1 norms"):
        normconvert.convert_model(model, example_inputs=[short, long])
    noted = normconvert.inspect(gpt(), example_inputs=CALL)
    assert noted.plan.untraced_doors == ["targets"]
    assert "not proved for targets" in noted.notes


def test_other_ways_into_a_model_are_named_as_not_proved() -> None:
    class Encoder(NanoGPT):
        def encode_text(self, idx: Tensor) -> Tensor:
            x: Tensor = self.transformer["wte"](idx)
            return x

        def generate(self, idx: Tensor) -> Tensor:
            return idx

    assert normconvert.inspect(Encoder(), example_inputs=CALL).plan.untraced_doors == ["targets", "encode_text"]


def test_weights_lie_in_memory_as_they_did() -> None:
    model, example = torchvision_resnet()
    model = perturb(model).to(memory_format=torch.channels_last)
    fused, _ = normconvert.convert_model(model, "fuse-bn", example_inputs=example, verify="quick")
    assert fused.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not fused.conv1.weight.is_contiguous()


def test_a_branch_on_the_number_of_samples_is_run_by_the_verification() -> None:
    class OnBatch(Branching):
        def forward(self, idx: Tensor) -> Tensor:
            x = self.embed(idx)
            return self.norm(x) if len(idx) < 3 else x

    with pytest.raises(FidelityError, match="probe 'one-more'"):
        normconvert.convert_model(perturb(OnBatch()).double(), example_inputs=(ids(11),))


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm"])
def test_half_precision_is_rounded_once(method: str) -> None:
    model = gpt().bfloat16()
    converted, report = normconvert.convert_model(model, method, example_inputs=CALL)
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert report.fidelity is not None
    assert report.fidelity.storage is not None
    assert report.fidelity.storage <= 0.51
    assert (report.dtype, report.stored) == ("bfloat16", "bfloat16")


def test_models_of_transformers_and_timm_need_no_example() -> None:
    import timm
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 40}
    model = perturb(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)))
    converted, report = normconvert.convert_model(model, verify="quick")
    assert (report.converted, report.library) == (3, "transformers")
    assert set(report.plan.doors) == {"inputs_embeds", "labels", "use_cache"}
    assert normconvert.verify(model, converted).passed
    vit = perturb(timm.create_model("levit_128s", num_classes=5)).eval()
    vit(image(224))  # it keeps tables of its weights for as long as it does not train
    fused, report = normconvert.convert_model(vit, "fuse-bn", inplace=True, verify="quick")
    assert report.plan.kept == []
    assert report.library == "timm"
    assert fused is vit


def test_two_models_are_verified() -> None:
    model = gpt()
    other = copy.deepcopy(model)
    assert normconvert.verify(model, other, example_inputs=CALL).passed
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    found = normconvert.verify(model, other, example_inputs=CALL)
    assert not found.passed
    assert "float64 outputs differ" in found.reasons[0]
    resnet, example = torchvision_resnet()
    perturb(resnet)
    fused, _ = normconvert.convert_model(resnet, "fuse-bn", example_inputs=example, verify=None)
    assert normconvert.verify(resnet, fused, example_inputs=example, level="quick").passed


class Positional(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0]


def shared_memory() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight)
    return nn.Sequential(first, second)


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


X = (torch.zeros(2, 4),)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no example": (lambda: normconvert.convert_model(gpt()), "NanoGPT is a model of neither .* say how it is called"),
    "a path": (lambda: normconvert.convert_model("gpt2"), "model: found str, expected a torch.nn.Module"),  # type: ignore[arg-type]
    "another call": (
        lambda: normconvert.convert_model(gpt(), example_inputs={"ids": ids()}),
        r"example_inputs do not fit NanoGPT.forward\(.*: missing a required argument: 'idx'",
    ),
    "a number": (lambda: normconvert.convert_model(gpt(), example_inputs=3), "found int; expected a tuple, a dict"),
    "no tensor": (lambda: normconvert.convert_model(gpt(), example_inputs=(3,)), "example_inputs hold no tensor"),
    "none": (lambda: normconvert.convert_model(gpt(), example_inputs=[]), "an empty list"),
    "positional": (lambda: normconvert.convert_model(Positional(), example_inputs=X), "takes 'args' by its position"),
    "wrapped": (
        lambda: normconvert.convert_model(nn.DataParallel(gpt()), example_inputs=CALL),
        "DataParallel wraps",
    ),
    "compiled": (
        lambda: normconvert.convert_model(torch.compile(gpt()), example_inputs=CALL),  # type: ignore[arg-type]
        "OptimizedModule wraps",
    ),
    "empty": (lambda: normconvert.convert_model(gpt().to("meta"), example_inputs=CALL), "has no values"),
    "inference": (lambda: normconvert.convert_model(inferred(), example_inputs=X), "was made in inference mode"),
    "shared": (lambda: normconvert.convert_model(shared_memory(), example_inputs=X), "share memory and are two"),
    "level": (lambda: normconvert.convert_model(gpt(), example_inputs=CALL, verify="much"), "unknown verify 'much'"),
    "convert": (lambda: normconvert.convert(gpt(), "out"), r"convert\(\) reads a checkpoint, .*convert_model"),  # type: ignore[arg-type]
    "convert, no out": (lambda: normconvert.convert(gpt()), r"convert\(\) reads a checkpoint, .*convert_model"),  # type: ignore[arg-type]
    "load": (lambda: normconvert.export(gpt(), "x.onnx"), r"export\(\) reads a checkpoint"),  # type: ignore[arg-type]
    "both": (lambda: normconvert.verify(gpt(), "out"), "two checkpoints, or two models in memory: found one of each"),
    "a checkpoint": (lambda: normconvert.inspect("demo:gpt2", example_inputs=X), "example_inputs are for models"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_does_not_run_says_so() -> None:
    with pytest.raises(TraceError, match=r"could not be traced: .*got \[2, 4\] X \[3, 4\]"):
        normconvert.convert_model(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), example_inputs=X)


def test_weights_that_are_not_finite_are_refused_before_anything_is_computed() -> None:
    model = gpt()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="holds a value that is NaN"):
        normconvert.convert_model(model, example_inputs=CALL)
