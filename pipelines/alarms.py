"""What in a training log should make someone stop the run: measured at log steps, said once, kept in the log.

A loss that falls is no proof: ITM can sit at its prior and LM can learn a language without looking.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blip.generate import Decoding, generate
from blip.layers import KV
from blip.model import Batch, Blip

PATIENCE = 5  # log steps
CLAMP = (0.0011, 0.499)  # a temperature outside lies at the end of its range, see blip.model
LEAST_GAP = 0.02  # nats a word
LEAST_UNIQUE = 0.25
IMAGES = 16  # that are captioned


@torch.no_grad()
def inspect(model: Blip, batch: Batch) -> dict[str, float]:
    """What to log beside the losses.

    temperature         of ITC
    itm_prior           the ITM loss of who knows no more than how many pairs are wrong
    grounding_gap       LM loss with another's image minus that with the own, in nats a word
    unique_captions     share of different ones among greedy captions of up to 16 images
    The last two need a model that writes and several images.
    """
    found: dict[str, float] = {}
    if model.config.text.reads:
        found["temperature"] = float(model.temperature)
        found["itm_prior"] = itm_prior(batch)
    if not model.config.text.writes or len(batch.image_ids.unique()) < IMAGES // 2:
        return found
    with evaluating(model):
        image = model.med.project_image(model.image_tokens(batch.pixels))
        gap = model.lm_loss(batch, of_neighbours(image))[0] - model.lm_loss(batch, image)[0]
        found["grounding_gap"] = float(gap)
        if model.tokenizer is not None:
            found["unique_captions"] = _unique(model, batch, image, model.tokenizer.sep)
    return found


def itm_prior(batch: Batch) -> float:
    """The ITM loss of who knows no more than how many of the batch's pairs are wrong."""
    made_wrong = 0 if batch.wrong_mask is None else int(batch.wrong_mask.any(1).sum())
    return entropy(len(batch.ids) / (3 * len(batch.ids) + made_wrong))


def of_neighbours(image: list[KV]) -> list[KV]:
    """To each image what belongs to the one before it."""
    return [(keys.roll(1, 0), values.roll(1, 0)) for keys, values in image]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def entropy(share: float) -> float:
    """Of a yes or no with this share of yes, in nats; 1/3, one true and two wrong pairs: 0.6365."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


def _unique(model: Blip, batch: Batch, image: list[KV], end: int) -> float:
    first = batch.ids[0, : batch.prompt_length + 1].clone()
    first[0] = model.config.dec_id
    some = [(keys[:IMAGES], values[:IMAGES]) for keys, values in image]
    ids: Tensor = generate(model.med, some, first, end, Decoding(max_length=20))
    return len(ids.unique(dim=0)) / len(ids)


ADVICE = {
    "itm": "this is the entropy of its prior, it has not begun to learn: raise negative_floor or optim.lr",
    "temperature": "the end of its range, ITC is too easy or does not learn: look at duplicates and optim.lr",
    "grounding_gap": "words are as likely with another image, the captioner does not look: train longer, or "
    "check that texts belong to their images",
    "unique_captions": "the captioner says the same of many images: train longer, or on more images",
}


@dataclass
class Alarms:
    """Called with the metrics of every log step: what is to be said now, each alarm once while it lasts."""

    warmup_steps: int
    _itm: deque[float] = field(default_factory=lambda: deque(maxlen=PATIENCE))
    _ringing: set[str] = field(default_factory=set)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        if step <= self.warmup_steps:
            return []
        self._itm.append(metrics.get("itm", math.inf) - metrics.get("itm_prior", -math.inf))
        at_prior = len(self._itm) == PATIENCE and all(abs(distance) < 0.005 for distance in self._itm)
        rules = {
            "itm": at_prior,
            "temperature": not CLAMP[0] < metrics.get("temperature", 0.07) < CLAMP[1],
            "grounding_gap": metrics.get("grounding_gap", math.inf) < LEAST_GAP,
            "unique_captions": metrics.get("unique_captions", 1.0) < LEAST_UNIQUE,
        }
        ringing = {name for name, rings in rules.items() if rings}
        new, self._ringing = ringing - self._ringing, ringing
        return [f"{name} is {metrics[name]:.4g}: {ADVICE[name]}" for name in rules if name in new]
