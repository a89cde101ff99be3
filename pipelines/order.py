"""The order of training rows: endless streams that are pure functions of (seed, sizes) and begin anywhere.

One corpus: its groups of rows are permuted over the epoch, and `window` of them at a time are shuffled
together. Several corpora with weights: each is such a stream of its own, and every batch takes its rows from
them in the proportions of the weights.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, count, islice

import numpy as np

Place = tuple[int, int, int]  # epoch, group, row in the group


class Order:
    """The rows of one corpus, every row once an epoch, for ever. Groups are numbered from `first_group`."""

    def __init__(self, sizes: Sequence[int], window: int, seed: int, first_group: int = 0):
        self.sizes, self.window, self.seed, self.first_group = sizes, window, seed, first_group
        self.rows = sum(sizes)

    def rows_from(self, first: int) -> Iterator[Place]:
        """Row number `first` of the stream, and all after it."""
        epoch, skip = divmod(first, self.rows)
        while True:
            yield from self._epoch(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[Place]:
        groups = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
        for start in range(0, len(groups), self.window):
            chosen = groups[start : start + self.window]
            ends = list(accumulate(self.sizes[g] for g in chosen))
            if skip >= ends[-1]:
                skip -= ends[-1]
                continue
            order = np.random.default_rng((self.seed, epoch, start)).permutation(ends[-1])
            for position in order[skip:].tolist():
                slot = bisect_right(ends, position)
                row = position - (ends[slot - 1] if slot else 0)
                yield epoch, self.first_group + int(chosen[slot]), row
            skip = 0


def batches(order: Order, size: int, first: int = 0) -> Iterator[list[Place]]:
    """Batch k is the rows [k * size, (k + 1) * size) of the stream; from k = `first` on."""
    rows = order.rows_from(first * size)
    while True:
        yield list(islice(rows, size))


def mixed_batches(
    corpora: Sequence[Sequence[int]],
    weights: Sequence[float],
    window: int,
    size: int,
    seed: int,
    first: int = 0,
) -> Iterator[list[Place]]:
    """Batches of `size` rows of several corpora, from batch number `first` on.

    A corpus is given by the sizes of its groups; groups are numbered through all corpora. A place's epoch is
    that of its corpus. Within a batch the rows are shuffled, so that every W-th of them is a sample of the
    same mixture.
    """
    # Seeds of their own: corpora of equal sizes, such as one set with two kinds of captions, would otherwise
    # come in step, with the same image twice in every batch.
    shuffling, *seeds = np.random.SeedSequence(seed).generate_state(len(corpora) + 1, np.uint64).tolist()
    first_groups = accumulate(map(len, corpora), initial=0)
    taken = rows_of_each(first * size, weights)
    streams = [
        Order(sizes, window, own_seed, first_group).rows_from(skip)
        for sizes, own_seed, first_group, skip in zip(corpora, seeds, first_groups, taken, strict=False)
    ]
    for k in count(first):
        before, taken = taken, rows_of_each((k + 1) * size, weights)
        batch = [
            place
            for stream, old, new in zip(streams, before, taken, strict=True)
            for place in islice(stream, new - old)
        ]
        yield [batch[i] for i in np.random.default_rng((shuffling, k)).permutation(size).tolist()]


def rows_of_each(rows: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `rows` rows of a mixture come from each corpus; together they are `rows`.

    The first corpus takes its share, rounded down; of what is left the second takes its share among those
    left, and so on. So every number grows with `rows` and is less than len(weights) from its exact share.
    Rounding the limits between cumulative shares would be simpler, but there a small corpus can lose a row
    again: with 0.5, 0.1, 0.4 the second has one of the first 5 rows and none of the first 6.
    """
    found, left = [], Fraction(sum(map(Fraction, weights)))
    for weight in map(Fraction, weights):
        found.append(int(rows * weight / left))
        rows, left = rows - found[-1], left - weight
    return found
