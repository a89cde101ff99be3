"""What a loss must know of other processes: the rows of all ranks. Everything is the identity in one process.

A loss of this rank is scaled by `share`, so that the mean over ranks, which is what data-parallel training
takes of the gradients, is the mean over all rows: also where a rank has fewer of them.
Shapes: B rows of this rank, G = those of all ranks, in the order of the ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rank() -> int:
    """The number of this process, 0 where nothing is launched."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 where nothing is launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(count: int, device: torch.device) -> Tensor | float:
    """W * count / sum of the counts of all ranks: what a mean over `count` things weighs on this rank."""
    if world_size() == 1:
        return 1.0
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return world_size() * count / total


def longest(length: int, device: torch.device) -> int:
    """The greatest `length` of all ranks."""
    if world_size() == 1:
        return length
    most = torch.tensor(length, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


@dataclass(frozen=True)
class Rows:
    """How many rows each rank brought to this batch; asked for once, then every gather is one collective."""

    counts: tuple[int, ...]

    @staticmethod
    def of(count: int, device: torch.device) -> "Rows":
        """Every rank must call this, and every gather, in the same order."""
        if world_size() == 1:
            return Rows((count,))
        counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
        dist.all_gather(counts, torch.tensor([count], device=device))
        return Rows(tuple(torch.cat(counts).tolist()))

    @property
    def own(self) -> slice:
        """The rows of this rank among those of all."""
        first = sum(self.counts[: rank()])
        return slice(first, first + self.counts[rank()])

    @property
    def share(self) -> float:
        """As `share(B)`."""
        return len(self.counts) * self.counts[rank()] / sum(self.counts)

    @torch.no_grad()
    def gather(self, rows: Tensor) -> Tensor:
        """[B, ...] -> [G, ...], without gradient."""
        if len(self.counts) == 1:
            return rows.detach()
        most = max(self.counts)
        padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, most - len(rows)]).contiguous()
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def gather_with_grad(self, rows: Tensor) -> Tensor:
        """[B, ...] -> [G, ...]; what the losses of all ranks say about a row flows back to its owner."""
        if len(self.counts) == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self)
        return gathered

    def gather_texts(self, texts: Tensor) -> Tensor:
        """[B, T] ids or mask -> [G, T'], padded with 0 to the longest text of all ranks."""
        return self.gather(F.pad(texts, [0, longest(texts.size(1), texts.device) - texts.size(1)]))


class _Gather(torch.autograd.Function):
    """The gradient of a row is the sum of what every rank found for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, of: Rows) -> Tensor:
        ctx.of = of
        return of.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.of.own], None
