"""The momentum teacher of ITC: a slow copy of the unimodal encoders and queues of its features.

The teacher gives soft targets and remembers the features of earlier batches as further negatives (BLIP
section 3.2).
Shapes: B pairs of the batch, K queue places, E shared embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layers import at_least_fp32
from blip.med import MED, MEDConfig

NO_IMAGE = -1  # the image id of a queue place that was never filled


@dataclass(frozen=True)
class MomentumConfig:
    """BLIP's values: models/blip_pretrain.py and pretrain.py."""

    queue_size: int = 57600
    decay: float = 0.995  # EMA: teacher = decay * teacher + (1 - decay) * student
    alpha: float = 0.4  # weight of the soft targets
    alpha_steps: int = 0  # linear ramp of alpha from 0, in steps; BLIP: two epochs

    def __post_init__(self) -> None:
        are_shares = 0 <= self.decay <= 1 and 0 <= self.alpha <= 1
        if not are_shares or self.queue_size < 0 or self.alpha_steps < 0:
            raise ValueError(
                f"momentum needs queue_size, alpha_steps >= 0 and decay, alpha in [0, 1]; got {self}"
            )


def alpha_at(step: int, config: MomentumConfig) -> float:
    """The weight of the soft targets at an optimiser step: a linear ramp, then constant."""
    return config.alpha * min(1.0, step / config.alpha_steps) if config.alpha_steps else config.alpha


class Momentum(nn.Module):
    """EMA twin of vision encoder, text encoder and both projections, and a ring queue of their features."""

    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    place: Tensor
    steps: Tensor

    def __init__(
        self, config: MomentumConfig, vision: nn.Module, text: MEDConfig, heads: nn.ModuleDict, embed: int
    ):
        """`vision` and `heads` are copies, never the student's own modules; the text twin is built here."""
        super().__init__()
        self.config = config
        self.vision, self.heads = vision, heads
        self.med = MED(text, image_width=None)
        self.requires_grad_(False)
        size = config.queue_size
        self.register_buffer("image_queue", F.normalize(torch.randn(size, embed), dim=1))  # [K, E]
        self.register_buffer("text_queue", F.normalize(torch.randn(size, embed), dim=1))  # [K, E]
        self.register_buffer("id_queue", torch.full((size,), NO_IMAGE, dtype=torch.long))  # [K]
        self.register_buffer("place", torch.zeros((), dtype=torch.long))  # where the next feature goes
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # optimiser steps seen

    @property
    def alpha(self) -> float:
        return alpha_at(int(self.steps), self.config)

    @torch.no_grad()
    def follow(self, student: nn.Module, decay: float | None = None) -> None:
        """Move every parameter towards the student's of the same name, in one fused call per dtype."""
        theirs = dict(student.named_parameters())
        pairs = [(mine, theirs[name]) for name, mine in self.named_parameters()]
        weight = 1 - (self.config.decay if decay is None else decay)
        torch._foreach_lerp_(
            [mine for mine, _ in pairs], [their.to(mine.dtype) for mine, their in pairs], weight
        )

    @torch.no_grad()
    def features(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit image and text features of the teacher, each [B, E]."""
        image = F.normalize(at_least_fp32(self.heads["vision_proj"](self.vision(pixels)[:, 0])), dim=-1)
        text = F.normalize(at_least_fp32(self.heads["text_proj"](self.med.encode(ids, mask)[:, 0])), dim=-1)
        return image, text

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, image_ids: Tensor) -> None:
        """Write the batch over the oldest places, around the end where it must; any batch size fits."""
        size = self.config.queue_size
        if size == 0:
            return
        image, text, image_ids = image[-size:], text[-size:], image_ids[-size:]
        places = (self.place + torch.arange(len(image), device=image.device)) % size
        self.image_queue[places] = image.to(self.image_queue.dtype)
        self.text_queue[places] = text.to(self.text_queue.dtype)
        self.id_queue[places] = image_ids
        self.place.copy_((self.place + len(image)) % size)
