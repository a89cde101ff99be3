"""An evaluation in several processes: whole batches are dealt out in turn, what they give comes in order.

Batch k is that of process k mod W. No batch is cut, since a row is computed a little differently among other
rows: so every number is the one that a single process finds.
Shapes: B rows of a batch, G rows of all batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from blip.distributed import Rows, rank, world_size
from pipelines.parallel import gather_objects

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` neighbours, of which the last may be shorter."""
    source = iter(items)
    return iter(lambda: list(islice(source, size)), [])


def own_turns(batches: Iterable[T]) -> Iterator[T]:
    """The batches of this process."""
    return islice(batches, rank(), None, world_size())


def all_turns(own: Sequence[T]) -> list[T]:
    """What all processes found for their own batches, in the order of the batches; every process gets it."""
    return _in_turn(gather_objects(list(own)))


def rows_of_turns(own: Sequence[Tensor], device: torch.device) -> Tensor:
    """`all_turns` of rows [B, ...], behind one another on `device`: [G, ...]. One process must have some.

    They travel as tensors; what is told about them first is small.
    """
    if world_size() == 1:
        return torch.cat(list(own))
    told = gather_objects(([len(part) for part in own], own[0][:0].cpu() if own else None))
    like = next(empty for _, empty in told if empty is not None)  # a process may have no batch to tell it
    counts = [sum(sizes) for sizes, _ in told]
    rows = Rows(tuple(counts)).gather(torch.cat([like.to(device), *own]))
    ranks = zip(rows.split(counts), told, strict=True)
    return torch.cat(_in_turn([part.split(sizes) for part, (sizes, _) in ranks]))


def _in_turn(of_ranks: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt out, put back into one row."""
    count, world = sum(map(len, of_ranks)), len(of_ranks)
    return [of_ranks[k % world][k // world] for k in range(count)]
