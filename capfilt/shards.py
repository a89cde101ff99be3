"""Splits and what is written for them: plan, read, write atomically, mark as done.

An output folder holds, for every split, `scored/<id>.parquet`, `scored/<id>_stats.json`, `_done/<id>.json`
and, after `select`, `clean/<id>.parquet`. A split exists if and only if its done-mark does.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.parquet import count_rows, read_parquet
from capfilt.schema import Chunk, ColumnMap, Columns, ShardError
from capfilt.tar import read_tar

SUFFIXES = (".parquet", ".tar")
ROW_GROUP_ROWS = 100  # what img2dataset writes and dataset viewers want
MAX_ID_CHARS = 150  # leaves room for the temporary name within the 255 bytes of a file name


# ---- plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The unit of work: rows [start, stop) of one input file. `stop` None is 'to its end'."""

    id: str
    path: Path
    start: int = 0
    stop: int | None = None
    prefix: str = ""  # of the names of rows without a key; the same for all splits of a file


def plan_splits(source: str | Path, rows_per_split: int) -> list[Split]:
    """Cut the shards of `source`, a folder, a file or a glob, into splits, from the files alone and in order.

    A parquet file of more than `rows_per_split` rows becomes several splits; a tar is always one, as its rows
    can only be counted by reading it. A file that cannot be opened is still a split, which fails with its
    reason when it is run. In folders, what has a name that starts with '.' or '_' is left out, and so is a
    parquet beside a tar of the same stem: img2dataset's metadata.
    Errors: ValueError when there is no shard at all.
    """
    if rows_per_split < 1:
        raise ValueError(f"rows_per_split is {rows_per_split}; it must be at least 1")
    root, files = _find(str(source))
    stems = {file: _readable_id(file.relative_to(root)) for file in files}
    shared = Counter(stem.casefold() for stem in stems.values())  # some file systems ignore case
    splits = []
    for file, stem in stems.items():
        if shared[stem.casefold()] > 1:
            stem = f"{stem}-{_short_hash(file.relative_to(root))}"
        rows = _rows_or_none(file)
        if rows is None or rows <= rows_per_split:
            splits.append(Split(stem, file, 0, rows, stem))
        else:
            starts = range(0, rows, rows_per_split)
            splits += [
                Split(f"{stem}-{a:012d}", file, a, min(a + rows_per_split, rows), stem) for a in starts
            ]
    taken = Counter(split.id.casefold() for split in splits)
    clashing = [split for split in splits if taken[split.id.casefold()] > 1]
    if clashing:
        names = ", ".join(str(split.path) for split in clashing[:4])
        raise ValueError(
            f"{source}: these shards would share the name {clashing[0].id!r}: {names}; rename one"
        )
    return splits


def _find(source: str) -> tuple[Path, list[Path]]:
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: is no shard; a shard ends in {' or '.join(SUFFIXES)}")
        return path.parent, [path]
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif glob.has_magic(source):
        fixed = [
            part for part in path.parts[: next(i for i, p in enumerate(path.parts) if glob.has_magic(p))]
        ]
        root, found = Path(*fixed), (Path(name) for name in glob.glob(source, recursive=True))
    else:
        raise ValueError(
            f"{source}: there is no such file or folder; give a folder, a shard or a glob of shards"
        )
    files = {
        file
        for file in found
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(root).parts)
    }
    files -= {file.with_suffix(".parquet") for file in files if file.suffix == ".tar"}
    if not files:
        raise ValueError(
            f"{source}: holds no shards ({' or '.join(SUFFIXES)}); give the output folder of img2dataset, or "
            "parquet files with images"
        )
    return root, sorted(files)


def _readable_id(relative: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join(relative.with_suffix("").parts)).lstrip(".")
    return name if 0 < len(name) <= MAX_ID_CHARS else f"{name[:MAX_ID_CHARS]}-{_short_hash(relative)}"


def _short_hash(relative: Path) -> str:
    return hashlib.sha256(os.fsencode(relative.as_posix())).hexdigest()[:8]


def _rows_or_none(file: Path) -> int | None:
    try:
        return count_rows(file) if file.suffix == ".parquet" else None
    except ShardError:
        return None


# ---- read ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenShard:
    """A split, opened: where its columns are, what is passed through, and its rows, to be read once."""

    found: ColumnMap
    schema: pa.Schema
    chunks: Iterator[Chunk]


def open_split(split: Split, columns: Columns) -> OpenShard:
    """Errors: ValueError (ShardError) naming the file and the reason, here or while `chunks` is read."""
    if split.path.suffix == ".tar":
        return OpenShard(*read_tar(split.path, columns, prefix=split.prefix))
    return OpenShard(
        *read_parquet(split.path, columns, start=split.start, stop=split.stop, prefix=split.prefix)
    )


