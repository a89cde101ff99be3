"""CapFilt on Ray: actors around `worker`, and one loop that hands them splits. The only file that knows Ray.

Why actors and not Ray Data: a split is read once, its images never enter the object store, and a resumed run
reads nothing that is done. The loop holds no model and no row.
"""

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when Ray starts: no telemetry. (A local cluster asks for its token by default since Ray 2.60.)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import RayActorError, RayTaskError

from capfilt.hold import hold
from capfilt.job import Job, RayConfig, Summary, Watch, finish, prepare
from capfilt.shards import Split
from capfilt.worker import CapFiltConfig, CapFiltWorker, Progress, ShardResult

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of a split, before it is listed as failed
WAIT_SECONDS = 1.0
OBJECT_STORE_BYTES = 100 << 20  # only paths and counts go through it


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, config: CapFiltConfig, out: Path, fingerprint: Mapping[str, str]):
        self.worker = CapFiltWorker(config, out, fingerprint)

    def ready(self) -> None:
        """Returns once the models are loaded; only then is work handed out."""

    def run(self, split: Split) -> Iterator[Progress | ShardResult]:
        yield from self.worker.steps(split)


def run_on_ray(
    config: CapFiltConfig, source: str | Path, out: str | Path, cluster: RayConfig | None = None
) -> Summary:
    """Score every shard of `source` into `out` on a Ray cluster; go on where an earlier run stopped.

    A worker that dies costs its split one of three attempts; then the split is listed as failed and the rest
    goes on. `out` must be a folder that all nodes share. Raises InUse when another run has it, else as
    `prepare`.
    """
    cluster = cluster or RayConfig()
    with hold(out):
        job = prepare(config, source, out)
        watch = Watch(job)
        if job.todo:
            ours = not ray.is_initialized()
            if ours:
                _connect(cluster, config)
            try:
                _Loop(job, watch, cluster).run()
            finally:
                if ours:
                    ray.shutdown()
        return finish(job, watch)


def _connect(cluster: RayConfig, config: CapFiltConfig) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == "local":
        # Actors hold their CPUs for life, so a laptop with fewer CPUs than workers must still start them.
        cpus = max(os.cpu_count() or 1, cluster.workers * max(1, cluster.cpus or config.threads))
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "num_cpus": cpus}
    ray.init(address=cluster.address, **options)


@dataclass
class _Busy:
    """An actor at work."""

    actor: Any
    split: Split
    heard: float


class _Loop:
    """Start actors, hand a split to each that is ready, listen, replace the dead, until all splits ended."""

    def __init__(self, job: Job, watch: Watch, cluster: RayConfig):
        self.job, self.watch, self.cluster = job, watch, cluster
        self.gpus = job.config.device != "cpu" and bool(ray.cluster_resources().get("GPU"))
        self.cpus = cluster.cpus or job.config.threads
        self.remote = ray.remote(_Actor).options(
            num_cpus=self.cpus, num_gpus=1 if self.gpus else 0, max_restarts=0
        )
        self.workers, self.counted = 0, -math.inf  # how many are wanted, and when that was found
        self.queue = deque(job.todo)
        self.attempts: Counter[str] = Counter()
        self.starting: dict[Any, Any] = {}  # reference of ready() -> actor
        self.busy: dict[Any, _Busy] = {}  # message stream -> who sends it
        self.failed_starts = 0

    def run(self) -> None:
        while self.queue or self.busy:
            self._staff()
            waiting = [*self.starting, *self.busy]
            done, _ = ray.wait(waiting, num_returns=1, timeout=WAIT_SECONDS, fetch_local=False)
            for reference in done:
                if reference in self.starting:
                    self._started(reference)
                else:
                    self._listen(reference)
            self._kill_silent()

    def _count(self) -> None:
        """How many workers the cluster has room for: nodes join and leave while a run goes on."""
        if time.monotonic() - self.counted < WAIT_SECONDS:
            return
        room = ray.cluster_resources()
        slots = int(room.get("GPU", 0)) if self.gpus else int(room.get("CPU", 0)) // self.cpus
        self.workers, self.counted = self.cluster.workers or max(1, slots), time.monotonic()

    def _staff(self) -> None:
        """As many actors as there is work for. A dead one is replaced here."""
        self._count()
        wanted = min(self.workers, len(self.queue) + len(self.busy))
        for _ in range(wanted - len(self.starting) - len(self.busy)):
            actor = self.remote.remote(self.job.config, self.job.out, self.job.fingerprint)
            self.starting[actor.ready.remote()] = actor

    def _started(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            ray.get(reference)
        except (RayActorError, RayTaskError) as error:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise RuntimeError(f"no worker could be started, {ATTEMPTS} tries: {error}") from error
            return
        self.failed_starts = 0
        self._give_work(actor)

    def _give_work(self, actor: Any) -> None:
        if not self.queue:
            ray.kill(actor)
            return
        split = self.queue.popleft()
        self.attempts[split.id] += 1
        stream = actor.run.options(num_returns="streaming").remote(split)
        self.busy[stream] = _Busy(actor, split, time.monotonic())

    def _listen(self, stream: Any) -> None:
        busy = self.busy[stream]
        try:
            message = ray.get(next(stream))
        except StopIteration:
            del self.busy[stream]
            self._give_work(busy.actor)
        except RayActorError as error:  # also while a dead node is only unreachable: its work is harmless
            del self.busy[stream]
            self._try_again(busy.split, f"the worker died: {error}")
        except RayTaskError as error:
            del self.busy[stream]
            self._try_again(busy.split, str(error.cause or error))
            self._give_work(busy.actor)
        else:
            busy.heard = time.monotonic()
            self.watch.hear(message)

    def _try_again(self, split: Split, reason: str) -> None:
        """At the back of the queue, so that a split that kills its worker does not stop the others."""
        if self.attempts[split.id] >= ATTEMPTS:
            self.watch.fail(split.id, f"{split.path}: given up after {ATTEMPTS} attempts: {reason}")
        else:
            logger.warning("split %s: %s; trying again", split.id, reason)
            self.queue.append(split)

    def _kill_silent(self) -> None:
        for busy in self.busy.values():
            if time.monotonic() - busy.heard > self.cluster.hang_seconds:
                ray.kill(busy.actor)  # its stream then ends with RayActorError
                busy.heard = time.monotonic()
