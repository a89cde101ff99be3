"""AdamW, its two parameter groups, and the learning rate as a pure function of the step.

A schedule here returns the rate for the update number `step` (0 is the first). The trainer writes it into
`optimizer.param_groups`; there is no scheduler object, hence nothing to save and nothing to resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


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
    """The trainable parameters of `model` as one group with weight decay and one without.

    Decay pulls towards 0. That is a prior for matrices; for a norm's gain it aims at the wrong value (1 is
    neutral), for a bias or the 0-D temperature it only adds error. BLIP decays all of them alike, a
    difference to bear in mind when curves are compared; LAVIS exempts 1-D parameters and biases as here, but
    decays the temperature. Raises ValueError if nothing is trainable.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or name.endswith("bias")
            (no_decay if is_plain else decay).append(parameter)
    if not decay and not no_decay:
        raise ValueError("the model has no trainable parameter: every requires_grad is False")
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