def batches(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """The same rows on a fixed grid: batch k is rows [k * size, (k + 1) * size) of the split."""
    rows: list[Any] = []
    tables: list[pa.Table] = []
    for chunk in chunks:
        rows += chunk.rows
        tables.append(chunk.columns)
        while len(rows) >= size:
            table = pa.concat_tables(tables)
            yield Chunk(rows[:size], table.slice(0, size))
            rows, tables = rows[size:], [table.slice(size)]
    if rows:
        yield Chunk(rows, pa.concat_tables(tables))


# ---- write ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on disk; after an error, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


class ShardWriter:
    """Collects tables and writes them in row groups of 100 rows, however they were cut before."""

    def __init__(self, parquet: pq.ParquetWriter):
        self.num_rows = 0
        self._parquet = parquet
        self._waiting: list[pa.Table] = []

    def append(self, table: pa.Table) -> None:
        self.num_rows += table.num_rows
        self._waiting.append(table)
        if sum(waiting.num_rows for waiting in self._waiting) >= ROW_GROUP_ROWS:
            joined = pa.concat_tables(self._waiting)
            whole = joined.num_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            self._parquet.write_table(joined.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
            self._waiting = [joined.slice(whole)]

    def flush(self) -> None:
        """Write what is left. `writing_shard` calls this at the end."""
        if any(waiting.num_rows for waiting in self._waiting):
            self._parquet.write_table(pa.concat_tables(self._waiting), row_group_size=ROW_GROUP_ROWS)
        self._waiting = []


@contextmanager
def writing_shard(path: Path, schema: pa.Schema) -> Iterator[ShardWriter]:
    """Write a parquet file atomically, table by table. Equal tables give equal bytes."""
    with (
        replacing(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as parquet,
    ):
        writer = ShardWriter(parquet)
        yield writer
        writer.flush()


def write_json_atomically(path: Path, value: object) -> None:
    """Sorted keys, so that equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def sweep_temporary(out: Path) -> list[Path]:
    """Remove what killed writers left. One that is still alive fails at its rename, and nothing is lost."""
    left = [
        path for path in sorted(out.rglob(".*.tmp")) if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name)
    ]
    for path in left:
        path.unlink(missing_ok=True)
    return left


# ---- done-marks ----------------------------------------------------------------------------------


class FingerprintMismatch(ValueError):
    """The output folder was made from another input, config or model than the one at hand."""


@dataclass(frozen=True)
class Done:
    """A done-mark: what was made, out of what, and which files it is."""

    split: Split
    fingerprint: Mapping[str, str]
    counts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]  # path in the output folder -> {"bytes", "sha256"}


def scored_path(out: Path, split_id: str) -> Path:
    return out / "scored" / f"{split_id}.parquet"


def stats_path(out: Path, split_id: str) -> Path:
    return out / "scored" / f"{split_id}_stats.json"


def done_path(out: Path, split_id: str) -> Path:
    return out / "_done" / f"{split_id}.json"


def input_fingerprint(path: Path) -> str:
    """sha256 of the size, the first and the last MiB.

    Content, not time or name, so that a copied or touched file is still the same. The end of a parquet file
    is its footer, with place and size of every column. A full hash would read terabytes at every resume; the
    price is that a change inside a tar that keeps its size goes unseen.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()


def mark_done(
    out: Path, split: Split, fingerprint: Mapping[str, str], counts: Mapping[str, Any], files: Sequence[Path]
) -> None:
    """Make the split exist. Call it last, when `files`, all inside `out`, are in place."""
    write_json_atomically(
        done_path(out, split.id),
        {
            "split": {**asdict(split), "path": str(split.path.resolve())},
            "fingerprint": dict(fingerprint),
            "counts": dict(counts),
            "files": {file.relative_to(out).as_posix(): _file_record(file) for file in files},
        },
    )


def _file_record(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_done(out: Path, split_id: str) -> Done | None:
    """The done-mark of a split, None if it has none. Errors: ValueError when the mark is damaged."""
    path = done_path(out, split_id)
    try:
        read = json.loads(path.read_text())
        split = Split(**{**read["split"], "path": Path(read["split"]["path"])})
        return Done(split, read["fingerprint"], read["counts"], read["files"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: is no done-mark ({error!r}); delete it to have its split done again"
        ) from error


def done_splits(out: Path) -> list[Done]:
    """All splits that exist in `out`, by id."""
    marks = (read_done(out, path.stem) for path in sorted((out / "_done").glob("*.json")))
    return [mark for mark in marks if mark is not None]


def missing_files(out: Path, mark: Done) -> list[str]:
    """Files of a done split that are gone or have another size than its mark says."""
    sizes = {name: record["bytes"] for name, record in mark.files.items()}
    return [n for n, size in sizes.items() if not (out / n).is_file() or (out / n).stat().st_size != size]


def is_done(out: Path, split: Split, fingerprint: Mapping[str, str]) -> bool:
    """Whether the split exists in `out`, made from the same things, with all its files.

    Errors: FingerprintMismatch when it exists but was made from other things: mixing is never silent.
    """
    mark = read_done(out, split.id)
    if mark is None:
        return False
    old = {**mark.fingerprint, "rows": f"{mark.split.start}:{mark.split.stop}"}
    new = {**fingerprint, "rows": f"{split.start}:{split.stop}"}
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if changed:
        was = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in changed)
        raise FingerprintMismatch(
            f"{done_path(out, split.id)}: this split was made with another {', '.join(changed)} ({was}). "
            f"Choose another OUT, or delete {out} to start again"
        )
    return not missing_files(out, mark)


def check_plan(out: Path, splits: Sequence[Split]) -> None:
    """Refuse an `out` with done splits that are not in the plan: they would stay in every result.

    Errors: FingerprintMismatch.
    """
    planned = {split.id for split in splits}
    strangers = [path.stem for path in sorted((out / "_done").glob("*.json")) if path.stem not in planned]
    if strangers:
        raise FingerprintMismatch(
            f"{out}: has {len(strangers)} done splits that the input lacks ({', '.join(strangers[:4])}): "
            "input files were removed or renamed, or rows_per_split changed. "
            f"Choose another OUT, or delete {out} to start again"
        )
