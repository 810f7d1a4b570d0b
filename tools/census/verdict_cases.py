"""Conversions that are right, and what is done to them to make them wrong, for :mod:`tools.census.verdicts`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from torch import Tensor, nn

from normconvert.plan.conversion_plan import Plan
from normconvert.sources import open_source
from normconvert.verification.algebra import named_tensors
from tests.support.perturb import perturb

FLOATS = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
REST = ("float16", "float64")
PUBLISHED = {
    "efficientnet_lite1": "efficientnet-lite1-*.pth",
    "efficientnet_lite2": "efficientnet-lite2-*.pth",
    "mobilenetv2_100": "mobilenet_v2-*.pth",
}
"""timm's model -> the file in a package that holds trained weights of it, under other names in the same order."""


@dataclass(frozen=True)
class Case:
    """A model and its conversion.

    Attributes:
        name: of the model.
        method: of the conversion.
        make: the model in float32; each call makes the same one.
        fold: whether norms' weights are folded into what reads them.
        floats: the dtypes that it is verified in.
    """

    name: str
    method: str
    make: Callable[[], nn.Module]
    fold: bool = False
    floats: tuple[str, ...] = ("float32", "bfloat16")


def _vision(kind: str, **more: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(image_size=32, patch_size=8, **sizes, **more))


def _small() -> dict[str, Callable[[], nn.Module]]:
    ids = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **ids}
    whisper = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 20, "max_target_positions": 40, "decoder_start_token_id": 1, **ids,
    }  # fmt: skip
    opt = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "ffn_dim": 48, "max_position_embeddings": 64, **ids}  # fmt: skip
    neox = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
            "max_position_embeddings": 64, **ids}  # fmt: skip
    return {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **ids)),
        "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=64, **ids)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**neox)),
        "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**whisper)),
        "vit": lambda: _vision("ViT"),
        "dinov2": lambda: _vision("Dinov2"),
    }


def _timm(name: str, side: int, **more: Any) -> nn.Module:
    model = timm.create_model(name, num_classes=10, **more)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    return model


@functools.cache
def _published(name: str, file: Path) -> nn.Module:
    model = timm.create_model(name)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 96, 96)}
    state = {k: v for k, v in model.state_dict().items() if v.ndim}
    values = [v for k, v in torch.load(file, weights_only=True).items() if v.ndim]
    assert [v.shape for v in state.values()] == [v.shape for v in values], file
    model.load_state_dict(dict(zip(state, values, strict=True)), strict=False)
    return model


def cases(packages: Path | None, quick: bool = False) -> Iterator[Case]:
    """All cases, the small ones in turn in float32 and bfloat16 or in float16 and float64."""
    for number, case in enumerate(_cases(packages, quick)):
        trained = case.name.endswith("(trained)")
        yield replace(case, floats=("float32", "float16") if trained else case.floats if number % 2 == 0 else REST)


def _cases(packages: Path | None, quick: bool) -> Iterator[Case]:
    """All cases; those with published weights where the unpacked packages are in ``packages``."""

    def perturbed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            torch.manual_seed(0)
            return perturb(make().eval())

        return made

    for name, make in _small().items():
        yield Case(name, "rmsnorm", perturbed(make))
        if quick:
            break
    if not quick:
        yield Case("gpt2 folded", "rmsnorm", perturbed(_small()["gpt2"]), fold=True)
        yield Case("gpt2 compressed", "crmsnorm", perturbed(_small()["gpt2"]))
    vit = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    yield Case("vit_tiny", "rmsnorm", perturbed(lambda: _timm("vit_tiny_patch16_224", 32, **vit)))
    convnets = {"resnet10t": 64, "mobilenetv2_035": 64, "regnetx_002": 64, "densenet121": 32, "levit_128s": 224}
    for name, side in [("resnet10t", 64)] if quick else convnets.items():
        yield Case(name, "fuse-bn", perturbed(functools.partial(_timm, name, side)))
    for name, method in {} if quick else {"gpt2": "rmsnorm", "vit": "rmsnorm", "convnet": "fuse-bn"}.items():
        yield Case(f"demo:{name}", method, functools.partial(_demo, name))
    for name, pattern in PUBLISHED.items() if packages is not None else ():
        assert packages is not None
        for file in sorted(packages.rglob(pattern)):
            yield Case(f"{name} (trained)", "fuse-bn", functools.partial(_published, name, file))


def _demo(name: str) -> nn.Module:
    return open_source(f"demo:{name}").load(dtype=torch.float32, device="cpu")


# What makes a right conversion wrong: each changes the loaded result in place and says whether there was anything.
Mutation = Callable[[nn.Module, nn.Module, nn.Module, Plan, int], bool]


