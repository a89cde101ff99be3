"""Runs that are made of other runs: each step is a line that a person could start too, and is done once.

OUT/manifest.json tells of every finished step its command, the digest of its config file, the seconds and the
exit code. A step that was stopped goes on by itself when it is run again, as every entry does.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt.shards import write_json_atomically
from pipelines.config import load_config

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """An entry point: its module, the dataclass that its config files hold, its exit codes for 'done'."""

    module: str
    config: type[Any]
    accepted: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Step:
    name: str  # e.g. 1/captioner, also its folder below OUT
    entry: Entry
    config: str  # file
    overrides: tuple[str, ...]
    processes: int = 1

    @property
    def command(self) -> list[str]:
        """The words behind `python -m`."""
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        start = launch if self.processes > 1 else []
        return [*start, self.entry.module, self.config, *self.overrides]


class StepFailed(ValueError):
    """A step ended with another exit code than it should. The message names it."""


def check_steps(steps: Sequence[Step]) -> None:
    """Read every config with its overrides: what is wrong in the last step is told before the first begins.

    Errors: ConfigError as the step itself would give it.
    """
    for step in steps:
        load_config(step.entry.config, step.config, step.overrides)


def run_step(out: Path, step: Step) -> None:
    """Run a step, unless the manifest of `out` has it. Its own words go where ours do.

    Errors: StepFailed; ValueError when it was done by another command or config.
    """
    done = read_manifest(out)
    now = {"command": shlex.join(step.command), "config_sha256": _digest(step.config)}
    if step.name in done:
        for what, value in now.items():
            if done[step.name][what] != value:
                raise ValueError(
                    f"{out}: step {step.name} was done with another {what} ({done[step.name][what]}; now "
                    f"{value}). Choose another out, or delete the step from {out / MANIFEST} and its folder"
                )
        print(f"== {step.name}: done before", flush=True)
        return
    print(f"== {step.name}: python -m {now['command']}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *step.command], check=False).returncode
    if code not in step.entry.accepted:
        raise StepFailed(f"step {step.name} ended with exit code {code}; mend that and run the same again")
    done[step.name] = now | {"seconds": round(time.monotonic() - started, 1), "exit_code": code}
    write_json_atomically(out / MANIFEST, [{"step": name, **found} for name, found in done.items()])


def read_manifest(out: Path) -> dict[str, Any]:
    """Name -> what is known of the finished step, in the order they were done; empty where nothing was."""
    path = out / MANIFEST
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return {record.pop("step"): record for record in records}


def _digest(config: str) -> str:
    return hashlib.sha256(Path(config).read_bytes()).hexdigest()[:16]
