"""What goes wrong outside: disks, shards that vanish or kill, kills of everything, many in one run."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from small_run import hashes, make_run

from capfilt import CapFiltConfig, run_local
from capfilt.job import RayConfig, Watch, finish, prepare
from capfilt.worker import CapFiltWorker
from pipelines.config import save_config
from pipelines.run_capfilt import CapFiltRun

KILLS = int(os.environ.get("SOAK_KILLS", "5"))  # of the soak; a release is tried with 30
Job = tuple[CapFiltConfig, Path, dict[str, str]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Config, shards, and the hashes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("job")
    config, shards = make_run(folder)
    run_local(config, shards, folder / "out")
    return config, shards, hashes(folder / "out")


def command(job: Job, folder: Path, **settings: object) -> list[str]:
    """The line that a user types."""
    config, shards, _ = job
    folder.mkdir(exist_ok=True)
    save_config(CapFiltRun(str(shards), str(folder / "out"), config, **settings), folder)  # type: ignore[arg-type]
    return [sys.executable, "-m", "pipelines.run_capfilt", str(folder / "config.yaml")]


def assert_untouched(job: Job, out: Path) -> None:
    """The bytes of an undisturbed run, and nothing besides."""
    assert hashes(out) == job[2]
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    assert len(list((out / "_done").iterdir())) == len(job[2])
    assert json.loads((out / "summary.json").read_text())["stats"]["rows"] == 48


def test_a_full_disk_fails_shards_one_by_one_and_a_larger_one_goes_on(job: Job, tmp_path: Path) -> None:
    """No file of more than so many bytes can be written: shards cannot, what tells of them can."""
    line = command(job, tmp_path, engine="local")
    smallest = min(path.stat().st_size for path in (job[1].parent.parent / "out/scored").glob("*.parquet"))
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (smallest // 2, smallest // 2))
    found = subprocess.run(line, capture_output=True, text=True, preexec_fn=full, timeout=300)
    assert found.returncode == 3, found.stderr
    failed = json.loads((tmp_path / "out/summary.json").read_text())["failed"]
    assert len(failed) == 4 and all("too large" in reason for reason in failed.values())
    assert not list((tmp_path / "out").rglob("*.parquet")) and not list((tmp_path / "out").rglob("*.tmp"))
    assert subprocess.run(line, capture_output=True, timeout=300).returncode == 0
    assert_untouched(job, tmp_path / "out")


def test_a_place_that_cannot_be_written_to_is_named(job: Job, tmp_path: Path) -> None:
    line = command(job, tmp_path, engine="local")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scored").write_text("a file where a folder must be")
    found = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert found.returncode in (1, 3) and "out/scored" in found.stdout + found.stderr
    assert (tmp_path / "out/scored").read_text() == "a file where a folder must be"


def test_a_shard_that_vanishes_is_listed_and_the_rest_is_done(tmp_path: Path) -> None:
    config, shards = make_run(tmp_path)
    planned = prepare(config, shards, tmp_path / "out")
    gone = planned.todo[1].path
    kept = gone.read_bytes()
    gone.unlink()  # between the plan and its turn
    worker = CapFiltWorker(config, tmp_path / "out", planned.fingerprint)
    watch = Watch(planned)
    for split in planned.todo:
        watch.hear(worker(split))
    summary = finish(planned, watch)
    assert (summary.done, list(summary.failed)) == (3, [gone.stem])
    assert str(gone) in summary.failed[gone.stem]
    gone.write_bytes(kept)
    assert run_local(config, shards, tmp_path / "out").failed == {}


def workers_of(driver: int) -> list[psutil.Process]:
    """The processes that run an actor of ours: below the driver, or of a cluster on this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            if "_Actor" in " ".join(process.cmdline()) and process.pid != driver:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_shard_that_kills_its_worker_every_time_is_given_up_and_the_rest_is_done(
    job: Job, tmp_path: Path
) -> None:
    """Whoever writes the second shard is killed in the middle of it."""
    driver = subprocess.Popen(
        command(job, tmp_path, ray=RayConfig(workers=2)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    killed = set()  # a process that dies is seen for a moment longer
    while driver.poll() is None:
        for process in workers_of(driver.pid):
            try:
                if any("/scored/.00001.parquet" in file.path for file in process.open_files()):
                    process.kill()
                    killed.add(process.pid)
            except psutil.Error:
                continue
        time.sleep(0.005)
    text, _ = driver.communicate()
    assert (driver.returncode, len(killed)) == (3, 3), text
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary["failed"]) == ["00001"] and "given up after 3 attempts" in summary["failed"]["00001"]
    assert {name: found for name, found in job[2].items() if name != "00001.parquet"} == hashes(
        tmp_path / "out"
    )
    assert subprocess.run(command(job, tmp_path, engine="local"), timeout=300).returncode == 0
    assert_untouched(job, tmp_path / "out")


def test_nodes_join_and_leave(job: Job, tmp_path: Path) -> None:
    """While one worker is held, another works on a node that joined; when that leaves, the first goes on."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    line = command(job, tmp_path, ray=RayConfig(address=cluster.address))
    driver = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = tmp_path / "out/_done"

    def wait_for(what: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not what():
            assert driver.poll() is None and time.monotonic() < end, f"after {list(done.glob('*'))}"
            time.sleep(0.05)

    try:
        wait_for(lambda: any(writes(process) for process in workers_of(driver.pid)))
        (first,) = workers_of(driver.pid)
        first.suspend()
        before = len(list(done.glob("*.json")))
        node = cluster.add_node(num_cpus=1)
        wait_for(lambda: len(list(done.glob("*.json"))) > before)  # no one but the new node's worker did that
        cluster.remove_node(node, allow_graceful=False)
        first.resume()
        text, _ = driver.communicate(timeout=240)
    finally:
        driver.kill()
        cluster.shutdown()
    assert driver.returncode == 0, text
    assert_untouched(job, tmp_path / "out")


def writes(process: psutil.Process) -> bool:
    """Whether a worker is in the middle of a split."""
    try:
        return any("/scored/." in file.path for file in process.open_files())
    except psutil.Error:
        return False


class Chaos:
    """Kills the driver, a worker or a whole node, at random moments, and puts back what it took."""

    def __init__(self, cluster: Cluster, line: list[str], out: Path, seed: int):
        self.cluster, self.line, self.out, self.rng = cluster, line, out, random.Random(seed)
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self.done: list[str] = []  # what was killed
        self.rounds = 0  # runs that came to their end
        self.stopped = threading.Event()

    def start(self) -> None:
        self.driver = subprocess.Popen(self.line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def strike(self) -> None:
        kind = self.rng.choice(["driver", "worker", "worker", "node"])
        if kind == "driver":
            self.driver.send_signal(signal.SIGKILL)
            self.driver.wait()
            self.start()
        elif kind == "worker":
            workers = workers_of(self.driver.pid)
            if not workers:
                return
            self.rng.choice(workers).kill()
        else:
            node = self.nodes.pop(self.rng.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        self.done.append(kind)


def test_soak(job: Job, tmp_path: Path) -> None:
    """Whatever is killed, and however often: what a run ends with is what an undisturbed one ends with."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    line = command(job, tmp_path, ray=RayConfig(address=cluster.address))
    chaos = Chaos(cluster, line, tmp_path / "out", seed=KILLS)
    end = time.monotonic() + 60 + 30 * KILLS
    try:
        chaos.start()
        while len(chaos.done) < KILLS or chaos.driver.poll() is None:
            assert time.monotonic() < end, f"after {chaos.done} and {chaos.rounds} whole runs"
            code = chaos.driver.poll()
            if code is None:
                if len(chaos.done) < KILLS:
                    time.sleep(chaos.rng.uniform(0.2, 4))
                    chaos.strike()
                else:
                    time.sleep(0.2)
                continue
            if code == 0:  # a whole run: look at it, and begin again
                chaos.rounds += 1
                assert_untouched(job, tmp_path / "out")
                for mark in (tmp_path / "out/_done").iterdir():
                    mark.unlink()
            chaos.start()  # 3: some split lost three workers; 1: the cluster was away
        while chaos.driver.poll() != 0:
            assert time.monotonic() < end, f"after {chaos.done} and {chaos.rounds} whole runs"
            chaos.driver.wait()
            if chaos.driver.returncode != 0:
                chaos.start()
    finally:
        chaos.driver.kill()
        cluster.shutdown()
    assert_untouched(job, tmp_path / "out")
    print(f"{len(chaos.done)} kills, {chaos.rounds} whole runs")
