"""CLIP (Radford et al. 2021): two encoders and one loss, no more. A ViT, a causal text transformer, ITC.

Shapes: B images, N image tokens, D width, R texts, T text positions, E shared embedding.
"""

from dataclasses import dataclass, field
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import losses
from blip.distributed import Rows
from blip.layers import at_least_fp32
from blip.model import Batch
from blip.tokenizer import ClipTokenizer
from blip.vision import VisionConfig, VisionEncoder

START_TEMPERATURE = 0.07
MOST_SCALE = 100.0  # logits are cosines times a learned scale, at most this one (paper, 2.5)


@dataclass(frozen=True)
class ClipTextConfig:
    """Defaults are those beside ViT-B."""

    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    max_positions: int = 77
    eps: float = 1e-5  # of LayerNorm
    quick_gelu: bool = True  # OpenAI's: x * sigmoid(1.702 x)


@dataclass(frozen=True)
class ClipConfig:
    """Defaults are ViT-B/16."""

    vision: VisionConfig = field(
        default_factory=lambda: VisionConfig(eps=1e-5, pre_norm=True, quick_gelu=True)
    )
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    embed: int = 512  # E


class TextBlock(nn.Module):
    """Pre-norm causal self-attention and MLP. [R, T, D] -> [R, T, D]."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.heads, self.quick_gelu = config.heads, config.quick_gelu
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [R, H, T, C]
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        y = self.fc1(self.norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y)
        return x + self.fc2(y)


class TextEncoder(nn.Module):
    """Ids [R, T] -> states [R, T, D] after the last norm. A position sees itself and those before it."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self._draw(config.width, config.depth)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word(ids) + self.position.weight[: ids.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _draw(self, width: int, depth: int) -> None:
        """openai/CLIP clip/model.py `initialize_parameters`, with all biases zero."""
        inside = width**-0.5 * (2 * depth) ** -0.5
        stds = {"qkv": width**-0.5, "proj": inside, "fc1": (2 * width) ** -0.5, "fc2": inside}
        nn.init.normal_(self.word.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)
        for name, layer in self.blocks.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=stds[name.split(".")[-1]])
                nn.init.zeros_(layer.bias)


class Clip(nn.Module):
    """Image and text encoder, each with a linear projection into one space, and the scale of the logits."""

    def __init__(self, config: ClipConfig, tokenizer: ClipTokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionEncoder(config.vision)
        self.text = TextEncoder(config.text)
        self.heads = nn.ModuleDict()
        for name, width in (("vision_proj", config.vision.width), ("text_proj", config.text.width)):
            head = nn.Linear(width, config.embed, bias=False)
            nn.init.normal_(head.weight, std=width**-0.5)
            self.heads[name] = head
        self.log_scale = nn.Parameter(torch.tensor(log(1 / START_TEMPERATURE)))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D], the class token first."""
        return self.vision(pixels)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features [B, E]."""
        return F.normalize(at_least_fp32(self.heads["vision_proj"](self.image_tokens(pixels)[:, 0])), dim=-1)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit features [R, E] of texts, ids and mask [R, T]: those of the last token, the end."""
        last = self.text(ids)[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]  # [R, D]
        return F.normalize(at_least_fp32(self.heads["text_proj"](last)), dim=-1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"itc"}: symmetric InfoNCE over the pairs of all processes. Texts of one image share its mass."""
        rows = Rows.of(len(batch.ids), batch.ids.device)
        images, texts = self.encode_images(batch.pixels), self.encode_texts(batch.ids, batch.mask)
        scale = self.log_scale.exp()
        targets = losses.itc_targets(losses.same_image(batch.image_ids, rows.gather(batch.image_ids)))
        to_text = scale * images @ rows.gather_with_grad(texts).T  # [B, G]
        to_image = scale * texts @ rows.gather_with_grad(images).T
        return {"itc": losses.itc_loss(to_text, to_image, targets, targets) * rows.share}

    @torch.no_grad()
    def after_step(self) -> None:
        """Called by the trainer after each optimiser step."""
        self.log_scale.clamp_(max=log(MOST_SCALE))
