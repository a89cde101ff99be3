"""Read a stranger's webdataset tar as the same chunks of rows that `capfilt.parquet` gives.

Members are streamed and never extracted; a member's name is only ever text. Read are regular files that
end in jpg, jpeg, png, webp, txt or json; the rest (links, devices, folders, pickles) is passed over.
A row is a run of neighbouring members with the same key, which is the name up to its last dot.
"""

import json
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from capfilt.parquet import MAX_CELL_CHARS, MAX_IMAGE_BYTES, MAX_KEY_CHARS, MAX_TEXT_CHARS, READ_ROWS
from capfilt.schema import IMAGE, Chunk, ColumnMap, Columns, Row, ShardError, short_reason

SCHEMA = pa.schema([("key", pa.string()), ("image", IMAGE), ("txt", pa.string()), ("json", pa.string())])

_PARTS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "txt", "json": "json"}
_LIMITS = {"image": MAX_IMAGE_BYTES, "txt": 4 * MAX_TEXT_CHARS, "json": MAX_CELL_CHARS}
_EMPTY_BLOCK = bytes(tarfile.BLOCKSIZE)

log = logging.getLogger(__name__)


@dataclass
class _Sample:
    """What the members of one key have given so far."""

    key: str
    suffix: str = ""  # of the image
    parts: dict[str, bytes] = field(default_factory=dict)  # by kind: image, txt, json
    too_large: dict[str, int] = field(default_factory=dict)  # kind -> size of a part over its limit

    def has(self, part: str) -> bool:
        return part in self.parts or part in self.too_large


def read_tar(
    path: Path, columns: Columns, *, prefix: str = ""
) -> tuple[ColumnMap, pa.Schema, Iterator[Chunk]]:
    """All rows as (columns found, schema passed through, chunks of at most 16 rows).

    The columns are `key`, `image`, `txt` and `json`, the contents of KEY.txt and KEY.json. The caption is
    KEY.txt, else the field `caption` of KEY.json; or the field that `columns.text` names.
    Errors: ShardError when the file is missing, is not an uncompressed tar, or, later, is damaged or cut off.
    """
    found = ColumnMap(image="image", text=columns.text or "txt", key="key", status=None)
    if columns.image not in (None, found.image) or columns.key not in (None, found.key) or columns.status:
        raise ValueError(
            f"{path}: a tar has only KEY.jpg, KEY.txt and KEY.json, so columns.image, columns.key and "
            "columns.status do not apply; leave them out"
        )
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115  (closed by the generator)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no such file") from error
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(
            f"{path}: is not a whole, uncompressed tar ({short_reason(error)}); copy or write it again"
        ) from error
    return found, SCHEMA, _chunks(archive, path, found.text, prefix or path.stem)


def _chunks(archive: tarfile.TarFile, path: Path, text_field: str, prefix: str) -> Iterator[Chunk]:
    rows: list[Row] = []
    records: list[dict[str, object]] = []
    seen: set[str] = set()
    index = 0
    try:
        for sample in _samples(archive, path):
            row, record = _row(sample, index, text_field, prefix, repeated=sample.key in seen)
            seen.add(sample.key)
            rows.append(row)
            records.append(record)
            index += 1
            if len(rows) == READ_ROWS:
                yield Chunk(rows, pa.Table.from_pylist(records, schema=SCHEMA))
                rows, records = [], []
        if rows:
            yield Chunk(rows, pa.Table.from_pylist(records, schema=SCHEMA))
    except ShardError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise ShardError(
            f"{path}: is damaged after {index} samples ({short_reason(error)}); copy or write it again"
        ) from error
    finally:
        archive.close()


def _samples(archive: tarfile.TarFile, path: Path) -> Iterator[_Sample]:
    """Group neighbouring members by key. A part that comes twice starts another sample of the same key."""
    sample, passed_over, end = None, 0, 0
    while (member := archive.next()) is not None:
        if (
            archive.offset <= end or member.size < 0
        ):  # a header with a negative size leads back to itself, for ever
            raise ShardError(f"{path}: has a header with an impossible size at byte {end}; write it again")
        end = archive.offset
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would remember every header
        key, _, suffix = member.name.removeprefix("./").rpartition(".")
        part = _PARTS.get(suffix.lower())
        if part is None or not key or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            passed_over += 1
            continue
        if sample is None or key != sample.key or sample.has(part):
            if sample is not None:
                yield sample
            sample = _Sample(key)
        if part == "image":
            sample.suffix = suffix.lower()
        if member.size > _LIMITS[part]:
            sample.too_large[part] = member.size
        else:
            content = archive.extractfile(member)
            sample.parts[part] = content.read() if content is not None else b""
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
    sample: _Sample, index: int, text_field: str, prefix: str, *, repeated: bool
) -> tuple[Row, dict[str, object]]:
    contents, unreadable = _decode(sample)
    text, problem = _text(contents, text_field) if unreadable is None else (None, unreadable)
    image = sample.parts.get("image")
    key, status, error = sample.key, "ok", None
    if len(key) > MAX_KEY_CHARS or not key.isprintable():  # bytes that are no UTF-8 count as not printable
        key = f"{prefix}-{index:06d}"
        problem = f"the key is no printable text of at most {MAX_KEY_CHARS} characters"
    if repeated:
        status = "skipped_upstream"
        error = f"key {key!r} came before; the members of one sample must be neighbours and its key unique"
    elif "image" in sample.too_large:
        status = "too_large"
        error = f"the image has {sample.too_large['image']} bytes, at most {MAX_IMAGE_BYTES} are read"
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
    picture = {"bytes": image, "path": f"{Path(key).name}.{sample.suffix}"} if image else None
    return row, {"key": key, "image": picture, "txt": contents.get("txt"), "json": contents.get("json")}


def _text(contents: dict[str, str], text_field: str) -> tuple[str | None, str | None]:
    """(caption, what is wrong with it)"""
    text, notes = contents.get("txt"), contents.get("json")
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


def _decode(sample: _Sample) -> tuple[dict[str, str], str | None]:
    """(the txt and json members as text, what is wrong with them)"""
    contents: dict[str, str] = {}
    problem = None
    for part in ("txt", "json"):
        if part in sample.too_large:
            problem = (
                f"the {part} member has {sample.too_large[part]} bytes, at most {_LIMITS[part]} are read"
            )
        elif part in sample.parts:
            try:
                contents[part] = sample.parts[part].decode()
            except UnicodeDecodeError:
                problem = f"the {part} member is not UTF-8"
    return contents, problem


def _is_utf8(text: str) -> bool:
    """False for the half surrogate pairs that JSON escapes can make."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
