"""Tiny real models with random weights, for tests."""

import torch
from torch import nn

from blip.med import MEDConfig
from blip.model import Blip, BlipConfig
from blip.vision import VisionConfig

SEP = 3  # of a vocabulary that opens with blip.tokenizer.SPECIAL
VOCABULARY = 50


def tiny_config(reads: bool = True, writes: bool = True) -> BlipConfig:
    """32 px images in 5 tokens, 2 layers of width 32, 50 words; [DEC] and [ENC] are the last two."""
    return BlipConfig(
        vision=VisionConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3),
        text=MEDConfig(
            VOCABULARY, width=32, depth=2, heads=4, hidden=64, max_positions=40, reads=reads, writes=writes
        ),
        embed=16,
        dec_id=VOCABULARY - 2,
        enc_id=VOCABULARY - 1,
    )


def tiny_blip(seed: int = 0, reads: bool = True, writes: bool = True) -> Blip:
    """In eval mode. Weights are drawn large, so that images, words and positions all matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        blip = Blip(tiny_config(reads, writes)).eval()
        for module in blip.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.5)
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.bias.normal_(0, 0.2)
    return blip


def pixels(images: int, seed: int = 0) -> torch.Tensor:
    """[B, 3, 32, 32] of noise."""
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
