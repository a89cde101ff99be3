"""Makes the files that strangers might send. All are made in code, so that none lies in the repository."""

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
