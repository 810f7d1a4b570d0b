"""Names of tensors that tell a library which is not read here: a file of it is at least called what it is.

A row is a few names that all checkpoints of one family have, and no model of timm or transformers.
"""

from __future__ import annotations

from collections.abc import Collection

TORCHVISION = "torchvision's"
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (TORCHVISION, "mobilenet_v2", ("features.0.0.weight", "features.1.conv.0.0.weight")),
    (TORCHVISION, "mobilenet_v3", ("features.0.0.weight", "features.1.block.0.0.weight")),
    (TORCHVISION, "efficientnet", ("features.0.0.weight", "features.1.0.block.0.0.weight")),
    (TORCHVISION, "convnext", ("features.1.0.layer_scale", "features.1.0.block.0.weight")),
    (TORCHVISION, "swin", ("features.0.2.weight", "features.1.0.attn.qkv.weight")),
    (TORCHVISION, "vit", ("conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight")),
    (TORCHVISION, "regnet", ("stem.0.weight", "trunk_output.block1.block1-0.f.a.0.weight")),
    (TORCHVISION, "mnasnet", ("layers.0.weight", "layers.8.0.layers.0.weight")),
    (TORCHVISION, "shufflenet_v2", ("conv1.0.weight", "stage2.0.branch1.0.weight")),
    (TORCHVISION, "squeezenet", ("features.0.weight", "features.3.squeeze.weight")),
    (TORCHVISION, "alexnet", ("features.10.weight", "classifier.1.weight", "classifier.6.weight")),
    (TORCHVISION, "vgg", ("features.0.weight", "classifier.0.weight", "classifier.6.weight")),
    (TORCHVISION, "googlenet", ("inception3a.branch1.conv.weight",)),
    (TORCHVISION, "inception_v3", ("Mixed_5b.branch1x1.conv.weight", "AuxLogits.conv0.conv.weight")),
    (TORCHVISION, "detection", ("rpn.head.bbox_pred.weight",)),
    ("EfficientNet-PyTorch's (lukemelas)", "efficientnet", ("_conv_stem.weight", "_blocks.0._depthwise_conv.weight")),
    ("facenet-pytorch's", "InceptionResnetV1", ("conv2d_1a.conv.weight", "last_bn.weight")),
    ("Silero's", "VAD", ("_model.stft.forward_basis_buffer",)),
    ("torchcrepe's", "crepe", ("conv1_BN.weight", "conv6_BN.weight", "classifier.weight")),
    ("CLIP's", "", ("visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight")),
)  # fmt: skip
"""Whose names, of which family, and names that must be there; the first that fits is meant."""
TWINS = {"vgg": "vgg16, say", "inception_v3": "inception_v3", "regnet": "regnety_004, say, for a regnet_y"}
"""Families of torchvision that timm reads with ``--arch``, and computes as torchvision does."""


def other_library(names: Collection[str]) -> str:
    """Whose names these are, in words; empty if nobody's that is known."""
    for library, family, needed in ROWS:
        if all(name in names for name in needed):
            twin = f", which timm reads as well (--arch timm:NAME: {TWINS[family]})" if family in TWINS else ""
            return f"these are {library} names{f': {family}' if family else ''}{twin if library == TORCHVISION else ''}"
    return ""
