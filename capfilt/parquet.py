"""Read a stranger's parquet file as chunks of rows, with a bound on memory and without running its code.

What is refused whole, before a value is read: extension types, a thousand columns, numbers of rows that
cannot be, dictionaries that unpack to more than 64 MiB. What is refused row by row, with a reason: cells
over the limits, text that is not UTF-8.
What cannot be bounded from here: one page may unpack to 2 GiB; that is for the worker's memory limit.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as kind

from capfilt.parquet_pages import READER, refuse_dictionaries
from capfilt.schema import (
    IMAGE,
    Chunk,
    ColumnMap,
    Columns,
    Row,
    ShardError,
    is_string,
    map_columns,
    plain_type,
    refuse_unsafe,
    short_reason,
)

READ_ROWS = 16  # rows in memory at a time; one page of a hostile file may expand this many times
MAX_IMAGE_BYTES = 32 << 20
MAX_TEXT_CHARS = 32_768
MAX_KEY_CHARS = 1_024
MAX_CELL_CHARS = 1 << 20  # any other text that is passed through, such as `exif`
MAX_ROWS = 10_000_000  # of a file, by its footer; a thousand times what img2dataset writes

Problems = dict[int, str]  # position in the batch -> why its text cannot be used


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open and check a parquet file; the caller closes it.

    Errors: ShardError when it is missing, not parquet, cut off, has no believable number of rows, or holds
    what `refuse_unsafe` refuses.
    """
    try:
        file = pq.ParquetFile(path, **READER)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no such file") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = short_reason(error)
        raise ShardError(f"{path}: is not a whole parquet file ({reason}); copy or write it again") from error
    try:
        refuse_unsafe(file.schema_arrow, path)
        _refuse_counts(file.metadata, path)
    except ShardError:
        file.close()
        raise
    return file


def _refuse_counts(footer: pq.FileMetaData, path: Path) -> None:
    """A footer may give any number of rows, and a run is planned by it before a row is read.

    Arrow does not compare it with those of the row groups; 2^60 rows would be 10^14 splits.
    """
    groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != footer.num_rows:
        raise ShardError(
            f"{path}: says that it has {footer.num_rows} rows, and its row groups have {sum(groups)}; "
            "write the file again"
        )
    if footer.num_rows > MAX_ROWS:
        raise ShardError(
            f"{path}: has {footer.num_rows} rows; at most {MAX_ROWS} are read from one file, write several"
        )


def count_rows(path: Path) -> int:
    """Rows according to the footer. Errors: as `open_parquet`."""
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def read_parquet(
    path: Path, columns: Columns, *, start: int = 0, stop: int | None = None, prefix: str = ""
) -> tuple[ColumnMap, pa.Schema, Iterator[Chunk]]:
    """Rows [start, stop) of a file as (columns found, schema passed through, chunks of at most 16 rows).

    Passed through are the image and every column of text, numbers, dates and truth values; other binary and
    nested columns are left out. A row without a key is named `{prefix}-{row}`, `prefix` being the file's stem
    by default. Errors: ValueError or ShardError here; ShardError later, when a page is damaged.
    """
    file = open_parquet(path)
    try:
        found = map_columns(file.schema_arrow, columns, path)
    except ValueError:
        file.close()
        raise
    fields = [_passed_field(field, found) for field in file.schema_arrow]
    schema = pa.schema([field for field in fields if field is not None])
    stop = file.metadata.num_rows if stop is None else stop
    return found, schema, _chunks(file, path, found, schema, range(start, stop), prefix or path.stem)


