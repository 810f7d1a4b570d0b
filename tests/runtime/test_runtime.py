"""The norm and the module edits: right in every mode torch runs modules in, and without side effects on the model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.runtime import MODULE_EDITS, Center, RMSNorm, apply_module_edits, center, kernels
from tests.support.equivalence import computed, distance

EPS = 1e-3  # large, so that a forgotten epsilon shows
TOLERANCE = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def mean_free(*shape: int, axis: int = -1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return (x - x.mean(axis, keepdim=True)).to(dtype)


def norm(size: int = 48, dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any) -> RMSNorm:
    weight, shift = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size)) if bias else None
    return RMSNorm(size, EPS, weight=weight, bias=shift, **options).to(dtype)


def definition(x: Tensor, module: RMSNorm) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset) + bias in float64."""
    axis = module.axis % x.ndim
    shape = [-1] + [1] * (x.ndim - 1 - axis)
    x = x.double()
    y = x / (x.square().mean(axis, keepdim=True) + module.eps).sqrt()
    weight, bias = module.get_parameter("weight").double(), module._parameters["bias"]
    y = y * (weight.reshape(shape) + module.offset)
    return y if bias is None else y + bias.double().reshape(shape)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 48), -1), ((48,), -1), ((2, 48, 3, 4), -3), ((2, 48, 3, 4), 1)])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"bias": False}])
