"""Read a stranger's webdataset tar as the same chunks of rows that `capfilt.parquet` gives.

Members are streamed and never extracted; a member's name is only ever text. Read are regular files that
end in jpg, jpeg, png, webp, txt or json; the rest (links, devices, folders, pickles) is passed over.
A row is a run of neighbouring members with the same key, which is the name up to its last dot.
`index_tar` cuts a tar into parts, so that rows in the middle can be read without those before them.
"""

import json
import logging
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa

from capfilt.parquet import MAX_CELL_CHARS, MAX_IMAGE_BYTES, MAX_KEY_CHARS, MAX_TEXT_CHARS, READ_ROWS
from capfilt.schema import IMAGE, Chunk, ColumnMap, Columns, Row, ShardError, short_reason

SCHEMA = pa.schema([("key", pa.string()), ("image", IMAGE), ("txt", pa.string()), ("json", pa.string())])
PART_ROWS = 100  # as many as a row group of img2dataset's parquet files

_PARTS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "txt", "json": "json"}
_LIMITS = {"image": MAX_IMAGE_BYTES, "txt": 4 * MAX_TEXT_CHARS, "json": MAX_CELL_CHARS}
_EMPTY_BLOCK = bytes(tarfile.BLOCKSIZE)
# What tarfile raises for bytes that are no tar; the last two for long chains of headers and for huge ones.
_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarPart:
    """Neighbouring whole samples of a tar."""

    path: Path
    offset: int  # byte at which the first of them begins
    first: int  # its number in the tar
    rows: int
    repeated: tuple[int, ...] = ()  # numbers in the tar of those whose key came before, in this part or not


@dataclass
class _Sample:
    """The members of one key, their contents still unread."""

    key: str
    offset: int  # byte at which the first of them begins
    repeated: bool  # the key came before
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by kind: image, txt, json


def read_tar(
    path: Path, columns: Columns, *, prefix: str = ""
) -> tuple[ColumnMap, pa.Schema, Iterator[Chunk]]:
    """All rows as (columns found, schema passed through, chunks of at most 16 rows).

    The columns are `key`, `image`, `txt` and `json`, the contents of KEY.txt and KEY.json. The caption is
    KEY.txt, else the field `caption` of KEY.json; or the field that `columns.text` names.
    Errors: ShardError when the file is missing, is not an uncompressed tar, or, later, is damaged or cut off.
    """
    found = _columns_of_tars(columns, path)
    return found, SCHEMA, _chunks(_open(path), path, found.text, prefix or path.stem)


def index_tar(path: Path, columns: Columns, rows: int = PART_ROWS) -> list[TarPart]:
    """Cut a tar into parts of `rows` samples, the last of fewer. Only headers are read.

    Errors: as `read_tar`, all of them here; what is wrong inside a member shows when it is read.
    """
    _columns_of_tars(columns, path)
    archive = _open(path)
    parts: list[TarPart] = []
    with _closing(archive, path):
        samples = enumerate(_samples(archive, path))
        while part := list(islice(samples, rows)):
            number, begin = part[0]
            repeated = tuple(number for number, sample in part if sample.repeated)
            parts.append(TarPart(path, begin.offset, number, len(part), repeated))
    return parts


def read_part(part: TarPart, columns: Columns) -> list[Row]:
    """The same rows that `read_tar` gives for these samples.

    Errors: ShardError, also when the file is no longer the one that was indexed.
    """
    found = _columns_of_tars(columns, part.path)
    archive = _open(part.path)
    if part.offset:  # where it is 0, tarfile has just read the first header and stands behind it
        archive.offset = part.offset
        archive.firstmember = None  # type: ignore[attr-defined]
    with _closing(archive, part.path):
        rows = _rows(archive, part.path, found.text, part.path.stem, part.first, part.repeated)
        read = [row for row, _ in islice(rows, part.rows)]
    if len(read) < part.rows:
        raise ShardError(
            f"{part.path}: has {len(read)} samples from byte {part.offset} on, and had {part.rows} when it "
            "was indexed; do not change shards while they are read"
        )
    return read


def _columns_of_tars(columns: Columns, path: Path) -> ColumnMap:
    found = ColumnMap(image="image", text=columns.text or "txt", key="key", status=None)
    if columns.image not in (None, found.image) or columns.key not in (None, found.key) or columns.status:
        raise ValueError(
            f"{path}: a tar has only KEY.jpg, KEY.txt and KEY.json, so columns.image, columns.key and "
            "columns.status do not apply; leave them out"
        )
    return found


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no such file") from error
    except _DAMAGE as error:
        raise ShardError(
            f"{path}: is not a whole, uncompressed tar ({_reason(error)}); copy or write it again"
        ) from error


@contextmanager
def _closing(archive: tarfile.TarFile, path: Path) -> Iterator[None]:
    """Close the archive in the end, and name the file in what tarfile raises."""
    try:
        yield
    except ShardError:
        raise
    except _DAMAGE as error:
        what = f"is damaged or cut off near byte {archive.offset} ({_reason(error)})"
        raise ShardError(f"{path}: {what}; copy or write it again") from error
    finally:
        archive.close()


def _reason(error: BaseException) -> str:
    return short_reason(error) or type(error).__name__


def _chunks(archive: tarfile.TarFile, path: Path, text_field: str, prefix: str) -> Iterator[Chunk]:
    with _closing(archive, path):
        rows = _rows(archive, path, text_field, prefix)
        while chunk := list(islice(rows, READ_ROWS)):
            table = pa.Table.from_pylist([record for _, record in chunk], schema=SCHEMA)
            yield Chunk([row for row, _ in chunk], table)


