"""Feed damaged files to a reader until the time is over. `main` is for a process of its own, whose death by a
signal can then be seen, and what it was reading: FOLDER/input.* is the file at hand.

The readers are imported where they are used, as some are a hundred times faster to import than others.
"""

import faulthandler
import io
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile.memory import memory
from hostile.mutations import Mend, damaged, mend_image, mend_parquet, mend_tar
from hostile_files import make_tar, member
from PIL import Image

from capfilt.schema import CLEAN, Columns, ShardError
from capfilt.shards import batches, open_split, plan_splits
from capfilt.tar import index_tar, read_part

LIMIT = 20  # seconds for one file, after which the process ends itself
WARM = 200  # files after which memory is looked at for the first time
MOST_ROWS = 2000  # read of a file; a small one can hold millions of nothing

Read = Callable[[Path], None]


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((48, 36)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def pictures() -> list[bytes]:
    """Every kind that is read, and the modes and ways of each."""
    modes = {"JPEG": ("RGB", "CMYK", "L"), "PNG": ("RGBA", "P", "I;16", "1"), "WEBP": ("RGBA",)}
    found = [picture(len(mode), kind, mode) for kind, some in modes.items() for mode in some]
    found += [picture(8, progressive=True), picture(9, "WEBP", lossless=True), picture(10, "GIF", "P")]
    moving = [Image.fromarray(np.full((9, 9, 3), i, np.uint8)) for i in (0, 99, 200)]
    for kind in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        moving[0].save(file, kind, save_all=True, append_images=moving[1:])
        found.append(file.getvalue())
    return found


def tables() -> list[pa.Table]:
    rows = 40
    flat = {
        "key": [f"{i:09d}" for i in range(rows)],
        "caption": [f"a caption of number {i}" if i % 7 else None for i in range(rows)],
        "jpg": pa.array([picture(i) if i % 5 else None for i in range(rows)], pa.binary()),
        "width": pa.array(range(rows), pa.int32()),
        "when": pa.array(range(rows), pa.timestamp("us")),
        "similarity": pa.array([i / 7 for i in range(rows)], pa.float32()),
        "flag": pa.array([None if i % 3 else True for i in range(rows)]),
        "category": pa.array(["a", "b"] * (rows // 2)).dictionary_encode(),
        "boxes": pa.array([[i] * (i % 3) for i in range(rows)]),
    }
    image = pa.array([{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(rows)])
    nested = {"image": image, "text": [f"text {i}" for i in range(rows)]}
    return [pa.table(flat), pa.table(nested)]


def clean_tables() -> list[pa.Table]:
    captions = [{"text": "a cat", "source": "web", "itm": 0.5}]
    rows = [{"key": str(i), "image": {"bytes": picture(i)}, "captions": captions} for i in range(20)]
    return [pa.Table.from_pylist(rows, schema=CLEAN)]


def parquet_files(folder: Path, given: list[pa.Table]) -> list[bytes]:
    ways: list[dict[str, object]] = [
        {"compression": "none", "use_dictionary": False},
        {"compression": "none", "data_page_version": "2.0"},
        {"compression": "zstd", "row_group_size": 7},
        {"compression": "snappy", "data_page_size": 100, "write_page_index": True},
        {"compression": "gzip", "store_schema": False},
        {"compression": "lz4", "use_dictionary": False, "data_page_version": "2.0", "version": "1.0"},
    ]
    found = []
    for table in given:
        for way in ways:
            pq.write_table(table, folder / "whole.parquet", **way)
            found.append((folder / "whole.parquet").read_bytes())
    texts = [name for name in given[0].column_names if pa.types.is_string(given[0].schema.field(name).type)]
    for encoding in ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"):
        encodings = dict.fromkeys(texts, encoding)
        pq.write_table(
            given[0], folder / "whole.parquet", use_dictionary=False, column_encoding=encodings,
            compression="none",
        )  # fmt: skip
        found.append((folder / "whole.parquet").read_bytes())
    return found


def tars(folder: Path) -> list[bytes]:
    found = []
    for rows, long in ((3, 1), (20, 1), (4, 40)):
        members = []
        for i in range(rows):
            members += [member(f"{'k' * long}{i}.jpg", picture(i)), member(f"{'k' * long}{i}.txt", b"a text")]
            members += [member(f"{'k' * long}{i}.json", b'{"caption": "other"}')]
        found.append(make_tar(folder / "whole.tar", members).read_bytes())
    return found


def read_raw(path: Path) -> None:
    """Planned and read as a worker reads it."""
    for split in plan_splits(path, 8192):
        rows = 0
        for chunk in batches(open_split(split, Columns()).chunks, 32):
            assert len(chunk.rows) == chunk.columns.num_rows
            assert all((row.image is not None) == (row.status == "ok") for row in chunk.rows)
            rows += len(chunk.rows)
            if rows > MOST_ROWS:
                break


def read_indexed(path: Path) -> None:
    read_raw(path)
    for part in index_tar(path, Columns(), 8):
        read_part(part, Columns())


def image_reader() -> Read:
    from blip.image import decode

    def read(path: Path) -> None:
        assert decode(path.read_bytes()).mode == "RGB"

    return read


def training_reader() -> Read:
    from pipelines.data import find_groups, read_group

    def read(path: Path) -> None:
        for group in find_groups((str(path),), Columns()):
            assert len(read_group(group, Columns())) == group.rows

    return read


KINDS: dict[str, tuple[Callable[[Path], list[bytes]], str, Callable[[], Read], Mend]] = {
    "image": (lambda _: pictures(), "input.jpg", image_reader, mend_image),
    "parquet": (lambda to: parquet_files(to, tables()), "input.parquet", lambda: read_raw, mend_parquet),
    "tar": (tars, "input.tar", lambda: read_indexed, mend_tar),
    "clean": (lambda to: parquet_files(to, clean_tables()), "input.parquet", training_reader, mend_parquet),
}


def fuzz(kind: str, folder: Path, seed: int, seconds: float) -> dict[str, float]:
    """-> how many files, how many of them could be read, and the memory in MiB early, last and at most.

    Errors: those that a reader may not end with. A file that takes too long ends the process.
    """
    make, name, importing, mend = KINDS[kind]
    files, path, read = make(folder), folder / name, importing()
    (folder / "here").mkdir()
    os.chdir(folder / "here")  # where a name without a folder would lead
    end, count, whole, warm = time.monotonic() + seconds, 0, 0, 0.0
    while time.monotonic() < end or count <= WARM:
        path.write_bytes(damaged(files, random.Random(f"{seed} {count}"), mend))
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            read(path)
            whole += 1
        except ShardError as error:
            assert path.name in str(error) and len(str(error)) < 2000
        except ValueError as error:  # an ImageError; or, of a shard, a column is not there
            assert type(error).__name__ == "ImageError" or str(error).startswith(str(path)), repr(error)
        count += 1
        if count == WARM:
            warm = memory("VmRSS")
    faulthandler.cancel_dump_traceback_later()
    path.unlink()
    return {"files": count, "whole": whole, "early": warm, "last": memory("VmRSS"), "peak": memory("VmHWM")}


def main() -> None:
    """KIND FOLDER SEED SECONDS -> what `fuzz` counts, as a line of JSON."""
    logging.disable(logging.WARNING)
    print(json.dumps(fuzz(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
