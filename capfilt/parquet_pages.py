"""What a row group would unpack to, found before Arrow unpacks it.

A dictionary page is unpacked once and then copied into every row that points at it, so a file of some
kilobytes can fill gigabytes. The footer does not show it, as it counts the pages. The header of the page
tells the truth, as it is what the page is unpacked by. Arrow takes a dictionary wherever it stands in a
column, so all headers are read.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from capfilt.schema import ShardError

MAX_DICTIONARY_BYTES = 64 << 20  # per row group; writers stop at 1 MiB per column
MAX_PAGES = 100_000  # per row group; writers fill pages with 1 MiB or 20,000 values
SLACK = 100  # bytes that Arrow may read beyond a column, for the sake of old writers (PARQUET-816)

# How a stranger's file is opened: without its types, and no column of a row group is whole in memory.
READER = {"buffer_size": 1 << 20, "pre_buffer": False, "arrow_extensions_enabled": False}


def refuse_dictionaries(file: pq.ParquetFile, path: Path, group: int, leaves: list[str]) -> None:
    """Look at the pages of these columns, by their full paths, of a row group.

    Errors: ShardError when dictionaries are too large, pages too many or their headers damaged; OSError when
    Arrow cannot make sense of what the footer says of a column.
    """
    _begin(file, path, group, leaves)
    footer = file.metadata.row_group(group)
    total = pages = 0
    with open(path, "rb", buffering=0) as raw:
        for number in (i for i in range(len(file.schema)) if file.schema.column(i).path in leaves):
            column = footer.column(number)
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset > 0:
                start = min(start, column.dictionary_page_offset)
            for is_dictionary, size in _pages(raw, path, start, start + column.total_compressed_size):
                pages, total = pages + 1, total + size * is_dictionary
                if pages > MAX_PAGES:
                    raise ShardError(
                        f"{path}: row group {group} has more than {MAX_PAGES} pages; write the file again"
                    )
    if total > MAX_DICTIONARY_BYTES:
        raise ShardError(
            f"{path}: the dictionaries of row group {group} unpack to {total >> 20} MiB, at most "
            f"{MAX_DICTIONARY_BYTES >> 20} are read; write the file again without dictionary encoding"
        )


class _Reached(Exception):
    pass


class _Closed(io.FileIO):
    """A file that tells its size and gives no byte."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise _Reached


def _begin(file: pq.ParquetFile, path: Path, group: int, leaves: list[str]) -> None:
    """Have Arrow begin to read, as then it raises where the footer makes no sense.

    Asked for a column by `RowGroupMetaData.column`, it aborts the process instead.
    """
    with _Closed(path) as source, pq.ParquetFile(source, metadata=file.metadata, **READER) as reader:
        try:
            next(reader.iter_batches(1, row_groups=[group], columns=leaves, use_threads=False), None)
        except _Reached:
            return


def _pages(raw: io.FileIO, path: Path, at: int, end: int) -> Iterator[tuple[bool, int]]:
    """Whether it is a dictionary, and its size when unpacked, of each page from `at` on.

    A page header is a Thrift struct; of its fields 1 is the type (2 = dictionary), 2 the size when unpacked
    and 3 the size in the file.
    """
    while at < end + SLACK:
        try:
            fields, header_bytes = _page_header(raw, at)
            kind, unpacked, packed = fields[1], fields[2], fields[3]
            if packed < 0 or unpacked < 0:
                raise ValueError("a size below 0")
        except (KeyError, ValueError) as error:
            if at >= end:  # beyond the column may lie anything
                return
            raise ShardError(
                f"{path}: has no page where one must begin, at byte {at}; copy or write the file again"
            ) from error
        yield kind == 2, unpacked
        at += header_bytes + packed


def _page_header(raw: io.FileIO, at: int) -> tuple[dict[int, int], int]:
    """-> (its numbers of 32 bits by field, its length in bytes). Errors: ValueError."""
    for most in (1 << 10, 1 << 16, 1 << 24):  # Arrow stops at the last; statistics can hold whole images
        raw.seek(at)
        data = raw.read(most)
        try:
            return thrift_struct(data, 0)
        except IndexError:
            if len(data) < most:
                break
    raise ValueError("the header has no end")


def thrift_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """A struct in Thrift's compact protocol -> (its i32 fields by number, where it ends).

    Fields of another type than i32 are passed over, as Arrow does with fields of a type that it does not
    expect. Errors: IndexError when `data` ends before the struct; ValueError when it holds what no page
    header holds.
    """
    numbers: dict[int, int] = {}
    field = 0
    while head := data[at]:
        at, kind = at + 1, head & 0x0F
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(data, at)
        if kind in (4, 5, 6):  # i16, i32, i64
            value, at = _zigzag(data, at)
            if kind == 5:
                numbers[field] = value
            if not (-1 << 31 <= value < 1 << 31 or kind == 6) or field >= 1 << 15:
                raise ValueError(f"field {field} is {value}")  # Arrow would wrap it round
        elif kind == 8:  # binary
            size, at = _varint(data, at)
            at += size
        elif kind == 12 and depth < 8:  # struct
            _, at = thrift_struct(data, at, depth + 1)
        elif kind in (3, 7):  # byte, double
            at += 1 if kind == 3 else 8
        elif kind not in (1, 2):  # true and false are no more than their type
            raise ValueError(f"field {field} has the type {kind}")
    return numbers, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
