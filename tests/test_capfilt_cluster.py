"""CapFilt on a real local Ray: the same bytes for any number of workers and after kills, failures listed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from small_run import hashes, make_run

from capfilt import CapFiltConfig, run_local, run_on_ray
from capfilt.job import RayConfig
from pipelines.config import save_config
from pipelines.run_capfilt import CapFiltRun


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[CapFiltConfig, Path, dict[str, str]]:
    """Config, shards, and the hashes of an undisturbed run without Ray."""
    folder = tmp_path_factory.mktemp("job")
    config, shards = make_run(folder)
    run_local(config, shards, folder / "out")
    return config, shards, hashes(folder / "out")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_writes_the_same_bytes(job, cluster: None, tmp_path: Path, workers: int):
    config, shards, expected = job
    summary = run_on_ray(config, shards, tmp_path, RayConfig(workers=workers))
    assert (summary.done, summary.failed, summary.stats.rows) == (4, {}, 48)
    assert hashes(tmp_path) == expected


def test_a_finished_run_is_not_done_again(job, cluster: None, tmp_path: Path):
    config, shards, expected = job
    run_on_ray(config, shards, tmp_path, RayConfig(workers=1))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "scored").iterdir()}
    (tmp_path / "_done" / "00002.json").unlink()  # as if the run had been killed before this mark
    run_on_ray(config, shards, tmp_path, RayConfig(workers=1))
    again = {path.name for path in (tmp_path / "scored").iterdir() if path.stat().st_mtime_ns != times[path]}
    assert again == {"00002.parquet", "00002_stats.json"}
    assert hashes(tmp_path) == expected


def test_a_shard_that_cannot_be_read_is_listed_and_the_rest_goes_on(job, cluster: None, tmp_path: Path):
    config, shards, expected = job
    (tmp_path / "in").mkdir()
    for path in shards.glob("*.parquet"):
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "00009.parquet").write_bytes(b"PAR1 not really")
    summary = run_on_ray(config, tmp_path / "in", tmp_path / "out", RayConfig(workers=2))
    assert list(summary.failed) == ["00009"] and summary.done == 4
    assert hashes(tmp_path / "out") == expected


def start(folder: Path, job) -> subprocess.Popen:
    """The command line a user types, in a process of its own."""
    config, shards, _ = job
    save_config(CapFiltRun(str(shards), str(folder / "out"), config, ray=RayConfig(workers=2)), folder)
    command = [sys.executable, "-m", "pipelines.run_capfilt", str(folder / "config.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def workers_of(driver: int) -> list[psutil.Process]:
    """The Ray processes that run an actor of ours."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "_Actor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def finished(out: Path) -> int:
    return len(list((out / "_done").glob("*.json"))) if out.exists() else 0


def test_kill_9_of_the_driver_then_resume(job, tmp_path: Path):
    driver = start(tmp_path, job)
    until(lambda: finished(tmp_path / "out") >= 1 or driver.poll() is not None)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver = start(tmp_path, job)
    text, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, text
    assert hashes(tmp_path / "out") == job[2]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_kill_9_of_a_worker_in_the_middle(job, tmp_path: Path):
    driver = start(tmp_path, job)
    until(lambda: len(workers_of(driver.pid)) >= 1 or driver.poll() is not None)
    workers_of(driver.pid)[0].kill()
    text, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, text
    assert hashes(tmp_path / "out") == job[2]
    keys = [row["key"] for path in sorted((tmp_path / "out" / "scored").glob("*.parquet"))
            for row in pq.read_table(path, columns=["key"]).to_pylist()]  # fmt: skip
    assert len(keys) == len(set(keys)) == 48
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"] == {}
