"""What a worker holds is its models and its batches, however long the shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_files import ROOT, make_tar, member
from PIL import Image
from small_run import save_models

from blip.generate import Decoding
from blip.image import thumbnail
from capfilt import CapFiltConfig

FEW, MANY = 200, 4000
# Models first, then the shards by name; after each, the rows and the most that was held until then.
PEAKS = """
import json, sys
from pathlib import Path
from hostile.memory import memory
from blip.generate import Decoding
from capfilt import CapFiltConfig, CapFiltWorker
from capfilt.schema import Columns
from capfilt.shards import plan_splits
config, shards, out = {config!r}, {shards!r}, {out!r}
worker = CapFiltWorker(config, Path(out), {{}})
found = []
for split in plan_splits(shards, config.rows_per_split):
    result = worker(split)
    assert result.error is None, result.error
    found.append((result.stats.rows, memory("VmHWM")))
print(json.dumps(found))
"""


def pictures(count: int) -> list[bytes]:
    """JPEGs of about 20 kB, so that whoever keeps them is found out."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 128, 160, 3), dtype=np.uint8)
    return [thumbnail(Image.fromarray(values), 160, quality=90) for values in noise]


def write_shard(path: Path, rows: int, images: list[bytes]) -> None:
    keys, texts = ([f"{word}{i}" for i in range(rows)] for word in ("", "a red circle number "))
    data = [images[i % len(images)] for i in range(rows)]
    if path.suffix == ".tar":
        pairs = zip(keys, texts, data, strict=True)
        make_tar(
            path, [m for k, t, d in pairs for m in (member(f"{k}.jpg", d), member(f"{k}.txt", t.encode()))]
        )
    else:
        table = pa.table({"key": keys, "caption": texts, "jpg": pa.array(data, pa.binary())})
        pq.write_table(table, path, row_group_size=100, use_dictionary=False)


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_long_shard_takes_no_more_memory_than_a_short_one(tmp_path: Path, suffix: str) -> None:
    """The images of the long one are 80 MB, and 250 MB when they are decoded."""
    images = pictures(60)
    for name, rows in (("0few", FEW), ("1many", MANY)):
        write_shard(tmp_path / f"{name}.{suffix}", rows, images)
    assert (tmp_path / f"1many.{suffix}").stat().st_size > 60 << 20
    captioner, judge = save_models(tmp_path / "models")
    decoding = Decoding(top_p=0.9, min_length=5, max_length=8)
    config = CapFiltConfig(
        str(captioner), str(judge), decoding=decoding, device="cpu", rows_per_split=MANY, keep_images=False
    )
    code = PEAKS.format(config=config, shards=str(tmp_path), out=str(tmp_path / "_out"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "tests"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (few, before), (many, after) = json.loads(done.stdout.splitlines()[-1])
    print(f"{suffix}: {before:.0f} MiB after {few} rows, {after:.0f} after {many} more")
    assert (few, many) == (FEW, MANY)
    assert after < 1.1 * before and after - before < 40
