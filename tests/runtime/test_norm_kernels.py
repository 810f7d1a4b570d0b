"""Whichever kernel the norm picks, for whatever size, device, dtype and mode: it computes the definition, and fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normconvert.runtime import BARE_FROM, RMSNorm, apply_module_edits
from tests.runtime.test_runtime import EPS, TOLERANCE, definition, distance, mean_free, norm

SIZE = 64
LARGE = 2 * BARE_FROM // SIZE  # tokens; the tests run on one thread


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(module: nn.Module, x: Tensor) -> list[str]:
    """What runs after the first call, which looks at the mean."""
    with torch.no_grad():
        module(x)
        with Operations() as seen:
            module(x)
    return seen.names


def folded(dtype: torch.dtype = torch.float32, offset: float = 0.0) -> RMSNorm:
    weight, bias = nn.Parameter(torch.full((SIZE,), 1.0 - offset)), nn.Parameter(torch.zeros(SIZE))
    return RMSNorm(SIZE, EPS, weight=weight, bias=bias, offset=offset, mean_free=True, folded=True).to(dtype).eval()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, LARGE])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("promise", [True, False])
@pytest.mark.parametrize("parts", ["weight bias", "weight", "bias", ""])
def test_every_size_computes_the_definition(tokens: int, dtype: torch.dtype, promise: bool, parts: str) -> None:
    weight, bias = (nn.Parameter(torch.randn(SIZE)) if part in parts else None for part in ("weight", "bias"))
    module = RMSNorm(SIZE, EPS, weight=weight, bias=bias, mean_free=promise).to(dtype).eval()
    x = mean_free(tokens, SIZE, dtype=dtype)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    for name, parameter in module.named_parameters():
        truth = truth * parameter.double() if name == "weight" else truth + parameter.double()
    with torch.no_grad():
        for _ in range(2):  # the first call looks at the mean
            y = module(x)
            assert y.dtype == dtype
            assert distance(y, truth) < TOLERANCE[dtype]


def test_one_token_costs_one_operation() -> None:
    assert operations(norm(SIZE, torch.float32, mean_free=True).eval(), mean_free(1, SIZE, dtype=torch.float32)) == [
        "native_layer_norm"
    ]


def test_without_parameters_a_large_input_takes_no_layer_norm_and_a_small_one_gets_ones() -> None:
    module = RMSNorm(SIZE, EPS, mean_free=True).eval()
    assert "native_layer_norm" not in operations(module, mean_free(LARGE, SIZE, dtype=torch.float32))
    assert operations(module, mean_free(1, SIZE, dtype=torch.float32)) == ["native_layer_norm"]
    assert not list(module.parameters())
    assert not module.state_dict()


# -- folded ---------------------------------------------------------------------------------------------------------


def test_folded_parameters_are_left_out_of_large_inputs_only() -> None:
    seen = operations(folded(), mean_free(LARGE, SIZE, dtype=torch.float32))
    assert "linalg_vector_norm" in seen
    assert "native_layer_norm" not in seen
    assert operations(folded(), mean_free(1, SIZE, dtype=torch.float32)) == ["native_layer_norm"]


def _optimise(module: RMSNorm) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.3)
    module(torch.randn(4, SIZE)).square().sum().backward()
    optimiser.step()


def _load(module: RMSNorm) -> None:
    module.load_state_dict({"weight": torch.randn(SIZE), "bias": torch.randn(SIZE)})


def _write_past_autograd(module: RMSNorm) -> None:
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(SIZE))


def _exchange(module: RMSNorm) -> None:
    module.weight = nn.Parameter(torch.randn(SIZE))


def _one_number(module: RMSNorm) -> None:
    with torch.no_grad():
        module.get_parameter("bias")[-1] = 1e-3


@pytest.mark.parametrize("change", [_optimise, _load, _write_past_autograd, _exchange, _one_number])
def test_folded_parameters_count_as_soon_as_they_change(change: Callable[[RMSNorm], None]) -> None:
    """However they change: nothing tells a norm that somebody wrote to its weight, so it looks."""
    module, x = folded(), mean_free(LARGE, SIZE, dtype=torch.float32)
    with torch.no_grad():
        before = module(x)
    change(module)
    with torch.no_grad():
        y = module(x)
    assert distance(y, definition(x, module)) < TOLERANCE[torch.float32]
    assert not torch.equal(y, before)


def test_folded_parameters_get_their_gradients() -> None:
    module = folded(torch.float64)
    x = mean_free(LARGE, SIZE)
    module(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def test_a_folded_norm_with_an_offset_is_right() -> None:
    for tokens in (1, LARGE):
        x = mean_free(tokens, SIZE)
        with torch.no_grad():
            assert distance(folded(torch.float64, 1.0)(x), definition(x, folded(torch.float64, 1.0))) < 1e-15


def test_folding_marks_the_norms_it_folded_and_keeps_names_and_shapes(tmp_path: Path) -> None:
    import transformers

    import normconvert
    from tests.support.tiny_checkpoints import gpt2, save

    source = save(gpt2(), tmp_path / "src")
    report = normconvert.convert(source, tmp_path / "out", fold=True)
    rows = {row["path"]: row for row in report.plan.modules if row["op"] == "replace"}
    assert rows["transformer.h.0.ln_1"]["folded"]
    assert "folded" not in rows["transformer.ln_f"]  # its reader is the tied head
    model = normconvert.load(tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert list(model.state_dict()) == list(plain.state_dict())
    first: Any = model.get_submodule("transformer.h.0.ln_1")
    assert isinstance(first, nn.Module)
    assert first.folded
    ids = torch.arange(12).view(2, 6)
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        truth = original.double()(ids).logits
        assert distance(model(ids).logits, truth) < 1e-5
        assert distance(plain(ids).logits, truth) < 1e-5
    plan = normconvert.inspect(source).plan
    assert not any("folded" in row for row in plan.modules)


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "autograd", "compiled", "exported"])
@pytest.mark.parametrize("promise", [True, False])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_an_image_norm_leaves_its_result_in_memory_as_the_original_does(
    mode: str, promise: bool, memory: torch.memory_format
) -> None:
    from timm.layers import LayerNorm2d

    original = LayerNorm2d(SIZE, eps=EPS).double().eval()
    nn.init.normal_(original.weight)
    nn.init.normal_(original.bias)
    module = copy.deepcopy(original)
    row = {"op": "replace", "path": "0", "kind": "rmsnorm", "size": SIZE, "eps": EPS, "axis": -3, "weight": "weight"}
    holder = nn.Sequential(module)
    apply_module_edits(holder, [{**row, "bias": "bias", "mean_free": promise, "channels_last": True}])
    x = mean_free(2, SIZE, 3, 5, axis=1).contiguous(memory_format=memory)
    run: Any = holder
    if mode == "compiled":
        run = torch.compile(holder, fullgraph=True, backend="aot_eager")
    if mode == "exported":
        run = torch.export.export(holder, (x,), strict=False).module()
    with torch.set_grad_enabled(mode == "autograd"):
        y, truth = run(x), original(x)
    assert distance(y, truth) < 1e-14
    assert y.stride() == truth.stride()
    torch.compiler.reset()


def test_an_image_norm_runs_as_one_layer_norm() -> None:
    module = norm(SIZE, torch.float32, axis=-3, mean_free=True, channels_last=True).eval()
    assert operations(module, mean_free(2, SIZE, 4, 4, axis=1, dtype=torch.float32)).count("native_layer_norm") == 1


def test_a_plan_says_which_image_norms_permute(tmp_path: Path) -> None:
    import timm

    from normconvert.rewrites.planning import plan_model

    with torch.device("meta"):
        model = timm.create_model("convnext_atto", num_classes=3)
    rows = {r["path"]: r for r in plan_model(model.eval()).modules if r["op"] == "replace"}
    assert rows["stem.1"]["axis"] == -3
    assert rows["stem.1"]["channels_last"]
    assert not any(r.get("channels_last") for r in rows.values() if r["axis"] == -1)


# -- modes ----------------------------------------------------------------------------------------------------------


def test_weights_that_are_no_plain_parameters_are_used_all_the_same() -> None:
    from torch.nn.utils import parametrize, prune

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x = mean_free(3, SIZE)
    parametrised = norm(SIZE, mean_free=True).eval()
    plain = copy.deepcopy(parametrised)
    parametrize.register_parametrization(parametrised, "weight", Double())
    with torch.no_grad():
        plain.get_parameter("weight").mul_(2)
        assert distance(parametrised(x), plain(x)) < 1e-15
    pruned = norm(SIZE, mean_free=True).eval()
    prune.random_unstructured(pruned, "weight", 0.5)
    with torch.no_grad():
        bare = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        weight, bias = getattr(pruned, "weight"), getattr(pruned, "bias")  # noqa: B009
        assert distance(pruned(x), bare * weight + bias) < 1e-15


def test_the_promise_of_a_module_in_use_survives_copies_and_half() -> None:
    module = norm(SIZE, torch.float32, mean_free=True).eval()
    x = mean_free(2, SIZE, dtype=torch.float32)
    with torch.no_grad():
        module(x)
        for other in (copy.deepcopy(module), copy.deepcopy(module).half()):
            assert other.mean_free
            assert distance(other(x.to(other.get_parameter("weight").dtype)), definition(x, module)) < 2e-3


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_meets_a_promised_norm(grad: bool) -> None:
    block = nn.Sequential(nn.Linear(48, 48), norm(dtype=torch.float32), nn.Linear(48, 48)).eval()
    linear: Any = block[0]
    with torch.no_grad():  # what it writes is mean-free
        linear.weight -= linear.weight.mean(0)
        linear.bias -= linear.bias.mean()
    x = torch.randn(4, 48)
    truth = copy.deepcopy(block).double()(x.double())
    promised: Any = block[1]
    promised.mean_free = True
    for module in (block, copy.deepcopy(block).to(torch.bfloat16)):
        for inputs in (x, x.to(torch.bfloat16)):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
                assert distance(module(inputs), truth) < 3e-2


@pytest.mark.parametrize("promise", [True, False])
@pytest.mark.parametrize("grad", [False, True])
def test_a_compiler_sees_one_graph_whatever_was_called_before(promise: bool, grad: bool) -> None:
    module = norm(SIZE, torch.float32, mean_free=promise).eval()
    x = mean_free(5, SIZE, dtype=torch.float32)
    with torch.no_grad():
        module(x)
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for tokens in (5, 7, 9):
            x = mean_free(tokens, SIZE, dtype=torch.float32)
            y = compiled(x)
            assert distance(y, definition(x, module)) < 3e-7
            if grad:
                y.sum().backward()
    torch.compiler.reset()


@pytest.mark.slow
def test_the_default_compiler_computes_the_definition() -> None:
    for options in ({}, {"axis": -3, "channels_last": True}, {"folded": True}):
        for dtype in (torch.float32, torch.bfloat16):
            module = norm(SIZE, dtype, mean_free=True, **options).eval()
            axis = module.axis
            x = mean_free(*((2, SIZE, 4, 4) if axis == -3 else (4, SIZE)), axis=axis, dtype=dtype)
            torch.compiler.reset()
            with torch.no_grad():
                y = torch.compile(module, fullgraph=True)(x)
            assert distance(y, definition(x, module)) < TOLERANCE[dtype] * 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [18, 23])
def test_onnx_has_the_norm_as_one_operator_where_its_opset_knows_it(bias: bool, opset: int) -> None:
    import onnxruntime as runtime

    block = nn.Sequential(nn.Linear(SIZE, SIZE), norm(SIZE, bias=bias, mean_free=True), nn.Linear(SIZE, SIZE))
    block = block.float().eval()
    x = torch.randn(2, 3, SIZE)
    program = torch.onnx.export(block, (x,), dynamo=True, opset_version=opset, verbose=False)
    assert program is not None
    names = [node.op_type for node in program.model_proto.graph.node]
    assert names.count("RMSNormalization") == (1 if opset >= 23 else 0)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    unproved: Any = block[1]
    unproved.mean_free = False
    with torch.no_grad():
        assert distance(torch.from_numpy(y), block(x)) < 1e-6


# -- GPU ------------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("promise", [True, False])
def test_a_gpu_computes_the_definition(dtype: torch.dtype, bias: bool, promise: bool) -> None:
    module = norm(SIZE, dtype, bias=bias, mean_free=promise).eval().cuda()
    x = mean_free(9, SIZE, dtype=dtype).cuda()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert distance(module(x), definition(x, module)) < 2 * TOLERANCE[dtype]


@on_gpu
@pytest.mark.parametrize("called_before", [False, True])
def test_a_cuda_graph_captures_the_norm(called_before: bool) -> None:
    module = norm(SIZE, torch.float32, mean_free=True).eval().cuda()
    x = mean_free(9, SIZE, dtype=torch.float32).cuda()
    with torch.no_grad():
        if called_before:
            module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(mean_free(9, SIZE, dtype=torch.float32))
        graph.replay()
        torch.cuda.synchronize()
    assert distance(y, definition(x, module)) < 1e-6
