"""Where a model runs and what it saves memory with: applied to a finished model, from outside.

Device, autocast and activation checkpointing live here and nowhere in the models.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Precision = Literal["fp32", "bf16"]


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda, cuda:<number> or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but torch finds no GPU here; use device=cpu or device=auto"
        )
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Weights stay fp32; in bf16 the matrix products are not."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def checkpoint_activations(blocks: nn.ModuleList | nn.Sequential, last: int) -> None:
    """Forget the activations of the `last` blocks, to compute them again in the backward pass.

    Only `forward` is replaced: wrapping the blocks would rename their parameters for whoever looks them up,
    such as the momentum teacher.
    """
    for block in list(blocks)[max(0, len(blocks) - last) :]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
