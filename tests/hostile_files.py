"""Makes the files that strangers might send. All are made in code, so that none lies in the repository."""

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.parquet_pages import thrift_struct

JPEG = b"\xff\xd8\xff\xe0 not a whole picture, but the readers under test do not decode"
ROOT = Path(__file__).resolve().parent.parent
PICKLED = "ray.data.arrow_pickled_object"


# Runs code with the readers alone: without torch, which takes seconds to import.
BARE = """
import sys, types
package = types.ModuleType("capfilt")
package.__path__ = ["capfilt"]
sys.modules["capfilt"] = package
"""


class _Named(pa.ExtensionType):
    """An extension type of any name; writing one needs no registration."""

    def __init__(self, storage: pa.DataType, name: str):
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "_Named":
        return cls(storage, "never registered")


class _Touch:
    """Unpickling one creates a file: the proof that code of the data was run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def shard(path: Path, rows: int = 3, **columns: object) -> Path:
    """A good shard, `columns` replacing or following its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"jpg": [JPEG] * rows, "caption": [f"text {i}" for i in range(rows)], **columns}
    pq.write_table(pa.table(table), path, row_group_size=7)
    return path


def extension_parquet(path: Path, marker: Path, inside: str = "", name: str = PICKLED) -> Path:
    """A good shard, but one column, flat or `inside` a list or struct, unpickles and makes `marker`."""
    values = pa.array([pickle.dumps(_Touch(marker))], pa.large_binary())
    column = pa.ExtensionArray.from_storage(_Named(values.type, name), values)
    if inside == "list":
        column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), column)
    elif inside == "struct":
        column = pa.StructArray.from_arrays([column], names=["deep"])
    pq.write_table(pa.table({"image": [JPEG], "caption": ["a cat"], "extra": column}), path)
    return path


def dictionary_bomb(path: Path, cell: bytes, rows: int, *, struct: bool = False) -> Path:
    """Some kilobytes in which every row points at the same large image."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([cell]))
    if struct:
        images = pa.StructArray.from_arrays([images, pa.nulls(rows, pa.string())], names=["bytes", "path"])
    table = pa.table({"image": images, "caption": ["a cat"] * rows})
    large_page = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False, "write_statistics": False}
    pq.write_table(table, path, compression="zstd", **large_page)
    return path


def late_dictionary_bomb(path: Path, cell: bytes) -> Path:
    """The first page of the images is plain, and the dictionary of one large image comes after it."""
    images = [cell, *(f"a small image, number {i}".encode() for i in range(3000))]
    way = {"dictionary_pagesize_limit": len(cell), "data_page_size": 1000, "write_statistics": False}
    pq.write_table(pa.table({"image": images, "caption": ["a cat"] * 3001}), path, compression="zstd", **way)
    whole, column = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0)
    at, pages = column.dictionary_page_offset, []
    while at < column.dictionary_page_offset + column.total_compressed_size:
        fields, header_bytes = thrift_struct(whole[at : at + 1024], 0)
        pages.append((fields[1], whole[at : at + header_bytes + fields[3]]))
        at += len(pages[-1][1])
    (kind, dictionary), (_, coded), (_, plain), *_ = pages
    assert kind == 2
    path.write_bytes(whole.replace(dictionary + coded + plain, plain + dictionary + coded))
    return path


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def make_tar(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path
