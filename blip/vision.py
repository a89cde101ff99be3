"""Vision encoders of timm, as pixels [B, 3, S, S] -> tokens [B, N, D] with the class token first.

The only file that knows timm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, build_sincos2d_pos_embed
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """A ViT. Defaults are ViT-B/16 at 224 px, as in BLIP (biased qkv, final norm)."""

    image_size: int = 224  # pixels, square
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.0  # stochastic depth; BLIP uses 0.1 for ViT-L
    eps: float = 1e-6  # of LayerNorm; Hugging Face's BLIP configs ask 1e-5
    stem: tuple[int, ...] = ()  # widths of a convolutional stem, each halves the image; () = plain patches
    hidden: int | None = None  # of the MLP; None = four times the width
    final_norm: bool = True  # without, whoever uses the tokens normalises them
    pre_norm: bool = False  # CLIP: a norm before the blocks, and patches without a bias
    quick_gelu: bool = False  # OpenAI's CLIP: x * sigmoid(1.702 x)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; choose one"
            )
        if self.width % 4:
            raise ValueError(f"width {self.width} of the ViT is not a multiple of 4, as its positions need")
        if self.stem and 2 ** len(self.stem) != self.patch_size:
            raise ValueError(
                f"a stem of {len(self.stem)} halvings makes patches of {2 ** len(self.stem)} pixels, "
                f"but patch_size is {self.patch_size}; give log2(patch_size) widths"
            )

    @property
    def tokens(self) -> int:
        """N: patches plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


# The frozen encoders of BLIP-2 (section 3.3), without the last block: EVA's ViT-g has 40, CLIP's ViT-L 24.
# timm builds the former with biases of queries and values only. Keys have one here, zero: what all keys share
# shifts the scores of a query alike, and softmax does not see it.
EVA_VIT_G = VisionConfig(patch_size=14, width=1408, depth=39, heads=16, hidden=6144, final_norm=False)
CLIP_VIT_L = VisionConfig(
    patch_size=14, width=1024, depth=23, heads=16, eps=1e-5, final_norm=False, pre_norm=True, quick_gelu=True
)


class VisionEncoder(nn.Module):
    """The ViT of `config`. Returns every token after the final norm; token 0 is the class token."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=((config.hidden or 4 * config.width) + 0.5) / config.width,  # timm rounds down
            drop_path_rate=config.drop_path,
            norm_layer=partial(LayerNorm, eps=config.eps),
            act_layer=QuickGELU if config.quick_gelu else None,
            pre_norm=config.pre_norm,
            final_norm=config.final_norm,
            num_classes=0,
            global_pool="",
            weight_init="jax",  # Xavier, as in the ViT paper; timm's own 0.02 is too little for a narrow ViT
        )
        if config.stem:
            self.vit.patch_embed.proj = conv_stem(config.stem, config.width)
        assert self.vit.pos_embed is not None
        with torch.no_grad():
            self.vit.pos_embed[0, 1:] = patch_positions(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit.forward_features(pixels)  # [B, N, D]


def conv_stem(widths: Sequence[int], out: int) -> nn.Sequential:
    """[B, 3, S, S] -> [B, out, S / 2^n, S / 2^n] in place of the one big patch convolution.

    After Xiao et al. 2021, "Early convolutions help transformers see better": a ViT that starts from random
    weights and few images learns shapes several times sooner with it.
    """
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        for channels, stride in ((before, 2), (width, 1)):
            conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    last = nn.Conv2d(widths[-1], out, 1)
    nn.init.kaiming_normal_(last.weight, nonlinearity="linear")
    return nn.Sequential(*layers, last)


def patch_positions(config: VisionConfig) -> Tensor:
    """What the position embedding starts from, [N - 1, D]: sines and cosines of row and column, then learned.

    As in MoCo v3 and MAE. From timm's normal(0, 0.02) a ViT that learns from few images finds out what is in
    them, but not where: the LM then guesses left and right.
    """
    side = config.image_size // config.patch_size
    return build_sincos2d_pos_embed([side, side], config.width)


def interpolate_position_embedding(embedding: Tensor, num_tokens: int) -> Tensor:
    """[1, 1 + g*g, D] -> [1, num_tokens, D] by bicubic resampling of the square grid; the class row is kept.

    As in salesforce/BLIP models/vit.py `interpolate_pos_embed` (align_corners=False, no antialiasing).
    """
    if embedding.size(1) == num_tokens:
        return embedding
    old, new = round((embedding.size(1) - 1) ** 0.5), round((num_tokens - 1) ** 0.5)
    if old * old != embedding.size(1) - 1 or new * new != num_tokens - 1:
        raise ValueError(
            f"position embedding {list(embedding.shape)} cannot become {num_tokens} tokens: not a square"
        )
    grid = embedding[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()  # [1, D, g, g]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)  # [1, new * new, D]
    return torch.cat([embedding[:, :1], patches], 1)


def pretrained_vit(name: str) -> dict[str, Tensor]:
    """State dict of a timm ViT by its name, from the hub, e.g. deit_base_patch16_224 as in BLIP."""
    return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
