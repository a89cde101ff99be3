"""How long CapFilt will take on a corpus, and what it will cost, from a short measured run on a sample of it.

Rows are counted in the files: parquet says how many it has, of tars a few are counted and the others taken to
be as dense. A worker then scores a sample, spread over the corpus, as it would in the real run. More workers
take the largest splits first, as they do there, so too few splits for many workers show in the hours.

OUT holds plan.json.
"""

import heapq
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from capfilt.job import Job
from capfilt.schema import Columns
from capfilt.shards import Split, plan_splits, write_json_atomically
from capfilt.tar import index_tar
from capfilt.worker import CapFiltWorker, Progress, ShardResult
from pipelines.config import load_config, parse_args, run_main, save_config
from pipelines.run_capfilt import CapFiltRun

T = TypeVar("T")

PLACES = 4  # splits that a sample is of
HOUR = 3600.0


@dataclass(frozen=True)
class PlanRun:
    out: str
    recipe: str  # the config file of pipelines.run_capfilt, as it is going to be run
    input: str | None = None  # these three in place of what the recipe says
    captioner: str | None = None
    filter: str | None = None
    rows: int = 512  # of the sample
    workers: tuple[int, ...] = (1, 8, 64)  # each with a device of its own, like the one here
    price: float | None = None  # of a worker for an hour, in your money

    def __post_init__(self) -> None:
        if self.rows < 2 * PLACES:
            raise ValueError(f"rows is {self.rows}; a sample needs at least {2 * PLACES}")
        if not self.workers or min(self.workers) < 1:
            raise ValueError(f"workers is {list(self.workers)}; give numbers of at least 1")


@dataclass(frozen=True)
class Measured:
    """A worker on a sample."""

    device: str
    rows: int
    failed: int  # rows that have no score
    start_seconds: float  # until both models are loaded
    rows_per_second: float  # after the first batch, which is slow


@dataclass(frozen=True)
class Forecast:
    workers: int
    busy: int  # workers that find a split to do
    hours: float
    worker_hours: float  # which are paid for
    cost: float | None


def main(argv: list[str]) -> int:
    run = parse_args(argv, PlanRun)
    given = {"input": run.input, "capfilt.captioner": run.captioner, "capfilt.filter": run.filter}
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    capfilt = load_config(CapFiltRun, run.recipe, words)
    splits = plan_splits(capfilt.input, capfilt.capfilt.rows_per_split)
    sizes = count_rows(splits, capfilt.capfilt.columns)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(capfilt.capfilt, Path(folder), {}, splits, splits)
        found = measure(job, run.rows)
    plans = [forecast(sizes, workers, found, run.price) for workers in run.workers]
    save_config(run, run.out)
    tree = {"rows": round(sum(sizes)), "splits": len(splits), "measured": asdict(found)}
    write_json_atomically(Path(run.out, "plan.json"), tree | {"plans": [asdict(plan) for plan in plans]})
    print(describe(sizes, found, plans))
    return 0


def count_rows(splits: Sequence[Split], columns: Columns) -> list[float]:
    """Rows of every split; of tars an estimate by their bytes. A file that cannot be read has none.

    Errors: ShardError for one of the few tars that are counted.
    """
    tars = [split for split in splits if split.path.suffix == ".tar"]
    counted = spread(tars, PLACES)
    rows = sum(part.rows for split in counted for part in index_tar(split.path, columns))
    bytes_a_row = sum(split.path.stat().st_size for split in counted) / max(1, rows)

    def size(split: Split) -> float:
        if split.stop is not None:
            return split.stop - split.start
        return split.path.stat().st_size / bytes_a_row if split.path.suffix == ".tar" and rows else 0

    return [size(split) for split in splits]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, the first of each of as many equal parts."""
    return [items[len(items) * i // count] for i in range(count)] if len(items) > count else list(items)


def measure(job: Job, rows: int) -> Measured:
    """A worker of this process scores about `rows` rows, equally of a few splits; nothing of it is kept.

    Errors: ValueError when no split can be read, or the sample ends with its first batch.
    """
    started = time.monotonic()
    worker = CapFiltWorker(job.config, job.out, job.fingerprint)
    loaded = time.monotonic()
    places = spread(job.splits, PLACES)
    each = -(-rows // len(places))
    first: float | None = None
    timed = done = failed = 0
    for rows_now, errors in chain.from_iterable(_batches(worker, split, each) for split in places):
        now = time.monotonic()
        if first is None:
            first = now
        else:
            timed += rows_now
        done, failed = done + rows_now, failed + errors
    if first is None or not timed:
        raise ValueError(
            f"the sample has {done} rows, which is one batch or none; give more rows, a smaller "
            "capfilt.batch_size, or shards that can be read"
        )
    return Measured(str(worker.device), done, failed, loaded - started, timed / (now - first))


def _batches(worker: CapFiltWorker, split: Split, rows: int) -> Iterator[tuple[int, int]]:
    """(rows, rows without a score) of every batch, until `rows` are done; the split is left unfinished."""
    steps = worker.steps(split)
    done = 0
    for message in steps:
        if isinstance(message, Progress):
            done += message.rows
            yield message.rows, message.errors
        if isinstance(message, ShardResult) or done >= rows:
            break
    steps.close()


def forecast(sizes: Sequence[float], workers: int, found: Measured, price: float | None) -> Forecast:
    """For splits of so many rows each, and workers as fast as the one that was measured."""
    busy = min(workers, sum(size > 0 for size in sizes))
    seconds = found.start_seconds + longest(sizes, workers) / found.rows_per_second
    paid = workers * seconds / HOUR
    return Forecast(workers, busy, seconds / HOUR, paid, None if price is None else paid * price)


def longest(sizes: Sequence[float], workers: int) -> float:
    """Rows of the worker that ends last, when each takes the largest split that is left once it is free."""
    loads = [0.0] * workers
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads)


def describe(sizes: Sequence[float], found: Measured, plans: Sequence[Forecast]) -> str:
    """For a person."""
    head = ["workers", "busy", "hours", "device hours", "cost"]
    lines = [
        f"{sum(sizes):,.0f} rows in {len(sizes)} splits, the largest of {max(sizes):,.0f}",
        f"measured on {found.device}, {found.rows} rows: {found.rows_per_second:.1f} rows/s, "
        f"{found.start_seconds:.0f} s to start, {found.failed / found.rows:.1%} of the rows without a score",
        "".join(f"{word:>14}" for word in head),
    ]
    for plan in plans:
        cells: list[Any] = [plan.workers, plan.busy, f"{plan.hours:,.3g}", f"{plan.worker_hours:,.3g}"]
        cells.append("" if plan.cost is None else f"{plan.cost:,.2f}")
        lines.append("".join(f"{cell:>14}" for cell in cells))
    if any(plan.busy < plan.workers for plan in plans):
        lines.append("some workers find nothing to do: a smaller capfilt.rows_per_split, or smaller tars")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