def read_row_group(file: pq.ParquetFile, path: Path, index: int, columns: list[str]) -> pa.Table:
    """These columns of a row group, whole: of shards that people train on, whose row groups are small.

    Errors: ShardError when a page is damaged, rows are missing, or a dictionary is too large.
    """
    metadata = file.metadata.row_group(index)
    try:
        paths = [file.schema.column(i).path for i in range(len(file.schema))]
        leaves = [name for name in paths if name.partition(".")[0] in columns]
        refuse_dictionaries(file, path, index, leaves)
        table = file.read_row_group(index, columns=columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"row group {index} cannot be read ({short_reason(error)})"
        raise ShardError(f"{path}: {what}; copy or write the file again") from error
    if table.num_rows != metadata.num_rows:
        raise ShardError(
            f"{path}: row group {index} has {table.num_rows} rows and not {metadata.num_rows}; "
            "write the file again"
        )
    return table


def as_records(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    """The rows of a table of `path`. Errors: ShardError when a text is not UTF-8."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: a text is not UTF-8 ({error}); write the file again") from error


def _passed_field(field: pa.Field, found: ColumnMap) -> pa.Field | None:
    plain = plain_type(field.type)
    if field.name == found.image:
        plain = IMAGE if kind.is_struct(plain) else pa.binary() if kind.is_null(plain) else plain
    elif field.name == found.text and kind.is_null(plain):
        plain = pa.string()
    elif not (
        is_string(plain)
        or kind.is_integer(plain)
        or kind.is_floating(plain)
        or kind.is_decimal(plain)
        or kind.is_temporal(plain)
        or kind.is_boolean(plain)
        or kind.is_null(plain)
    ):
        return None
    return pa.field(field.name, plain)


def _chunks(
    file: pq.ParquetFile, path: Path, found: ColumnMap, schema: pa.Schema, wanted: range, prefix: str
) -> Iterator[Chunk]:
    leaves = [name for name in schema.names if name != found.image] + _image_leaves(file.schema_arrow, found)
    first = 0  # row number of the next batch
    try:
        for group in range(file.metadata.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if last <= wanted.start or first >= wanted.stop:
                first = last
                continue
            refuse_dictionaries(file, path, group, leaves)
            for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=leaves, use_threads=False):
                low, high = max(wanted.start - first, 0), min(wanted.stop - first, batch.num_rows)
                if low < high:
                    yield _chunk(batch.slice(low, high - low), first + low, found, schema, prefix)
                first += batch.num_rows
            if first != last:
                raise ShardError(
                    f"{path}: row group {group} is {last - first} rows short; write the file again"
                )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: the name of a column chunk
        raise ShardError(
            f"{path}: cannot be read from row {first} on ({short_reason(error)}); copy or write it again"
        ) from error
    finally:
        file.close()


def _image_leaves(schema: pa.Schema, found: ColumnMap) -> list[str]:
    """The image column, or the parts of its struct that are wanted; a struct may hold anything besides."""
    image = schema.field(found.image).type
    if not kind.is_struct(image):
        return [found.image]
    return [f"{found.image}.{part.name}" for part in IMAGE if image.get_field_index(part.name) >= 0]


def _chunk(batch: pa.RecordBatch, first: int, found: ColumnMap, schema: pa.Schema, prefix: str) -> Chunk:
    problems: Problems = {}
    passed = {f.name: _text_checked(batch, f, found, problems) for f in schema if f.name != found.image}
    images, sizes = _images(batch.column(found.image))
    passed[found.image] = _image_column(batch.column(found.image), images, schema.field(found.image).type)
    columns = pa.table({name: passed[name] for name in schema.names}, schema=schema)

    def values(name: str | None) -> list[object]:
        return [None] * batch.num_rows if name is None else passed[name].to_pylist()

    rows = []
    for i, (key, text, state) in enumerate(
        zip(values(found.key), values(found.text), values(found.status), strict=True)
    ):
        status, error = "ok", None
        if found.status is not None and state != "success":
            status, error = "skipped_upstream", f"column {found.status!r} is {state!r}, not 'success'"
        elif not (size := sizes[i]):
            status, error = "no_image", f"column {found.image!r} holds no bytes"
        elif size > MAX_IMAGE_BYTES:
            status, error = "too_large", f"the image has {size} bytes, at most {MAX_IMAGE_BYTES} are read"
        elif i in problems:
            status, error = "bad_text", problems[i]
        rows.append(
            Row(
                index=first + i,
                key=f"{prefix}-{first + i:06d}" if key is None else str(key),
                text=text if isinstance(text, str) and text.strip() else None,
                image=images[i].as_py() if status == "ok" else None,
                status=status,
                error=None if error is None else short_reason(error),
            )
        )
    return Chunk(rows, columns)


def _text_checked(batch: pa.RecordBatch, field: pa.Field, found: ColumnMap, problems: Problems) -> pa.Array:
    """The column as `field.type`; text too long or not UTF-8 becomes null and is noted in `problems`."""
    column = batch.column(field.name)
    column = column if column.type == field.type else column.cast(field.type)
    if not is_string(field.type):
        return column
    limit = {found.text: MAX_TEXT_CHARS, found.key: MAX_KEY_CHARS}.get(field.name, MAX_CELL_CHARS)
    sizes = pc.binary_length(column).to_pylist()  # bytes, without a copy of the text
    raw = column.cast(pa.large_binary())
    bad = {}
    for i, size in enumerate(sizes):
        if size is not None and size > 4 * limit:  # 4 bytes is the longest character of UTF-8
            bad[i] = f"column {field.name!r} has {size} bytes of text, at most {limit} characters are read"
        elif size:
            try:
                length = len(raw[i].as_py().decode())
            except UnicodeDecodeError:
                bad[i] = f"column {field.name!r} is not UTF-8"
            else:
                if length > limit:
                    bad[i] = f"column {field.name!r} has {length} characters, at most {limit} are read"
    if not bad:
        return column
    for i, reason in bad.items():
        problems.setdefault(i, reason)
    return pc.if_else(
        pa.array([i not in bad for i in range(len(column))]), column, pa.scalar(None, field.type)
    )


def _images(column: pa.Array) -> tuple[pa.Array, list[int | None]]:
    """(bytes, null where they are missing or over the limit; their sizes before that)"""
    data = pc.struct_field(column, "bytes") if kind.is_struct(column.type) else column
    plain = pa.binary() if kind.is_null(data.type) else plain_type(data.type)
    data = data if data.type == plain else data.cast(plain)
    sizes = pc.binary_length(data)
    small = pc.less_equal(sizes, MAX_IMAGE_BYTES)
    return pc.if_else(small, data, pa.scalar(None, plain)), sizes.to_pylist()


def _image_column(column: pa.Array, images: pa.Array, wanted: pa.DataType) -> pa.Array:
    """The image as passed through. A `path` keeps its last part, and only beside bytes.

    Readers such as Hugging Face `datasets` open `path` when the bytes are null, whatever it points at.
    """
    if not kind.is_struct(wanted):
        return images
    paths: list[str | None] = [None] * len(column)
    if column.type.get_field_index("path") >= 0 and is_string(column.type.field("path").type):
        raw = pc.struct_field(column, "path").cast(pa.large_binary())
        for i, size in enumerate(pc.binary_length(raw).to_pylist()):
            if size and size <= MAX_KEY_CHARS:
                paths[i] = Path(raw[i].as_py().decode(errors="replace").replace("\\", "/")).name
    parts = [images.cast(pa.binary()), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(parts, fields=list(IMAGE), mask=pc.is_null(images))