def _rows(
    archive: tarfile.TarFile,
    path: Path,
    text_field: str,
    prefix: str,
    first: int = 0,
    repeated: Collection[int] = (),
) -> Iterator[tuple[Row, dict[str, object]]]:
    """(row, record of SCHEMA) from where the archive stands; `first` is the number of that sample.

    `repeated`: numbers of samples of which it is known that their key came before.
    """
    for index, sample in enumerate(_samples(archive, path), first):
        sample.repeated |= index in repeated
        contents = {}
        for part, member in sample.members.items():
            if member.size <= _LIMITS[part]:
                file = archive.extractfile(member)
                contents[part] = file.read() if file is not None else b""
        yield _row(sample, contents, index, text_field, prefix)


def _samples(archive: tarfile.TarFile, path: Path) -> Iterator[_Sample]:
    """Group neighbouring members by key. A part that comes twice starts another sample of the same key."""
    sample, seen, passed_over, end = None, set(), 0, 0
    while (member := archive.next()) is not None:
        if (
            archive.offset <= end or member.size < 0
        ):  # a header with a negative size leads back to itself, for ever
            raise ShardError(f"{path}: has a header with an impossible size at byte {end}; write it again")
        end = archive.offset
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would remember every header
        key, _, suffix = member.name.removeprefix("./").rpartition(".")
        part = _PARTS.get(suffix.lower())
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        if part is None or not key or not plain:  # a sparse file of no bytes can be read as 32 MiB of zeros
            passed_over += 1
            continue
        if sample is None or key != sample.key or part in sample.members:
            if sample is not None:
                yield sample
            sample = _Sample(key, member.offset, repeated=key in seen)
            seen.add(key)
        sample.members[part] = member
    _require_end(archive, path)
    if sample is not None:
        yield sample
    if passed_over:
        log.warning(
            "%s: passed over %d members that are no jpg, png, webp, txt or json file", path, passed_over
        )


def _require_end(archive: tarfile.TarFile, path: Path) -> None:
    """tarfile takes a torn or damaged header in the middle for the end; a real end is a block of zeros."""
    if archive.fileobj is None:
        raise ShardError(f"{path}: was closed while being read")
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != _EMPTY_BLOCK:
        raise ShardError(f"{path}: is damaged or cut off at byte {archive.offset}; copy or write it again")


def _row(
    sample: _Sample, contents: dict[str, bytes], index: int, text_field: str, prefix: str
) -> tuple[Row, dict[str, object]]:
    """`contents` lacks the members that are over their limit."""
    texts, unreadable = _decode(sample, contents)
    text, problem = _text(texts, text_field) if unreadable is None else (None, unreadable)
    member, image = sample.members.get("image"), contents.get("image")
    key, status, error = sample.key, "ok", None
    if len(key) > MAX_KEY_CHARS or not key.isprintable():  # bytes that are no UTF-8 count as not printable
        key = f"{prefix}-{index:06d}"
        problem = f"the key is no printable text of at most {MAX_KEY_CHARS} characters"
    if sample.repeated:
        status = "skipped_upstream"
        error = f"key {key!r} came before; the members of one sample must be neighbours and its key unique"
    elif member is not None and image is None:
        status = "too_large"
        error = f"the image has {member.size} bytes, at most {MAX_IMAGE_BYTES} are read"
    elif not image:
        status, error = "no_image", "no jpg, png or webp member with this key"
    elif problem is not None:
        status, error = "bad_text", problem
    row = Row(
        index=index,
        key=key,
        text=text if text and text.strip() else None,
        image=image if status == "ok" else None,
        status=status,
        error=None if error is None else short_reason(error),
    )
    picture = None
    if member is not None and image:
        picture = {"bytes": image, "path": f"{Path(key).name}.{member.name.rpartition('.')[2].lower()}"}
    return row, {"key": key, "image": picture, "txt": texts.get("txt"), "json": texts.get("json")}


def _text(texts: dict[str, str], text_field: str) -> tuple[str | None, str | None]:
    """(caption, what is wrong with it)"""
    text, notes = texts.get("txt"), texts.get("json")
    if notes is not None and (text is None or text_field != "txt"):
        try:
            parsed = json.loads(notes)
        except (ValueError, RecursionError) as error:
            return None, f"the json member is not JSON ({short_reason(error)})"
        value = (
            parsed.get("caption" if text_field == "txt" else text_field) if isinstance(parsed, dict) else None
        )
        text = value if isinstance(value, str) else None
    if text is not None and not _is_utf8(text):
        return None, "the caption in the json member is not UTF-8"
    if text is not None and len(text) > MAX_TEXT_CHARS:
        return None, f"the caption has {len(text)} characters, at most {MAX_TEXT_CHARS} are read"
    return text, None


def _decode(sample: _Sample, contents: dict[str, bytes]) -> tuple[dict[str, str], str | None]:
    """(the txt and json members as text, what is wrong with them)"""
    texts: dict[str, str] = {}
    problem = None
    for part in ("txt", "json"):
        if part in contents:
            try:
                texts[part] = contents[part].decode()
            except UnicodeDecodeError:
                problem = f"the {part} member is not UTF-8"
        elif part in sample.members:
            size = sample.members[part].size
            problem = f"the {part} member has {size} bytes, at most {_LIMITS[part]} are read"
    return texts, problem


def _is_utf8(text: str) -> bool:
    """False for the half surrogate pairs that JSON escapes can make."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
