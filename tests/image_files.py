"""Image files and annotations on disk, and what became of them, for tests."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipelines.annotations import Table
from pipelines.ingest import IngestRun

Record = dict[str, Any]

KARPATHY_COCO = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000042.jpg",
            "imgid": 0,
            "cocoid": 42,
            "split": "test",
            "sentids": [1],
            "sentences": [{"raw": "a test", "tokens": ["a", "test"], "imgid": 0, "sentid": 1}],
        },
        {
            "filepath": "train2014",
            "filename": "COCO_train2014_000000000007.jpg",
            "imgid": 1,
            "cocoid": 7,
            "split": "train",
            "sentences": [{"raw": "a cat"}, {"raw": "a small cat"}],
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000009.jpg",
            "imgid": 2,
            "cocoid": 9,
            "split": "restval",
            "sentences": [{"raw": "a dog"}],
        },
    ],
    "dataset": "coco",
}


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(values).resize((24, 16)).save(file, "JPEG")
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def put_json(path: Path, tree: Any) -> str:
    return str(put(path, json.dumps(tree).encode()))


def rows(out: Path) -> list[Record]:
    """All rows of all shards, read by pyarrow alone."""
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def texts(out: Path) -> dict[str, list[str]]:
    return {row["key"]: [caption["text"] for caption in row["captions"]] for row in rows(out)}


def table_of(folder: Path, lines: Sequence[tuple[str, str]], name: str = "pairs.tsv") -> Table:
    """A table of (image path, caption)."""
    text = "".join(f"{image}\t{caption}\n" for image, caption in [("filepath", "title"), *lines])
    return Table(str(put(folder / name, text.encode())))


def numbered(folder: Path, count: int, absent: Sequence[int] = (), **values: Any) -> IngestRun:
    """A run over a table of `count` images named 000.jpg, ..., of which some files are missing."""
    for i in set(range(count)) - set(absent):
        put(folder / f"images/{i:03d}.jpg", jpeg(i))
    table = table_of(folder, [(f"{i:03d}.jpg", f"picture {i}") for i in range(count)])
    places: Record = {"images": str(folder / "images"), "out": str(folder / "out"), "table": table}
    return IngestRun(**(places | values))
