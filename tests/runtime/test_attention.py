"""Simplified linear attention: its mathematics, and a module's attention made linear."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from normconvert.runtime import LinearAttention, apply_module_edits, linear_attention
from tests.support.attention_reference import LinearAttentionReference
from tests.support.equivalence import distance


def perturbed(module: LinearAttention) -> LinearAttention:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def parts_of(attention: LinearAttention) -> dict[str, Tensor]:
    conv = attention.conv
    assert conv.bias is not None
    return {"positions": attention.positions, "weight": conv.weight, "bias": conv.bias}


def reference_of(attention: LinearAttention) -> LinearAttentionReference:
    p = {name: value.detach().double().numpy().copy() for name, value in parts_of(attention).items()}
    return LinearAttentionReference(p["positions"], p["weight"][:, 0], p["bias"], attention.grid, attention.prefix)


@pytest.mark.parametrize(("grid", "prefix", "size"), [((3, 4), 2, 5), ((2, 2), 0, 7), ((1, 6), 1, 2)])
def test_values_and_gradients_are_the_references_over_50_steps(grid: tuple[int, int], prefix: int, size: int) -> None:
    torch.manual_seed(0)
    attention = perturbed(LinearAttention(2, size, grid, prefix, like=torch.empty(0, dtype=torch.float64)))
    reference = reference_of(attention)
    q, k, v = torch.randn(3, 2, attention.tokens, size, dtype=torch.float64)
    learnt = {"q": q, "k": k, "v": v} | parts_of(attention)
    own = {"q": q.numpy().copy(), "k": k.numpy().copy(), "v": v.numpy().copy(), "weight": reference.weight,
           "positions": reference.positions, "bias": reference.bias}  # fmt: skip
    wanted = torch.randn(2, attention.tokens, size, dtype=torch.float64)
    for tensor in learnt.values():
        tensor.requires_grad_()
    for _ in range(50):
        found = attention(q[None], k[None], v[None])[0]
        expected = reference.forward(own["q"], own["k"], own["v"])
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-10)
        gradients = reference.backward(2 * (expected - wanted.numpy()))
        (found - wanted).square().sum().backward()
        for name, tensor in learnt.items():
            assert tensor.grad is not None
            one = tensor.grad.numpy().reshape(gradients[name].shape)
            np.testing.assert_allclose(one, gradients[name], rtol=1e-7, atol=1e-8 * max(1, np.abs(one).max()))
            with torch.no_grad():
                tensor -= 1e-3 * tensor.grad
                own[name] -= 1e-3 * gradients[name]  # in place: those of the reference
                tensor.grad = None


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_both_orders_of_products_agree(tokens: int, size: int, values: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 3, tokens, size, generator=generator, dtype=torch.float64).relu()
    v = torch.randn(3, tokens, values, generator=generator, dtype=torch.float64)
    one, other = (linear_attention(q, k, v, pairs_first=order) for order in (True, False))
    assert float((one - other).abs().max()) <= 1e-12 * float(v.abs().max())
    chosen = linear_attention(q, k, v)
    assert torch.equal(chosen, one) or torch.equal(chosen, other)


@pytest.mark.parametrize(("tokens", "pairs_first"), [(8, True), (32, False)])
def test_the_order_of_fewer_operations_is_chosen(tokens: int, pairs_first: bool) -> None:
    q, k, v = torch.rand(3, 2, tokens, 16)
    chosen, by_hand = linear_attention(q, k, v), linear_attention(q, k, v, pairs_first=pairs_first)
    assert torch.equal(chosen, by_hand)
    assert not torch.equal(chosen, linear_attention(q, k, v, pairs_first=not pairs_first))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs_first", [True, False])
def test_a_query_of_zeros_gives_zeros(dtype: torch.dtype, pairs_first: bool) -> None:
    q, k, v = torch.zeros(1, 1, 5, 3, dtype=dtype), *torch.rand(2, 1, 1, 5, 3).to(dtype)
    assert torch.equal(linear_attention(q, k, v, pairs_first=pairs_first), torch.zeros_like(v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (30 * torch.rand(3, 1, 1, 4096, 8)).to(dtype)  # sums of products beyond float16
    truth = linear_attention(q.double(), k.double(), v.double())
    assert distance(linear_attention(q, k, v), truth) < 2 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(linear_attention(q.float(), k.float(), v.float()), truth) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.eye(5, dtype=torch.bool)}, "takes no mask"),
        ({"attn_mask": torch.full((5, 5), 1e-3)}, "takes no mask"),
        ({"is_causal": True}, "takes no mask"),
        ({"dropout_p": 0.1}, "set its dropout to 0"),
        ({"key": torch.zeros(1, 2, 6, 3)}, r"2 heads of 5 tokens \(1 \+ 2x2\) of 3 channels, not \(2, 6, 3\)"),
    ],
)
def test_what_it_cannot_take_is_refused(change: dict[str, Any], message: str) -> None:
    attention = LinearAttention(2, 3, (2, 2), 1)
    given = {name: torch.zeros(1, 2, 5, 3) for name in ("query", "key", "value")}
    assert attention(**given).shape == (1, 2, 5, 3)
    with pytest.raises(ValueError, match=message):
        attention(**{**given, **change})


def test_a_mask_that_hides_nothing_is_none_and_another_makes_a_graph_give_no_numbers() -> None:
    attention = perturbed(LinearAttention(2, 3, (2, 2), 1))
    q, k, v = torch.randn(3, 1, 2, 5, 3)
    truth = attention(q, k, v)
    for mask in (torch.ones(5, 5, dtype=torch.bool), torch.zeros(5, 5)):
        assert torch.equal(attention(q, k, v, mask), truth)
    mask = torch.ones(5, 5, dtype=torch.bool)
    graph = torch.export.export(attention, (q, k, v, mask), strict=False).module()
    torch.testing.assert_close(graph(q, k, v, mask), truth)
    mask[0, 4] = False
    assert not graph(q, k, v, mask).isfinite().any()


def test_a_grid_that_is_no_rectangle_is_refused() -> None:
    for grid in ([12], [3, 0], [2, 2, 3]):
        with pytest.raises(ValueError, match="no rectangle"):
            LinearAttention(1, 4, grid)
        row = {"op": "attend", "path": "", "heads": 1, "size": 4, "grid": grid}
        with pytest.raises(ValueError, match="unknown grid"):
            apply_module_edits(nn.Linear(4, 4), [row])


def timm_vit() -> tuple[Any, list[str]]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, num_heads=2, depth=2, num_classes=5
    )
    return model, ["blocks.0.attn", "blocks.1.attn"]


def transformers_vit() -> tuple[Any, list[str]]:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                       image_size=16, patch_size=4, num_labels=5)  # fmt: skip
    model = ViTForImageClassification(config)
    found: dict[str, str] = {}
    for path, module in model.named_modules():  # the module that calls the function of attention
        if hasattr(module, "scaling"):
            found[path] = type(module).__name__
    return model, list(found)


MODELS = {"timm": timm_vit, "transformers": transformers_vit}


def swapped(make: Callable[[], tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    model, paths = make()
    rows = [{"op": "attend", "path": path, "heads": 2, "size": 8, "grid": [4, 4], "prefix": 1} for path in paths]
    apply_module_edits(model, rows)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), paths


def logits(model: Any, x: Tensor) -> Tensor:
    result = model(x)
    found: Tensor = getattr(result, "logits", result)
    return found.detach()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("library", MODELS)
def test_a_models_attention_becomes_linear(library: str, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, paths = swapped(MODELS[library])
    found = logits(model, image)
    seen = []

    def instead(own: LinearAttention) -> Any:
        def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append(own)
            return by_pairs(own, q, k, v)

        return forward

    for path in paths:
        attention: Any = model.get_submodule(f"{path}.linear_attention")
        monkeypatch.setattr(attention, "forward", instead(attention))
    torch.testing.assert_close(logits(model, image), found)
    assert len(seen) == len(paths)


def by_pairs(attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    reference = reference_of(attention)
    rows = [[x.detach().double().numpy() for x in image] for image in zip(q, k, v, strict=True)]
    return torch.from_numpy(np.stack([reference.forward(*image) for image in rows])).to(v.dtype)


@pytest.mark.parametrize("library", MODELS)
def test_names_stay_and_new_ones_come_with_the_module(library: str) -> None:
    plain, paths = MODELS[library]()
    model, _ = swapped(MODELS[library])
    new = {f"{path}.linear_attention.{name}" for path in paths for name in ("positions", "conv.weight", "conv.bias")}
    assert set(model.state_dict()) - set(plain.state_dict()) == new
    assert set(plain.state_dict()) <= set(model.state_dict())
    assert [type(m).__name__ for m in plain.modules()] == [
        type(m).__name__ for p, m in model.named_modules() if "linear_attention" not in p
    ]
    for path in paths:
        signatures = [inspect.signature(m.get_submodule(path).forward) for m in (model, plain)]
        assert signatures[0] == signatures[1]
    assert all(isinstance(model.get_submodule(path), type(plain.get_submodule(path))) for path in paths)


@pytest.mark.parametrize("library", MODELS)
def test_exporters_and_compilers_see_it(library: str, image: Tensor) -> None:
    model, _ = swapped(MODELS[library])
    truth = logits(model, image)
    with torch.no_grad():
        program = torch.export.export(model, (image,), strict=False)
        torch.testing.assert_close(logits(program.module(), image), truth)
        assert not any("attention" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
        torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager", fullgraph=True), image), truth)


@pytest.mark.parametrize("library", MODELS)
def test_copies_and_pickles_compute_the_same(library: str, image: Tensor) -> None:
    model, paths = swapped(MODELS[library])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, image), logits(model, image))
        assert type(other.get_submodule(paths[0])) is type(model.get_submodule(paths[0]))
        assert other.get_submodule(paths[0]) is not model.get_submodule(paths[0])


def test_an_implementation_without_the_call_is_refused(image: Tensor) -> None:
    model, paths = swapped(transformers_vit)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="calls scaled_dot_product_attention 0 times, not once"):
        model(image)
    model, paths = swapped(timm_vit)
    model.get_submodule(paths[1]).fused_attn = False
    with pytest.raises(RuntimeError, match="with fused attention"):
        model(image)


def test_other_modules_keep_their_attention(image: Tensor) -> None:
    model, paths = timm_vit()
    row = {"op": "attend", "path": paths[0], "heads": 2, "size": 8, "grid": [4, 4], "prefix": 1}
    apply_module_edits(model.eval(), [row])
    calls = []
    original = F.scaled_dot_product_attention

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        model(image)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="has a linear_attention already"):
        apply_module_edits(model, [row])


def test_another_size_of_image_is_refused() -> None:
    model, _ = timm_vit()
    row = {"op": "attend", "path": "blocks.0.attn", "heads": 2, "size": 8, "grid": [3, 5], "prefix": 1}
    apply_module_edits(model.eval(), [row])
    with pytest.raises(ValueError, match="give images of the size that the model was swapped for"):
        model(torch.randn(1, 3, 16, 16))