@pytest.mark.parametrize("mode", ["eager", "autograd", "compiled", "exported"])
def test_every_kernel_computes_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], axis: int, options: dict[str, Any], mode: str
) -> None:
    module = norm(dtype=dtype, axis=axis, **options)
    x = mean_free(*shape, axis=axis, dtype=dtype)
    truth = definition(x, module)
    y = computed(module, x, mode)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert distance(y, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", [kernels.formula, kernels.fused_rms])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
def test_the_kernels_do_not_need_a_mean_free_input(kernel: kernels.Kernel, affine: tuple[bool, bool]) -> None:
    """RMSNorm stays RMSNorm when training or an adapter shifts the stream."""
    x = torch.randn(3, 48, dtype=torch.float64) + 2
    weight, bias = (torch.randn(48, dtype=torch.float64) if has else None for has in affine)
    truth = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    truth = truth if weight is None else truth * weight
    truth = truth if bias is None else truth + bias
    with torch.no_grad():
        assert distance(kernel(x, weight, bias, -1, EPS), truth) < 1e-15


def test_sixteen_bit_inputs_accumulate_in_float32() -> None:
    x = torch.full((1, 4096), 60000.0, dtype=torch.float16)  # the sum of squares overflows float16 at once
    x[:, ::2] *= -1
    module = RMSNorm(4096, EPS)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(module(x), x.sign())


def test_large_and_tiny_float32_inputs_are_exact_too() -> None:
    module = norm(dtype=torch.float32)
    for scale in (1e-4, 1e4):
        x = mean_free(3, 48, dtype=torch.float32) * scale
        with torch.no_grad():
            assert distance(module(x), definition(x, module)) < 2e-7


def _norm_of(model: nn.Module) -> RMSNorm:
    found = model.get_submodule("0")
    assert isinstance(found, RMSNorm)
    return found


@pytest.mark.parametrize("mode", ["eval", "train", "no gradients", "reloaded"])
def test_it_is_rmsnorm_whatever_it_saw_before(mode: str) -> None:
    """On call 1 and on call 600, on inputs whose mean is zero and then is not: the module has one meaning."""
    model = nn.Sequential(nn.LayerNorm(48).double())
    apply_module_edits(model, [row("0", size=48, mean_free=True, folded=True)])
    model.train(mode == "train")
    nn.init.normal_(model[0].get_parameter("weight"))
    nn.init.normal_(model[0].get_parameter("bias"))
    shifted = torch.randn(2, 48, dtype=torch.float64) + 1
    with torch.set_grad_enabled(mode in ("eval", "train")):
        assert distance(model(shifted), definition(shifted, _norm_of(model))) < 1e-15
        for _ in range(598):
            model(mean_free(2, 48))
        if mode == "reloaded":
            model = pickle.loads(pickle.dumps(model))
        assert distance(model(shifted), definition(shifted, _norm_of(model))) < 1e-15


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 700, 48)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_the_proof_says_of_a_norm_changes_nothing_that_is_computed(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Rows of checkpoints say ``mean_free`` and ``folded``."""
    results = []
    x = torch.randn(*shape).to(dtype)
    for facts in ({}, {"mean_free": True}, {"mean_free": True, "folded": True}):
        model = nn.Sequential(nn.LayerNorm(48).to(dtype)).eval()
        nn.init.constant_(model[0].get_parameter("weight"), 1.5)
        apply_module_edits(model, [row("0", size=48, **facts)])
        with torch.no_grad():
            results.append(model(x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_kernel_follows_from_the_call_alone() -> None:
    x, vector = torch.randn(2, 48), torch.randn(48)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert kernels.choose_kernel(x, vector, vector, -1) is kernels.formula
            assert kernels.choose_kernel(x, vector.double(), None, 0) is kernels.formula


def test_it_works_under_vmap_and_jit_trace() -> None:
    module = norm().eval()
    x = mean_free(5, 2, 48)
    with torch.no_grad():
        truth = definition(x, module)
        assert distance(torch.func.vmap(module)(x), truth) < 1e-15
        assert distance(torch.jit.trace(module, (x,), check_trace=False)(x), truth) < 1e-15


def test_gradients_are_those_of_the_definition() -> None:
    for axis, shape in ((-1, (3, 6)), (-3, (2, 6, 2, 2))):
        module = norm(6, axis=axis, offset=0.5)
        x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, (x,))


def test_it_does_not_write_to_its_input_or_parameters() -> None:
    module = norm(dtype=torch.float32)
    x = torch.randn(64, 48)
    before = [t.clone() for t in (x, *module.parameters())]
    with torch.no_grad():
        module(x)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *module.parameters()), strict=True))


def test_autocast_keeps_the_norm_in_the_dtype_of_its_input() -> None:
    block = nn.Sequential(nn.Linear(48, 48), norm(dtype=torch.float32), nn.Linear(48, 48))
    x = torch.randn(4, 48)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            assert distance(block(x), block.double()(x.double())) < 2e-2
        block.float()


def test_export_keeps_one_norm_operator() -> None:
    program = torch.export.export(norm(dtype=torch.float32, bias=False), (torch.randn(2, 48),))
    assert "rms_norm" in " ".join(str(node.target) for node in program.graph.nodes)


def test_print_shows_the_norm() -> None:
    assert repr(norm(offset=1.0, axis=-3)) == "RMSNorm(48, eps=0.001, axis=-3, offset=1.0, weight=True, bias=True)"


# -- module edits ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose second norm is the very same module as another block's."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.shared = shared
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.shared(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([Block(shared), Block(shared)])
        self.last = nn.LayerNorm(8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def row(path: str, **change: Any) -> dict[str, Any]:
    plain = {"op": "replace", "path": path, "kind": "rmsnorm", "size": 8, "eps": 1e-5, "axis": -1}
    return {**plain, "weight": "weight", "bias": "bias", "offset": 0.0, "upcast": False, **change}


def test_replacing_keeps_parameters_names_mode_and_sharing() -> None:
    model = Net().eval()
    state = model.state_dict(keep_vars=True)
    apply_module_edits(model, [row("blocks.0.norm"), row("blocks.1.shared"), row("last", bias=None)])
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    first, second = model.get_submodule("blocks.0"), model.get_submodule("blocks.1")
    assert {type(module).__name__ for module in (first.shared, second.shared, first.norm)} == {"RMSNorm"}
    assert first.shared is second.shared
    assert isinstance(second.norm, nn.LayerNorm)  # not in the plan
    assert not any(module.training for module in model.modules())
    last: Any = model.last
    assert last.bias is None
    assert last.normalized_shape == (8,)
    assert last.eps == 1e-5


def test_a_hook_on_a_norm_survives_its_replacement() -> None:
    model = Net()
    seen: list[str] = []
    model.last.register_forward_hook(lambda *_: seen.append("hook"))
    apply_module_edits(model, [row("last", bias=None)])
    model(torch.randn(2, 8))
    assert seen == ["hook"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (row("blocks.7.norm"), "no module 'blocks.7.norm'"),
        (row("blocks.0"), "not a plain norm"),
        (row("last"), "not a plain norm"),  # the plan says bias, the module has none
        ({"op": "explode", "path": "last"}, "unknown operation 'explode'"),
        (row("last", bias=None, kind="cube"), "unknown norm 'cube'"),
    ],
)
def test_an_edit_that_does_not_fit_the_model_is_refused(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_module_edits(Net(), [edit])


class Wires(nn.Module):
    """Takes and returns tensors in every way a hook must cope with."""

    def forward(self, x: Tensor, *, hidden: Tensor | None = None, how: str = "") -> Any:
        y = x if hidden is None else x + hidden
        return {"": y, "tuple": (y, 1), "list": [1, y], "dict": {"h": y}}[how]


@pytest.mark.parametrize(("how", "key"), [("", ""), ("tuple", "0"), ("list", "1"), ("dict", "h")])
def test_centring_reaches_every_form_of_output(how: str, key: str) -> None:
    model = nn.Sequential(Wires())
    apply_module_edits(model, [{"op": "center", "path": "0", "side": "output", "key": key, "axis": -1}])
    x = torch.randn(2, 8, dtype=torch.float64)
    out = model[0](x, how=how)
    tensor = out if how == "" else out["h"] if how == "dict" else out[int(key)]
    assert torch.equal(tensor, x - x.mean(-1, keepdim=True))
    assert type(out) is type(Wires()(x, how=how))


def test_centring_reaches_model_outputs_by_name() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=x)

    model = nn.Sequential(Encoder())
    apply_module_edits(model, [{"op": "center", "path": "0", "side": "output", "key": "last_hidden_state", "axis": -1}])
    x = torch.randn(2, 8)
    out = model(x)
    assert torch.equal(out.last_hidden_state, center(x))
    assert torch.equal(out[0], center(x))


@pytest.mark.parametrize("key", ["0", "x"])
def test_centring_an_input_works_however_it_is_passed(key: str) -> None:
    model = nn.Sequential(Wires())
    apply_module_edits(model, [{"op": "center", "path": "0", "side": "input", "key": key, "axis": 1}])
    x, other = torch.randn(2, 8, 3), torch.randn(2, 8, 3)
    call = model[0](x, hidden=other) if key == "0" else model[0](x=x, hidden=other)
    assert torch.equal(call, x - x.mean(1, keepdim=True) + other)


def test_an_input_that_is_not_there_is_an_error_not_a_shift() -> None:
    model = nn.Sequential(Wires())
    apply_module_edits(model, [{"op": "center", "path": "0", "side": "input", "key": "hidden", "axis": -1}])
    with pytest.raises(KeyError, match="hidden"):
        model[0](torch.randn(2, 8))


def test_centring_rounds_once() -> None:
    x = (torch.randn(64, 768) + 3).to(torch.bfloat16)
    exact = x.double() - x.double().mean(-1, keepdim=True)
    assert torch.equal(center(x), exact.to(torch.bfloat16))


def edited() -> nn.Module:
    model = Net().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    rows = [row(f"blocks.{i}.norm") for i in range(2)] + [row("blocks.0.shared"), row("last", bias=None)]
    hook = {"op": "center", "path": "blocks.0", "side": "output", "key": "", "axis": -1}
    apply_module_edits(model, [*rows, hook])
    return model


def test_an_edited_model_survives_copying_pickling_and_saving() -> None:
    model = edited()
    x = torch.randn(3, 8, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other(x), model(x))
            next(other.parameters()).add_(1)
            assert not torch.equal(other(x), model(x))  # a copy, not a view


def test_an_edited_model_compiles_into_one_graph_and_exports() -> None:
    model = edited()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        truth = model(x)
        assert distance(torch.compile(model, fullgraph=True, backend="aot_eager")(x), truth) < 1e-14
        assert distance(torch.export.export(model, (x,), strict=False).module()(x), truth) < 1e-14


def test_half_keeps_epsilon_and_centring() -> None:
    model = edited()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        truth = model(x)
        assert distance(model.half()(x.half()), truth) < 1e-2


def test_the_table_of_edits_is_what_plans_may_ask_for() -> None:
    known = {"replace", "center", "absorb", "affine", "bias", "resize", "merge", "set", "compress", "clip"}
    known |= {"epsilon", "renew", "attend", "rename"}
    assert set(MODULE_EDITS) == known
    assert repr(Center("output", "0", -1)) == "Center('output', key='0', axis=-1)"


def test_the_result_can_be_viewed_as_layer_norms_can() -> None:
    norm = RMSNorm(6).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64).transpose(1, 2)
    with torch.no_grad():
        assert not x.is_contiguous()
        assert norm(x).view(8, 6).shape == nn.functional.layer_norm(x, (6,)).view(8, 6).shape


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("axis", [-1, -3])
def test_an_affine_map_stands_where_a_norm_stood(axis: int, guarded: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(6, bias=False))
    row = {"op": "affine", "path": "0", "size": 6, "eps": 4.0, "axis": axis, "guarded": guarded}
    apply_module_edits(model, [row])
    affine: Any = model[0]
    assert affine.weight.shape == ((1, 6) if guarded else (6,))
    with torch.no_grad():
        affine.weight.copy_(torch.arange(6.0))
        affine.bias.copy_(torch.ones(6))
    x = torch.randn(2, 6, 3, 4) if axis == -3 else torch.randn(2, 5, 6)
    expected = (x.movedim(axis, -1) * torch.arange(6.0) / 2 + 1).movedim(-1, axis)
    torch.testing.assert_close(model(x), expected)


def test_an_affine_map_takes_no_other_modules_place() -> None:
    with pytest.raises(ValueError, match="it is not a plain norm"):
        apply_module_edits(nn.Sequential(nn.MultiheadAttention(6, 2)), [
            {"op": "affine", "path": "0", "size": 6, "eps": 1.0}
        ])  # fmt: skip
