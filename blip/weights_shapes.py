"""What shapes and names of outside weights tell about the model they are of."""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from blip.checkpoint import check_names
from blip.vision import VisionConfig
from blip.weights_names import vision_name

HEAD_WIDTH = 64  # channels per attention head, in every BERT and ViT that BLIP starts from


def has(theirs: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in theirs)


def shape_of(theirs: Mapping[str, Tensor], name: str, source: str | Path) -> torch.Size:
    """The shape of a weight that must be there; ValueError names it if it is not."""
    check_names(str(source), [] if name in theirs else [name], [])
    return theirs[name].shape


def depth_of(theirs: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks there are, numbered behind the prefix `blocks`."""
    found = [re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in theirs]
    return max((int(match[1]) + 1 for match in found if match), default=1)


def heads_of(width: int, source: str | Path) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"{source} has a width of {width}, not a multiple of {HEAD_WIDTH}: its heads are unknown"
        )
    return width // HEAD_WIDTH


def image_size_of(tokens: int, patch: int, source: str | Path) -> int:
    """The pixels of an image that becomes `tokens`, the class token and a square of patches."""
    grid = isqrt(tokens - 1)
    if grid * grid + 1 != tokens:
        raise ValueError(
            f"{source} has {tokens} position embeddings: not a square of patches and the class token"
        )
    return grid * patch


def vision_of(
    theirs: Mapping[str, Tensor],
    source: str | Path,
    heads: int | None = None,
    depth: int | None = None,
    eps: float = 1e-6,
) -> VisionConfig:
    """The ViT under the names of transformers or salesforce; what is not given is told by shapes."""
    hugging_face = has(theirs, "vision_model.")

    def shape(name: str) -> torch.Size:
        return shape_of(theirs, vision_name(name, hugging_face), source)

    tokens = shape("pos_embed")[1]
    width, _, _, patch = shape("patch_embed.proj.weight")
    blocks = "vision_model.encoder.layers" if hugging_face else "visual_encoder.blocks"
    image_size = image_size_of(tokens, patch, source)
    hidden = shape("blocks.0.mlp.fc1.weight")[0]
    return VisionConfig(
        image_size=image_size,
        patch_size=patch,
        width=width,
        depth=depth or depth_of(theirs, blocks),
        heads=heads or heads_of(width, source),
        eps=eps,
        hidden=None if hidden == 4 * width else hidden,
    )
