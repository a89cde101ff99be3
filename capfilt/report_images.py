"""Thumbnails of the rows that the report shows: each image decoded by the safe gate and encoded anew."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from blip.image import ImageError, decode, thumbnail
from capfilt.parquet import READ_ROWS, open_parquet
from capfilt.report_data import Pair
from capfilt.schema import ColumnMap, Columns, ShardError, scored_columns
from capfilt.shards import Done, input_fingerprint, open_split, scored_path

SIDE = 224  # pixels of the longer side
Place = tuple[str, int]  # split and row


def thumbnails(out: Path, marks: Iterable[Done], pairs: Iterable[Pair]) -> dict[Place, bytes | str]:
    """Place -> a small JPEG, or why there is none. Only images of these rows are decoded, one by one."""
    wanted: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        wanted[pair.split].add(pair.row)
    found: dict[Place, bytes | str] = {}
    for mark in marks:
        rows = wanted.get(mark.split.id, set())
        try:
            for row, data in _images(out, mark, rows):
                found[mark.split.id, row] = small(data)
        except (ShardError, OSError, pa.ArrowException) as error:
            reason = f"the image cannot be read: {type(error).__name__}"
            found |= {(mark.split.id, row): reason for row in rows if (mark.split.id, row) not in found}
    return found


def small(data: bytes | None) -> bytes | str:
    """A thumbnail of SIDE pixels, or why there is none."""
    try:
        return thumbnail(decode(data), SIDE)
    except ImageError as error:
        return f"the image cannot be shown: {error.fault}"


def _images(out: Path, mark: Done, rows: set[int]) -> Iterator[tuple[int, bytes | None]]:
    """Row -> image bytes, from the scored shard or, if it did not keep them, from the input."""
    if not rows:
        return
    path = scored_path(out, mark.split.id)
    with open_parquet(path) as file:
        found, has_images = scored_columns(file.schema_arrow, path)
        if not has_images:
            yield from _from_input(mark, found, rows)
            return
        first = 0
        for group in range(file.metadata.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if any(first <= row < last for row in rows):
                yield from _from_group(file.iter_batches(
                    READ_ROWS, row_groups=[group], columns=[found.image], use_threads=False
                ), first, rows)  # fmt: skip
            first = last


def _from_group(
    batches: Iterable[pa.RecordBatch], first: int, rows: set[int]
) -> Iterator[tuple[int, bytes | None]]:
    for batch in batches:
        for i in range(batch.num_rows):
            if first + i in rows:
                image = batch.column(0)[i].as_py()
                yield first + i, image["bytes"] if isinstance(image, dict) else image
        first += batch.num_rows


def _from_input(mark: Done, found: ColumnMap, rows: set[int]) -> Iterator[tuple[int, bytes | None]]:
    path, last = mark.split.path, max(rows)
    if mark.fingerprint.get("input") != input_fingerprint(path):
        raise ShardError(f"{path}: has changed since it was scored")
    number = 0
    for chunk in open_split(mark.split, Columns(**asdict(found))).chunks:
        for row in chunk.rows:
            if number in rows:
                yield number, row.image
            number += 1
        if number > last:
            return
