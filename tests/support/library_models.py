"""Models of other libraries and styles, tiny, each with the arguments that it is called with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Made = tuple[nn.Module, Any]


def image(size: int = 32, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(size))


def ids(vocabulary: int = 50, length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def torchvision_vit() -> Made:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=7), (image(),)


def torchvision_swin() -> Made:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=7), (image(),)


def torchvision_resnet() -> Made:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), (image(),)


def torchvision_densenet() -> Made:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 16, num_classes=7), (image(),)


def openclip() -> Made:
    from open_clip.model import CLIP

    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return CLIP(16, vision, text), (image(), ids())


def vit_pytorch_vit() -> Made:
    from vit_pytorch import ViT

    made = ViT(image_size=32, patch_size=8, num_classes=7, dim=32, depth=1, heads=2, mlp_dim=64)
    return made, (image(),)


def vit_pytorch_simple() -> Made:
    from vit_pytorch import SimpleViT

    made = SimpleViT(image_size=32, patch_size=8, num_classes=7, dim=32, depth=1, heads=2, mlp_dim=64)
    return made, (image(),)


def x_transformers_decoder() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    made = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2))
    return made, (ids(),)


def diffusers_dit() -> Made:
    from diffusers import DiTTransformer2DModel

    made = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {"hidden_states": image(8, channels=4), "timestep": torch.tensor([3, 7])}
    return made, {**inputs, "class_labels": torch.tensor([1, 2])}


def diffusers_autoencoder() -> Made:
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(16,),
        norm_num_groups=4, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    return made, (image(),)


def torch_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, which norm_first has none of
        made = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32))
    return Projected(made), (torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)),)


class Projected(nn.Module):
    """An encoder behind a projection, so that its stream is the model's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.project, self.encoder = nn.Linear(5, 32), encoder

    def forward(self, src: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.project(src))
        return y


class Attention(nn.Module):
    """One fused projection, as in nanoGPT; causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class NanoGPT(nn.Module):
    """A language model as training code has it: tied head, logits of the last place where there are no targets."""

    def __init__(self, vocabulary: int = 50, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(64, width),
                "h": nn.ModuleList(Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        places = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](places)
        for block in self.transformer["h"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits: Tensor = self.lm_head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt() -> Made:
    return NanoGPT(), [(ids(),), (ids(), ids())]


class Lightning(nn.Module):
    """What a module of Lightning has beside its network: a trainer that may not be there, an example, steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 5),
        )  # fmt: skip
        self.loss, self.example_input_array, self._trainer = nn.CrossEntropyLoss(), image(16), None

    @property
    def trainer(self) -> Any:
        raise RuntimeError("not attached to a Trainer")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss: Tensor = self.loss(self(batch[0]), batch[1])
        return loss


def lightning() -> Made:
    made = Lightning()
    return made, (made.example_input_array,)


class Halved(nn.Module):
    """A parametrization: half of what is stored, symmetric about nothing."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def parametrized() -> Made:
    """A language model of which writers and readers are worked out from other parameters."""
    model = NanoGPT(layers=1)
    block = model.transformer["h"][0]
    parametrize.register_parametrization(block.attn.c_proj, "weight", Halved())
    parametrizations.weight_norm(block.mlp[0])
    return model, [(ids(),), (ids(), ids())]


CASES: dict[str, tuple[Callable[[], Made], dict[str, int]]] = {
    "torchvision ViT": (torchvision_vit, {"rmsnorm": 5, "fold": 5, "rotate": 5}),
    "torchvision Swin": (torchvision_swin, {"rmsnorm": 4}),
    "torchvision ResNet": (torchvision_resnet, {"fuse-bn": 12}),
    "torchvision DenseNet": (torchvision_densenet, {"fuse-bn": 10}),
    "open_clip": (openclip, {"rmsnorm": 7}),
    "vit-pytorch ViT": (vit_pytorch_vit, {"rmsnorm": 4, "crmsnorm": 4, "fold": 4}),
    "vit-pytorch SimpleViT": (vit_pytorch_simple, {"rmsnorm": 4}),
    "x-transformers": (x_transformers_decoder, {"rmsnorm": 3}),
    "torch.nn.TransformerEncoder": (torch_encoder, {"rmsnorm": 5, "crmsnorm": 5}),
    "nanoGPT": (nanogpt, {"rmsnorm": 5, "crmsnorm": 5, "fold": 5, "rotate": 5}),
    "Lightning": (lightning, {"fuse-bn": 1}),
    "parametrized": (parametrized, {"rmsnorm": 3}),
}
"""Name -> what makes it, and how many norms each conversion takes."""
