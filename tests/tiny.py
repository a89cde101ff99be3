"""Tiny real models with random weights, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from blip.med import MEDConfig
from blip.model import Batch, Blip, BlipConfig
from blip.tokenizer import Tokenizer, write_vocabulary
from blip.vision import VisionConfig
from blip.vqa import BlipVQA

M = TypeVar("M", bound=nn.Module)

CLS, SEP = 2, 3  # of a vocabulary that opens with blip.tokenizer.SPECIAL
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


def tiny_tokenizer(folder: str | Path, size: int = VOCABULARY) -> Tokenizer:
    """`size` words: BERT's five special tokens, w0, w1, ..., [DEC], [ENC]."""
    write_vocabulary([f"w{i}" for i in range(size - 7)], folder)
    return Tokenizer(folder)


def randomize(model: M, seed: int = 0) -> M:
    """In eval mode with every weight drawn, ours or another library's, so that no output is flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(0, scale, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1)
            if isinstance(module, nn.Embedding):
                module.weight.mul_(8)
    return model.eval()


def tiny_vqa(seed: int = 0) -> BlipVQA:
    return randomize(BlipVQA(tiny_config()), seed)


def tiny_batch(image_ids: Sequence[int], prompt_length: int = 0, seed: int = 0) -> Batch:
    """One text for each image id, of 4 to 8 tokens with [CLS] and [SEP]; equal ids have equal pixels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (len(image_ids),), generator=generator)
    ids = torch.randint(5, VOCABULARY - 2, (len(image_ids), int(lengths.max())), generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(len(ids)), lengths - 1] = SEP
    mask = (torch.arange(ids.size(1)) < lengths[:, None]).long()
    images = torch.cat([pixels(1, seed=1000 * seed + image_id) for image_id in image_ids])
    return Batch(images, ids * mask, mask, torch.tensor(image_ids), prompt_length)