def _pick(names: list[str], seed: int) -> str | None:
    return names[(7 * seed + 3) % len(names)] if names else None


def _edited(converted: nn.Module, plan: Plan) -> dict[str, Tensor]:
    tensors = named_tensors(converted)
    return {name: tensors[name].data for name in plan.tensors if name in tensors and tensors[name].numel() > 1}


def _one_channel(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    """One channel (the last index of the edited axis' complement) is as it was before the conversion."""
    before, edited = named_tensors(original), _edited(converted, plan)
    # The one that the conversion changes most: where it changes nothing there is nothing to leave out.
    fits = [n for n in edited if n in before and before[n].shape == edited[n].shape]
    name = _pick([n for n in fits if not torch.allclose(before[n].data.to(edited[n].dtype), edited[n], 1e-2)], seed)
    if name is None:
        return False
    new, old = edited[name], before[name].data.to(edited[name].dtype)
    axis = int((new - old).double().abs().sum(tuple(range(1, new.ndim))).argmax()) if new.ndim > 1 else None
    if axis is None:
        index = int((new - old).abs().argmax())
        new[index] = old[index]
    else:
        new[axis] = old[axis]
    return True


def _eps(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    # Twice 1e-12 beside a variance of about one is the same function to 1e-12.
    names = [n for n, m in converted.named_modules() if isinstance(getattr(m, "eps", None), float) and m.eps > 1e-9]
    name = _pick(names, seed)
    if name is None:
        return False
    module: Any = converted.get_submodule(name)
    module.eps = module.eps * 2
    return True


def _bias(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    names = [n for n, p in converted.named_parameters() if n.endswith("bias") and bool(p.any())]
    name = _pick(names, seed)
    if name is not None:
        converted.get_parameter(name).data.zero_()
    return name is not None


def _neighbour(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    vectors = [(n, p) for n, p in converted.named_parameters() if p.ndim == 1 and n.endswith("weight")]
    pairs = [
        (a, b) for (a, p), (b, q) in itertools.pairwise(vectors)
        if p.shape == q.shape and not torch.equal(p, q)
    ]  # fmt: skip
    if not pairs:
        return False
    a, b = pairs[(7 * seed + 3) % len(pairs)]
    converted.get_parameter(a).data.copy_(converted.get_parameter(b).data)
    return True


def _other_checkpoint(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    theirs = named_tensors(other)
    names = [n for n, p in converted.named_parameters() if p.ndim > 1 and n in theirs and theirs[n].shape == p.shape]
    name = _pick([n for n in names if not torch.equal(theirs[n].to(converted.get_parameter(n).dtype), converted.get_parameter(n))], seed)  # fmt: skip  # noqa: E501
    if name is not None:
        converted.get_parameter(name).data.copy_(theirs[name].data)
    return name is not None


def _coarser(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    """All weights keep two bits less of their fraction, or those of the next smaller dtype."""
    for p in converted.parameters():
        if p.dtype in (torch.float64, torch.float32):
            p.data.copy_(p.data.to(torch.float32 if p.dtype == torch.float64 else torch.bfloat16))
        elif p.is_floating_point():
            bits = p.data.view(torch.int16)
            bits.bitwise_and_(~3)
    return True


def _hook(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    names = [e["path"] for e in plan.modules if e["op"] in ("center", "compress")]
    found = False
    for name in names:
        module = converted.get_submodule(name)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            found = found or bool(hooks)
            hooks.clear()
    return found


def _head(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    head = getattr(converted, "lm_head", None)
    if not isinstance(head, nn.Linear):
        return False
    weight = head.weight.detach()
    head.weight = nn.Parameter(weight - weight.mean(-1, keepdim=True))
    return not torch.equal(head.weight, weight)


def _element(converted: nn.Module, original: nn.Module, other: nn.Module, plan: Plan, seed: int) -> bool:
    """The largest number of one edited tensor is half as large again."""
    edited = _edited(converted, plan)
    # The bound of a clamp may be infinite, and stays so whatever it is multiplied by.
    name = _pick([n for n, v in edited.items() if bool(v.any()) and bool(v.isfinite().all())], seed)
    if name is None:
        return False
    flat = edited[name].view(-1) if edited[name].is_contiguous() else edited[name].reshape(-1)
    flat[flat.abs().argmax()] *= 1.5
    return flat.data_ptr() == edited[name].data_ptr()


MUTATIONS: dict[str, Mutation] = {
    "one channel left as it was": _one_channel,
    "eps doubled": _eps,
    "a bias dropped": _bias,
    "the weight of the next norm": _neighbour,
    "a tensor of another checkpoint": _other_checkpoint,
    "rounded to a coarser dtype": _coarser,
    "an operation missing": _hook,
    "the tied head changed": _head,
    "one number changed": _element,
}
