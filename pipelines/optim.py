"""AdamW, its parameter groups, and the learning rate as a pure function of the step.

A schedule here returns the rate for the update number `step` (0 is the first). The trainer writes it, times
the `scale` of each group, into `optimizer.param_groups`; there is no scheduler object, hence nothing to save
and nothing to resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from blip.vision import VisionEncoder


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-4  # the peak; BLIP ViT-B pre-training
    min_lr: float = 0.0  # the floor of both decays
    warmup_lr: float = 0.0  # the rate of step 0 when there is a warm-up
    warmup_steps: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "step_decay", "constant"] = "cosine"
    decay_rate: float = 0.9  # step_decay only: the factor per epoch (paper 0.85, published code 0.9)
    layer_decay: float = 1.0  # of the rate, from each block of the ViT to the one before it; 1: none
    grad_clip: float | None = None  # largest gradient norm; BLIP clips nothing

    def __post_init__(self) -> None:
        rules = (
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"between 0 and lr = {self.lr}"),
            ("warmup_lr", 0 <= self.warmup_lr <= self.lr, f"between 0 and lr = {self.lr}"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("decay_rate", 0 < self.decay_rate <= 1, "in (0, 1]"),
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0, "null or above 0"),
        )
        for name, holds, allowed in rules:
            if not holds:  # written so that nan fails
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")


def lr_at(config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of update `step` under `config`."""
    peak, floor = config.lr, config.min_lr
    start, warmup_steps = config.warmup_lr, config.warmup_steps
    match config.schedule:
        case "cosine":
            return warmup_cosine(
                step,
                peak=peak,
                floor=floor,
                warmup_steps=warmup_steps,
                total_steps=total_steps,
                start=start,
            )
        case "step_decay":
            return warmup_step_decay(
                step,
                peak=peak,
                floor=floor,
                warmup_steps=warmup_steps,
                start=start,
                rate=config.decay_rate,
                steps_per_epoch=steps_per_epoch,
            )
        case "constant":
            return warmup_constant(step, peak=peak, warmup_steps=warmup_steps, start=start)


def warmup_constant(step: int, *, peak: float, warmup_steps: int, start: float) -> float:
    """Linear from `start` at step 0 to `peak` at step `warmup_steps`, then `peak`."""
    if step >= warmup_steps:
        return peak
    return start + (peak - start) * step / warmup_steps


def warmup_cosine(
    step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int, start: float
) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `floor`, reached at `total_steps` and kept."""
    if step < warmup_steps:
        return warmup_constant(step, peak=peak, warmup_steps=warmup_steps, start=start)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def warmup_step_decay(
    step: int,
    *,
    peak: float,
    floor: float,
    warmup_steps: int,
    start: float,
    rate: float,
    steps_per_epoch: int,
) -> float:
    """BLIP pre-training: linear warm-up, and `max(floor, peak * rate ** epoch)`, constant within an epoch.

    BLIP warms up in epoch 0 only and jumps if that epoch is too short; here the lower of the two curves
    holds, which is the same where the warm-up fits into the epoch and has no upward jump where it does not.
    """
    decayed = max(floor, peak * rate ** (step // steps_per_epoch))
    return min(decayed, warmup_constant(step, peak=peak, warmup_steps=warmup_steps, start=start))


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model` with weight decay and without, a group for each scale of the rate.

    Decay pulls towards 0. That is a prior for matrices; for a norm's gain it aims at the wrong value (1 is
    neutral), for a bias or the 0-D temperature it only adds error. BLIP decays all of them alike, a
    difference to bear in mind when curves are compared; LAVIS exempts 1-D parameters and biases as here, but
    decays the temperature. Raises ValueError if nothing is trainable, or `layer_decay` finds no ViT to train.
    """
    scales = vision_scales(model, config.layer_decay)
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or name.endswith("bias")
            found.setdefault((is_plain, scales.get(parameter, 1.0)), []).append(parameter)
    if not found:
        raise ValueError("the model has no trainable parameter: every requires_grad is False")
    if config.layer_decay < 1 and not any(parameter.requires_grad for parameter in scales):
        raise ValueError(
            f"layer_decay is {config.layer_decay}, but the model trains no ViT; set trains_vision of the "
            "model or of its start to true, or leave layer_decay out"
        )
    return [
        {"params": found[kind], "weight_decay": 0.0 if kind[0] else config.weight_decay, "scale": kind[1]}
        for kind in sorted(found)
    ]


def vision_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """By what the rate of each weight of a ViT is multiplied; all other weights keep the rate.

    The last block has `decay`, and each before it has it once more: block i `decay ** (depth - i)`, and the
    patch embedding, class token, positions and a norm before the blocks `decay ** (depth + 1)`. A norm after
    them goes with the last block. These are the `lr_scales` of LAVIS, models/blip2_models/blip2.py
    `get_optimizer_params` and eva_vit.py `get_num_layer`; its schedulers (common/optims.py) write one rate
    over all groups, so that there they do nothing.
    """
    scales = {}
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            depth = len(module.vit.blocks)
            for name, parameter in module.vit.named_parameters():
                match name.split("."):
                    case ["blocks", number, *_]:
                        power = depth - int(number)
                    case ["norm", *_]:
                        power = 1
                    case _:
                        power = depth + 1
                scales[parameter] = decay**power
    return scales


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    build: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups(model, config)`, starting at `config.lr`; `build` may shard its state."""
    groups = parameter_groups(model, config)
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    # One kernel per step on a GPU; elsewhere None lets torch choose foreach or the plain loop.
    return build(groups, lr=config.lr, betas=config.betas, fused=True if on_cuda else None)
