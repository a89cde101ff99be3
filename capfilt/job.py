"""A run over many shards, whoever does the work: what is to do, what is done, how it goes, how it ended.

`run_local` and `run_on_ray` differ only in where the workers live: both begin with `prepare` and end with
`finish`.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from blip.checkpoint import digest
from blip.weights_files import locate
from capfilt.schema import short_reason
from capfilt.select import DEFAULT_THRESHOLD
from capfilt.shards import (
    Split,
    check_plan,
    done_splits,
    input_fingerprint,
    is_done,
    plan_splits,
    sweep_temporary,
    write_json_atomically,
)
from capfilt.stats import Stats, kept_share
from capfilt.worker import CapFiltConfig, Progress, ShardResult, settings


@dataclass(frozen=True)
class RayConfig:
    """Where the workers of `run_on_ray` live."""

    workers: int = 0  # 0: one per GPU of the cluster as it is, or, without GPUs, as many as its CPUs allow
    address: str = "local"  # "local" starts a cluster of its own; else that of a running one, e.g. "auto"
    cpus: int = 0  # per worker; 0: torch's threads
    hang_seconds: float = 1800.0  # a worker that is silent for so long is killed, and its split tried again


@dataclass(frozen=True)
class Job:
    """A planned run: every split, and those that are still to do."""

    config: CapFiltConfig
    out: Path
    fingerprint: Mapping[str, str]
    splits: list[Split]
    todo: list[Split]


@dataclass(frozen=True)
class Summary:
    """How a run ended. `failed` names each split that has no scored shard, and why."""

    splits: int
    done: int
    failed: Mapping[str, str]
    stats: Stats
    seconds: float


def prepare(config: CapFiltConfig, source: str | Path, out: str | Path) -> Job:
    """Plan the splits and compare `out` with them.

    Raises FingerprintMismatch when done splits were made from another input, config or model, ValueError when
    there is no shard or no checkpoint.
    """
    out = Path(out).resolve()
    splits = plan_splits(source, config.rows_per_split)
    own = json.dumps(asdict(settings(config)), sort_keys=True).encode()
    fingerprint = {
        "captioner": digest(locate(config.captioner)),
        "filter": digest(locate(config.filter)),
        "config": hashlib.sha256(own).hexdigest()[:16],
    }
    check_plan(out, splits)
    sweep_temporary(out)
    todo = [split for split in splits if not _is_done(out, split, fingerprint)]
    # Largest first: the last shards to finish are then small, and no worker waits long for another.
    todo.sort(key=lambda split: (-_size(split), split.id))
    return Job(config, out, fingerprint, splits, todo)


def _is_done(out: Path, split: Split, fingerprint: Mapping[str, str]) -> bool:
    if not split.path.exists():  # it vanished since the plan; the worker will say so
        return False
    return is_done(out, split, {**fingerprint, "input": input_fingerprint(split.path)})


def _size(split: Split) -> int:
    return split.path.stat().st_size if split.stop is None else split.stop - split.start


class Watch:
    """Progress of a run on one line: shards, rows a second, kept % of both texts, errors, time left."""

    def __init__(self, job: Job, seconds_between_lines: float = 5.0, stream: TextIO | None = None):
        self.job, self.stream, self.pause = job, stream or sys.stderr, seconds_between_lines
        self.started = self.last_line = time.monotonic()
        self.rows, self.ended, self.stats = 0, 0, Stats()
        self.under_way = Counter[str]()  # split -> rows heard of; plain processes only tell of whole splits
        self.failed: dict[str, str] = {}
        self.total = sum(split.stop - split.start for split in job.todo if split.stop is not None)
        already = len(job.splits) - len(job.todo)
        self._say(
            f"{len(job.splits)} splits, {already} done before, {self.total or 'unknown number of'} rows to do"
        )

    def hear(self, message: Progress | ShardResult) -> None:
        if isinstance(message, Progress):
            self.rows += message.rows
            self.under_way[message.split] += message.rows
            if message.note:
                self._say(message.note)
        elif message.error is None:
            self.ended += 1
            self.stats += message.stats
            self.rows += message.stats.rows - self.under_way.pop(message.split, 0)
        else:
            self.rows -= self.under_way.pop(message.split, 0)
            self.fail(message.split, message.error)
        if time.monotonic() - self.last_line >= self.pause:
            self.show()

    def fail(self, split: str, reason: str) -> None:
        self.failed[split] = short_reason(reason)
        self._say(f"failed: {split}: {self.failed[split]}")

    def show(self) -> None:
        self.last_line = time.monotonic()
        rate = self.rows / max(1e-9, self.last_line - self.started)
        web, synthetic = (kept_share(h, DEFAULT_THRESHOLD) for h in (self.stats.web, self.stats.synthetic))
        left = f"{(self.total - self.rows) / rate:.0f} s left" if rate and self.total else "time left unknown"
        self._say(
            f"shards {self.ended}/{len(self.job.todo)} | rows {self.rows} at {rate:.1f}/s | "
            f"ITM >= {DEFAULT_THRESHOLD}: web {web:.0%}, synthetic {synthetic:.0%} | "
            f"errors {self.stats.errors} | failed shards {len(self.failed)} | {left}"
        )

    def _say(self, line: str) -> None:
        self.stream.write(f"capfilt: {line}\n")
        self.stream.flush()


def finish(job: Job, watch: Watch) -> Summary:
    """Add up everything that is done in `out`, also by earlier runs, and write summary.json."""
    if job.todo:
        watch.show()
        sweep_temporary(job.out)  # of workers that died in this run
    stats = Stats()
    marks = done_splits(job.out)
    for mark in marks:
        stats += Stats.from_json(dict(mark.counts))
    seconds = time.monotonic() - watch.started
    summary = Summary(len(job.splits), len(marks), watch.failed, stats, seconds)
    write_json_atomically(job.out / "summary.json", _summary_json(job, summary))
    return summary


def _summary_json(job: Job, summary: Summary) -> dict[str, Any]:
    return {
        "splits": summary.splits,
        "done": summary.done,
        "failed": dict(summary.failed),
        "stats": summary.stats.to_json(),
        "seconds": round(summary.seconds, 1),
        "fingerprint": dict(job.fingerprint),
        "config": asdict(job.config),
    }
