"""Of the architectures that the project makes a claim about, no BatchNorm is left, and the outputs are equal.

Small variants, perturbed weights and running statistics, float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normconvert.options import Options
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.probes import verification_inputs
from normconvert.verification.algebra import algebra_model
from normconvert.verification.probe_runs import run_model
from tests.support.perturb import perturb, settle

TOLERANCE = 1e-10
CLASSES = 11

Construct = Callable[[], nn.Module]


def timm_model(name: str, side: int = 64, **arguments: Any) -> Construct:
    def construct() -> nn.Module:
        import timm

        overlay = {"input_size": (3, side, side)}
        model: nn.Module = timm.create_model(name, num_classes=CLASSES, pretrained_cfg_overlay=overlay, **arguments)
        return model

    return construct


def transformers_model(name: str, config: str, **arguments: Any) -> Construct:
    def construct() -> nn.Module:
        transformers = importlib.import_module("transformers")
        values = {k: v() if callable(v) else v for k, v in arguments.items()}
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**values))
        return model

    return construct


LAYERS: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)}
STAGES: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1]}
LEVIT: dict[str, Any] = {
    "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}  # fmt: skip
DETR: dict[str, Any] = {
    "use_timm_backbone": False, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
}  # fmt: skip


def resnet_stages() -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])


QUICK: dict[str, Construct] = {
    "resnet_d": timm_model("resnet18d", **LAYERS),
    "efficientnet": timm_model("test_efficientnet"),
    "hf_detr_frozen": transformers_model("DetrForObjectDetection", "DetrConfig", backbone_config=resnet_stages, **DETR),
}
"""A second or two each; of every other architecture the tests are slow ones."""

SLOW: dict[str, Construct] = {
    "resnet": timm_model("resnet18", **LAYERS),
    "resnext": timm_model("resnext50_32x4d", **{**LAYERS, "channels": (32, 32, 64, 64)}),
    "seresnet": timm_model("seresnet18", **LAYERS),
    "resnet_d_bottleneck": timm_model("resnet50d", **LAYERS),
    "resnet_rs": timm_model("resnetrs50", **LAYERS),
    "regnet": timm_model("regnety_002", depth=7),
    "vgg_bn": timm_model("vgg11_bn", mlp_ratio=0.05),
    "darknet": timm_model("darknet17"),
    "levit": timm_model("levit_128s", depth=(1, 1, 1)),
    "efficientformer": timm_model("efficientformer_l1", depths=(1, 1, 1, 2)),
    "hf_regnet": transformers_model("RegNetForImageClassification", "RegNetConfig", groups_width=8, **STAGES),
    "hf_efficientnet": transformers_model(
        "EfficientNetForImageClassification", "EfficientNetConfig", image_size=64, width_coefficient=0.25,
        depth_coefficient=0.3, hidden_dim=320,
    ),
    "resnet_t": timm_model("resnet10t"),
    "resnet_v1b_gluon": timm_model("resnet50", layers=(1, 2, 1, 1)),
    "regnetx": timm_model("regnetx_002"),
    "mobilenetv2": timm_model("mobilenetv2_035"),
    "mobilenetv3": timm_model("mobilenetv3_small_050"),
    "tf_mobilenetv3": timm_model("tf_mobilenetv3_small_minimal_100"),
    "mobilenetv4": timm_model("mobilenetv4_conv_small_035"),
    "mobilenetv4_medium": timm_model("mobilenetv4_conv_medium"),
    "efficientnet_b0": timm_model("efficientnet_b0"),
    "tf_efficientnet": timm_model("tf_efficientnet_b0"),
    "efficientnet_lite": timm_model("efficientnet_lite0"),
    "tf_efficientnet_lite": timm_model("tf_efficientnet_lite0"),
    "mnasnet": timm_model("mnasnet_small"),
    "ghostnet": timm_model("ghostnet_050"),
    "ghostnetv2": timm_model("ghostnetv2_100"),
    "hrnet": timm_model("hrnet_w18_small"),
    "dla": timm_model("dla46_c"),
    "dla_x": timm_model("dla46x_c"),
    "dla_res2net": timm_model("dla60_res2net"),
    "res2net": timm_model("res2net50_14w_8s"),
    "cspresnet": timm_model("cspresnet50"),
    "cspdarknet": timm_model("cs3darknet_focus_s"),
    "levit_conv": timm_model("levit_conv_128s", depth=(1, 1, 1)),
    "efficientvit_mit": timm_model("efficientvit_b0"),
    "efficientvit_msra": timm_model("efficientvit_m0"),
    "efficientformer_v2": timm_model("efficientformerv2_s0"),
    "hardcorenas": timm_model("hardcorenas_a"),
    "selecsls": timm_model("selecsls42"),
    "inception_v3": timm_model("inception_v3", side=96),
    "inception_v4": timm_model("inception_v4", side=96),
    "inception_resnet_v2": timm_model("inception_resnet_v2", side=96),
    "xception": timm_model("legacy_xception"),
    "xception_aligned": timm_model("xception41"),
    "hf_resnet": transformers_model("ResNetForImageClassification", "ResNetConfig", **STAGES),
    "hf_resnet_basic": transformers_model("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **STAGES),
    "hf_mobilenet_v1": transformers_model(
        "MobileNetV1ForImageClassification", "MobileNetV1Config", image_size=64, depth_multiplier=0.25
    ),
    "hf_mobilenet_v2": transformers_model(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=64, depth_multiplier=0.35
    ),
    "hf_levit": transformers_model("LevitForImageClassification", "LevitConfig", **LEVIT),
    "hf_levit_teacher": transformers_model("LevitForImageClassificationWithTeacher", "LevitConfig", **LEVIT),
    "hf_rt_detr_resnet": transformers_model("RTDetrResNetBackbone", "RTDetrResNetConfig", **STAGES),
}  # fmt: skip

MERGED: dict[str, Construct] = {
    "repvgg": timm_model("repvgg_a0"),
    "mobileone": timm_model("mobileone_s0"),
    "fastvit": timm_model("fastvit_t8"),
    "repvit": timm_model("repvit_m0_9"),
}
"""Blocks of parallel branches: complete with ``merge_branches``."""

CASES = {**QUICK, **SLOW, **MERGED}


def is_batchnorm(module: nn.Module) -> bool:
    """Whatever calls itself one, frozen or not, or has a running variance."""
    named = "BatchNorm" in type(module).__name__ or isinstance(module, nn.modules.batchnorm._BatchNorm)
    return named or "running_var" in module._buffers


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_no_batchnorm_is_left_and_the_outputs_are_equal(name: str) -> None:
    construct = CASES[name]
    torch.manual_seed(0)
    truth = perturb(construct().eval(), seed=0).double()
    with torch.device("meta"):
        skeleton = construct().eval()
    probes = verification_inputs(skeleton, seed=0)[:2]
    settle(truth, lambda: run_model(truth, probes[:1], dtype=torch.float32))
    norms = [path for path, module in truth.named_modules() if is_batchnorm(module)]
    assert len(norms) >= 8

    plan = plan_model(skeleton, Options(merge_branches=name in MERGED), "fuse-bn")
    assert not plan.kept, [f"{v.path}: {v.reason}" for v in plan.kept]
    taken = [v.path for v in plan.converted]
    assert len(taken) == len(norms)
    assert all(any(f"{norm}.".startswith(f"{path}.") for path in taken) for norm in norms)  # or in what is but the norm
    fused = algebra_model(truth, plan)
    assert [path for path, module in fused.named_modules() if is_batchnorm(module)] == []
    assert not [key for key in fused.state_dict() if "running_" in key]

    runs = [run_model(model, probes, dtype=torch.float32).outputs for model in (truth, fused)]
    errors = {
        (probe, name): float((runs[1][probe][name] - value).norm() / value.norm())
        for probe, outputs in runs[0].items()
        for name, value in outputs.items()
    }
    assert errors, "no output was compared"
    assert all(error <= TOLERANCE for error in errors.values()), errors


def test_frozen_norms_are_perturbed_in_these_tests() -> None:
    model = perturb(QUICK["hf_detr_frozen"](), seed=0)
    frozen = [m for m in model.modules() if type(m).__name__ == "DetrFrozenBatchNorm2d"]
    assert frozen
    for module in frozen:
        for buffer in module.buffers():
            assert float(buffer.std()) > 0.05
