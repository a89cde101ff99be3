"""Damaged files by the thousand: a result or the one kind of error, no crash, no hang, no growth.

FUZZ_SECONDS=600 does it for as long for each reader, FUZZ_SEED=7 with other files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import BARE, ROOT

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
CODE = BARE + BARE.replace("capfilt", "blip") + "from hostile.fuzz import main\nmain()\n"


@pytest.mark.parametrize("kind", ["image", "parquet", "tar", "clean"])
def test_damaged_files_give_a_result_or_a_reason(tmp_path: Path, kind: str) -> None:
    """In a process of its own: 139 would be a crash of Pillow or Arrow, 1 a hang or another error."""
    run = [sys.executable, "-c", CODE, kind, str(tmp_path / "in"), str(SEED), str(SECONDS)]
    (tmp_path / "in").mkdir()
    done = subprocess.run(
        run, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "tests"}, check=False
    )
    told = f"{kind}: seed {SEED}, exit code {done.returncode}; the file is in {tmp_path / 'in'}"
    assert done.returncode == 0, f"{told}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    print(kind, found)
    assert 0.01 < found["whole"] / found["files"] < 0.9, found  # neither all harmless nor all the same error
    assert found["last"] < found["early"] + 64 and found["peak"] < found["early"] + 256, found
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert names - {"in/whole.parquet", "in/whole.tar"} == {"in", "in/here"}
