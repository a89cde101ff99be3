"""Vision encoders of timm, as pixels [B, 3, S, S] -> tokens [B, N, D] with the class token first.

The only file that knows timm.
"""

from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """A plain ViT. Defaults are ViT-B/16 at 224 px, as in BLIP (biased qkv, final norm)."""

    image_size: int = 224  # pixels, square
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.0  # stochastic depth; BLIP uses 0.1 for ViT-L
    eps: float = 1e-6  # of LayerNorm; Hugging Face's BLIP configs ask 1e-5

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def tokens(self) -> int:
        """N: patches plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


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
            drop_path_rate=config.drop_path,
            norm_layer=partial(LayerNorm, eps=config.eps),
            num_classes=0,
            global_pool="",
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit.forward_features(pixels)  # [B, N, D]


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
    head, grid = (
        embedding[:, :1],
        embedding[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2),
    )  # [1, D, g, g]
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False).to(
        embedding.dtype
    )
    return torch.cat([head, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def pretrained_vit(name: str) -> dict[str, Tensor]:
    """State dict of a timm ViT by model name (downloads from the hub), e.g. deit_base_patch16_224 as in BLIP."""
    return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
