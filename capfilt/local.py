"""CapFilt without Ray: the same worker in this process, or in a few beside it."""

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from capfilt.hold import hold
from capfilt.job import Job, Summary, Watch, finish, prepare
from capfilt.shards import Split
from capfilt.worker import CapFiltConfig, CapFiltWorker, ShardResult

_worker: CapFiltWorker | None = None  # of this pool process


def run_local(config: CapFiltConfig, source: str | Path, out: str | Path, workers: int = 1) -> Summary:
    """Score every shard of `source` into `out`; go on where an earlier run stopped.

    With one worker everything happens in this process. A worker process that dies ends the run with
    BrokenProcessPool; what was done stays done, and the same call goes on. Raises InUse when another run has
    `out`, else as `prepare`.
    """
    with hold(out):
        job = prepare(config, source, out)
        watch = Watch(job)
        if job.todo and workers == 1:
            worker = CapFiltWorker(config, job.out, job.fingerprint)
            for split in job.todo:
                for message in worker.steps(split):
                    watch.hear(message)
        elif job.todo:
            _run_processes(job, watch, min(workers, len(job.todo)))
        return finish(job, watch)


def _run_processes(job: Job, watch: Watch, workers: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start, (job.config, job.out, job.fingerprint)) as pool:
        for future in as_completed([pool.submit(_run, split) for split in job.todo]):
            watch.hear(future.result())


def _start(config: CapFiltConfig, out: Path, fingerprint: Mapping[str, str]) -> None:
    global _worker
    _worker = CapFiltWorker(config, out, fingerprint)


def _run(split: Split) -> ShardResult:
    assert _worker is not None
    return _worker(split)
