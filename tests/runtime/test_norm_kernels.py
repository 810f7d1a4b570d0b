"""Whichever kernel the norm picks, for whatever size, device, dtype and mode: it computes the definition, and fast."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normconvert.runtime import RMSNorm, apply_module_edits
from tests.runtime.test_runtime import EPS, TOLERANCE, definition, mean_free, norm
from tests.support.equivalence import distance

SIZE = 64
LARGE = 6000  # tokens: more numbers than a thread takes at once


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(module: nn.Module, x: Tensor) -> list[str]:
    """What runs without gradients."""
    with torch.no_grad(), Operations() as seen:
        module(x)
    return seen.names


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, LARGE])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("parts", ["weight bias", "weight", "bias", ""])
def test_every_size_computes_the_definition(tokens: int, dtype: torch.dtype, parts: str) -> None:
    weight, bias = (nn.Parameter(torch.randn(SIZE)) if part in parts else None for part in ("weight", "bias"))
    module = RMSNorm(SIZE, EPS, weight=weight, bias=bias).to(dtype).eval()
    x = (torch.randn(tokens, SIZE) + 1).to(dtype)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    for name, parameter in module.named_parameters():
        truth = truth * parameter.double() if name == "weight" else truth + parameter.double()
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    assert distance(y, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, SIZE), (LARGE, SIZE), (2, SIZE, 4, 4)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_norm_runs_as_a_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for last in (False, True):
        options: dict[str, Any] = {"axis": -3, "channels_last": last} if len(shape) == 4 else {}
        names = operations(norm(SIZE, dtype, **options).eval(), torch.randn(shape).to(dtype))
        assert "rsqrt" in names
        assert not any("layer_norm" in name for name in names)


# -- folded weights -------------------------------------------------------------------------------------------------


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
    assert isinstance(model.get_submodule("transformer.h.0.ln_1"), RMSNorm)
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
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_an_image_norm_leaves_its_result_in_memory_as_the_original_does(mode: str, memory: torch.memory_format) -> None:
    from timm.layers import LayerNorm2d

    original = LayerNorm2d(SIZE, eps=EPS).double().eval()
    nn.init.normal_(original.weight)
    nn.init.normal_(original.bias)
    module = copy.deepcopy(original)
    row = {"op": "replace", "path": "0", "kind": "rmsnorm", "size": SIZE, "eps": EPS, "axis": -3, "weight": "weight"}
    holder = nn.Sequential(module)
    apply_module_edits(holder, [{**row, "bias": "bias", "channels_last": True}])
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
    parametrised = norm(SIZE).eval()
    plain = copy.deepcopy(parametrised)
    parametrize.register_parametrization(parametrised, "weight", Double())
    with torch.no_grad():
        plain.get_parameter("weight").mul_(2)
        assert distance(parametrised(x), plain(x)) < 1e-15
    pruned = norm(SIZE).eval()
    prune.random_unstructured(pruned, "weight", 0.5)
    with torch.no_grad():
        bare = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        weight, bias = getattr(pruned, "weight"), getattr(pruned, "bias")  # noqa: B009
        assert distance(pruned(x), bare * weight + bias) < 1e-15


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_keeps_a_block_right(grad: bool) -> None:
    block = nn.Sequential(nn.Linear(48, 48), norm(dtype=torch.float32), nn.Linear(48, 48)).eval()
    x = torch.randn(4, 48)
    truth = copy.deepcopy(block).double()(x.double())
    for module in (block, copy.deepcopy(block).to(torch.bfloat16)):
        for inputs in (x, x.to(torch.bfloat16)):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
                assert distance(module(inputs), truth) < 3e-2


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiler_sees_one_graph_whatever_was_called_before(grad: bool) -> None:
    module = norm(SIZE, torch.float32).eval()
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
    every: list[dict[str, Any]] = [{}, {"axis": -3, "channels_last": True}]
    for options in every:
        for dtype in (torch.float32, torch.bfloat16):
            module = norm(SIZE, dtype, **options).eval()
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

    block = nn.Sequential(nn.Linear(SIZE, SIZE), norm(SIZE, bias=bias), nn.Linear(SIZE, SIZE))
    block = block.float().eval()
    x = torch.randn(2, 3, SIZE)
    program = torch.onnx.export(block, (x,), dynamo=True, opset_version=opset, verbose=False)
    assert program is not None
    names = [node.op_type for node in program.model_proto.graph.node]
    assert names.count("RMSNormalization") == (1 if opset >= 23 else 0)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert distance(torch.from_numpy(y), block(x)) < 1e-6


# -- GPU ------------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gpu_computes_the_definition(dtype: torch.dtype, bias: bool) -> None:
    module = norm(SIZE, dtype, bias=bias).eval().cuda()
    x = mean_free(9, SIZE, dtype=dtype).cuda()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert distance(module(x), definition(x, module)) < 2 * TOLERANCE[dtype]


@on_gpu
@pytest.mark.parametrize("called_before", [False, True])
def test_a_cuda_graph_captures_the_norm(called_before: bool) -> None:
    module = norm(SIZE, torch.float32).eval().cuda()
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
