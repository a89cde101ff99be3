"""What is measured beside something else: the same weights and images for both sides, run in turns."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from timeit import timeit
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import Blip

T = TypeVar("T")
Work = Callable[[], object]

SPREAD = 0.01  # between the least and the largest of what is compared


@dataclass(frozen=True)
class Result:
    """The same work on one or two sides: seconds of every repeat, and what else is worth knowing."""

    name: str
    unit: str
    amount: int  # of units in one repeat
    seconds: Mapping[str, Sequence[float]]  # side -> repeats
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        """Side -> units a second, by the median."""
        return {side: self.amount / statistics.median(each) for side, each in self.seconds.items()}

    @property
    def ratio(self) -> float | None:
        """How many times the first side is as fast as the second; None where there is one side only."""
        rates = list(self.rates.values())
        return rates[0] / rates[1] if len(rates) == 2 else None


def race(name: str, unit: str, amount: int, ours: Work, theirs: Work, repeats: int) -> Result:
    """Both sides ran before, when their answers were compared, so nothing is warmed up here."""
    sides = {"here": partial(timeit, ours, number=1), "transformers": partial(timeit, theirs, number=1)}
    return Result(name, unit, amount, in_turns(sides, repeats))


def check_close(what: str, ours: Tensor, theirs: Tensor, close: float) -> None:
    """Raises ValueError where two differ by more than `close`, or where they are all the same."""
    difference = float((ours - theirs).abs().max())
    if not difference <= close:  # so written, NaN is refused too
        raise ValueError(
            f"{what} here and in transformers differ by {difference:.2g}, allowed is {close:g}, so no time "
            "is told; one side is wrong"
        )
    if float(ours.max() - ours.min()) < SPREAD:
        raise ValueError(f"{what} are the same for all pairs, which proves little; try another seed")


def in_turns(sides: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each side returns, every time. The order turns round each time: warm caches favour no side."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            found[name].append(sides[name]())
    return found


def draw_weights(model: Blip, seed: int) -> Blip:
    """So that image, position and every earlier word matter: a flat model would agree with anything.

    Matrices of half the usual size and small biases leave a token something of itself behind 12 layers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.normal_(0, scale, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1)
            if isinstance(module, nn.Embedding):
                module.weight.mul_(16)
    return model


def pictures(count: int, size: int, seed: int) -> Tensor:
    """[count, 3, size, size] of coarse patches and fine noise, each picture in a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    colour, coarse, fine = (torch.randn(count, 3, side, side, generator=generator) for side in (1, 6, size))
    return 2 * colour + F.interpolate(coarse, size=(size, size)) + 0.5 * fine
