"""Where a model runs and what it saves memory with: applied to a finished model, from outside.

Device, autocast and activation checkpointing live here and nowhere in the models.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

Precision = Literal["fp32", "bf16"]


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch finds no GPU here; use device=cpu or device=auto")
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Weights stay fp32; in bf16 the matrix products are not."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def checkpoint_activations(blocks: nn.ModuleList | nn.Sequential, last: int) -> None:
    """Forget the activations of the last blocks and compute them again in the backward pass. Weights keep names."""
    for i in range(max(0, len(blocks) - last), len(blocks)):
        blocks[i] = checkpoint_wrapper(blocks[i], checkpoint_impl=CheckpointImpl.NO_REENTRANT)
