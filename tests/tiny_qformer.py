"""A tiny real stage 1 with random weights, for tests."""

from pathlib import Path

import torch
from tiny import VOCABULARY, randomize

from blip.tokenizer import Tokenizer
from blip.vision import VisionConfig
from qformer.qformer import QFormer, QFormerConfig
from qformer.stage1 import Stage1, Stage1Config

DEC = VOCABULARY - 2
VISION = VisionConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3, final_norm=False)
QFORMER = QFormerConfig(
    VOCABULARY, width=32, depth=3, heads=4, hidden=64, queries=5, max_positions=40, image_width=24
)
CONFIG = Stage1Config(VISION, QFORMER, embed=16, dec_id=DEC, norm_eps=1e-6)


def tiny_qformer(seed: int = 0, config: QFormerConfig = QFORMER) -> QFormer:
    """In eval mode. 5 queries in 3 blocks of width 32, of which 2 look at tokens of width 24; 50 words."""
    return randomize(QFormer(config), seed)


def tiny_stage1(seed: int = 0, config: Stage1Config = CONFIG, tokenizer: Tokenizer | None = None) -> Stage1:
    """In eval mode, on images of 32 px in 5 tokens."""
    model = randomize(Stage1(config, tokenizer), seed)
    randomize(model.vision.module, seed + 100)
    with torch.no_grad():
        model.temperature.fill_(0.07)
    return model


def save_tower(model: Stage1, path: Path) -> Path:
    """The frozen encoder in timm's names, as a .pth."""
    torch.save(model.vision.module.vit.state_dict(), path)
    return path
