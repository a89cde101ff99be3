"""One process at a time in a folder, and none for ever: real processes that end in every way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import hashes, make_run

from capfilt import run_local
from capfilt.hold import LOCK_FILE, InUse, hold
from pipelines.config import save_config
from pipelines.run_capfilt import CapFiltRun

HOLDER = """
import sys, time
from capfilt.hold import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that has tmp_path / "out"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_who_has_it(holder: subprocess.Popen, tmp_path: Path) -> None:
    with (
        pytest.raises(InUse, match=rf"out is in use by process {holder.pid} on \S+, since 20"),
        hold(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_goes_with_the_process(holder: subprocess.Popen, tmp_path: Path, how: int) -> None:
    holder.send_signal(how)
    holder.wait(timeout=60)
    with hold(tmp_path / "out"):
        assert f"process {os.getpid()} on" in (tmp_path / "out" / LOCK_FILE).read_text()


def test_it_goes_with_the_block_however_that_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError("x")
    with hold(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_other_folders_are_free(holder: subprocess.Popen, tmp_path: Path) -> None:
    with hold(tmp_path / "out2"), hold(tmp_path / "out" / "within"):
        pass


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_second_driver_refuses_and_touches_nothing(
    holder: subprocess.Popen, tmp_path: Path, engine: str
) -> None:
    config, shards = make_run(tmp_path)
    unfinished = tmp_path / "out/scored/.00000.1.tmp"
    unfinished.parent.mkdir()
    unfinished.write_text("being written by the first")
    save_config(CapFiltRun(str(shards), str(tmp_path / "out"), config, engine), tmp_path)
    command = [sys.executable, "-m", "pipelines.run_capfilt", str(tmp_path / "config.yaml")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert f"is in use by process {holder.pid}" in found.stderr and found.stderr.count("\n") == 1
    assert unfinished.read_text() == "being written by the first"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LOCK_FILE, "scored"}


def test_after_the_first_died_the_second_goes_on(holder: subprocess.Popen, tmp_path: Path) -> None:
    config, shards = make_run(tmp_path)
    with pytest.raises(InUse):
        run_local(config, shards, tmp_path / "out")
    holder.kill()
    holder.wait()
    assert run_local(config, shards, tmp_path / "out").done == 4
    run_local(config, shards, tmp_path / "undisturbed")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")
