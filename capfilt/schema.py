"""The columns CapFilt reads, scores and keeps: three Arrow schemas, the column mapping, and the row.

A *raw* shard comes from strangers and has any names (img2dataset, Hugging Face, LAION, DataComp);
`map_columns` finds the four that matter. A *scored* shard is the raw one, row for row, plus `SCORED`.
A *clean* shard is `CLEAN`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as kind

STATUSES = (
    "ok",
    "skipped_upstream",  # the maker of the shard says that this row failed, or the row repeats a key
    "no_image",
    "decode_error",
    "too_large",
    "too_small",
    "bad_text",  # longer than the limit, or not UTF-8
    "caption_error",
    "score_error",
)

MAX_COLUMNS = 1_000
MAX_REASON_CHARS = 200

# What Hugging Face `datasets` must find in the file to load `image` as an image and not as a dict.
_STRING = {"dtype": "string", "_type": "Value"}
_FEATURES = {
    "key": _STRING,
    "image": {"_type": "Image"},
    "captions": [{"text": _STRING, "source": _STRING, "itm": {"dtype": "float32", "_type": "Value"}}],
}

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CAPTION = pa.struct([("text", pa.string()), ("source", pa.string()), ("itm", pa.float32())])
CLEAN = pa.schema(
    [
        ("key", pa.string()),
        ("image", IMAGE),
        ("captions", pa.list_(CAPTION)),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)

SCORED = pa.schema(
    [
        ("capfilt_key", pa.string()),
        ("capfilt_status", pa.string()),  # one of STATUSES
        ("capfilt_error", pa.string()),  # null when ok
        ("caption_web", pa.string()),  # the text as read; null when the row has none
        ("caption_synthetic", pa.string()),  # the best of `captions_synthetic` by ITM
        ("captions_synthetic", pa.list_(pa.string())),
        ("itm_web", pa.float32()),  # P(match), 0..1; null when not scored
        ("itc_web", pa.float32()),  # cosine, -1..1; null when not scored
        ("itm_synthetic", pa.float32()),  # of `caption_synthetic`
        ("itc_synthetic", pa.float32()),
        ("itms_synthetic", pa.list_(pa.float32())),  # one per entry of `captions_synthetic`
        ("itcs_synthetic", pa.list_(pa.float32())),
    ]
)


class ShardError(ValueError):
    """A shard that cannot be read, whole. The message names the file, what is wrong, and what to do."""


def short_reason(error: object) -> str:
    """`error` as one printable line of at most 200 characters, for a column, a log or a terminal."""
    text = "".join(c if c.isprintable() else " " for c in str(error)[: 4 * MAX_REASON_CHARS])
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "..."


@dataclass(frozen=True)
class Row:
    """One image-text pair before decoding. `status` is 'ok', or the reason why it goes no further."""

    index: int  # position in its input file, not in its split
    key: str
    text: str | None
    image: bytes | None
    status: str = "ok"
    error: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows, and beside them the same rows of the input's own columns, to be passed through."""

    rows: Sequence[Row]
    columns: pa.Table


@dataclass(frozen=True)
class Scores:
    """What the models found out about one row. Lists are in the order of `captions`; None is 'not scored'."""

    status: str
    error: str | None = None
    captions: Sequence[str] = ()
    itm_web: float | None = None
    itc_web: float | None = None
    itms: Sequence[float | None] = ()
    itcs: Sequence[float | None] = ()

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is unknown; choose one of {', '.join(STATUSES)}")
        for name in ("itms", "itcs"):
            if len(getattr(self, name)) not in (0, len(self.captions)):
                raise ValueError(f"{len(getattr(self, name))} {name} for {len(self.captions)} captions")


# ---- the columns of strangers --------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read; None means: find it by the names that the known producers use."""

    image: str | None = None
    text: str | None = None
    key: str | None = None
    status: str | None = None


@dataclass(frozen=True)
class ColumnMap:
    """The columns found. Without `key`, rows are named after their file and position."""

    image: str
    text: str
    key: str | None
    status: str | None


_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_TEXT_NAMES = ("caption", "text", "TEXT", "txt", "alt_text")
_KEY_NAMES = ("key", "uid", "__key__", "id", "sha256")


def map_columns(schema: pa.Schema, columns: Columns, where: str | Path) -> ColumnMap:
    """Find image, text, key and status in `schema`.

    Errors: ValueError when a column that is asked for is missing or has another type, when no image or no
    text column can be found, when a name appears twice, or when the file was scored already.
    """
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: column {name!r} appears more than once; rename all but one")
        if name in SCORED.names:
            raise ValueError(
                f"{where}: has the column {name!r} that CapFilt itself writes, so it was scored already; "
                "run CapFilt on the original shards, or rename the column"
            )
    for role, name in asdict(columns).items():
        if name is not None and not (name in names and _FITS[role](schema.field(name).type)):
            raise ValueError(f"{where}: {_unfit(schema, role, name)}")

    def find(role: str, candidates: Sequence[str]) -> str | None:
        asked: str | None = getattr(columns, role)
        fitting = (n for n in candidates if n in names and _FITS[role](schema.field(n).type))
        return next(fitting, None) if asked is None else asked

    image, text = find("image", _IMAGE_NAMES), find("text", _TEXT_NAMES)
    if image is None:
        raise ValueError(_no_image(schema, where))
    if text is None:
        raise ValueError(
            f"{where}: has no text column ({', '.join(_TEXT_NAMES)}). It has {_listed(schema)}; "
            "set columns.text to the one that holds the captions"
        )
    # Only img2dataset writes `status` beside `error_message`; anyone else's `status` may mean anything.
    status = find("status", ("status",) if "error_message" in names else ())
    return ColumnMap(image=image, text=text, key=find("key", _KEY_NAMES), status=status)


def _unfit(schema: pa.Schema, role: str, name: str) -> str:
    choice = f"Set columns.{role} to one of {_listed(schema)}, or leave it out to find it by itself"
    if name in schema.names:
        return (
            f"columns.{role} = {name!r} is of type {schema.field(name).type}, which holds no {role}. {choice}"
        )
    near = get_close_matches(name, schema.names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"has no column {name!r}, asked for as columns.{role}; {hint}{choice}"


def _no_image(schema: pa.Schema, where: str | Path) -> str:
    found = f"{where}: has no image column. It has {_listed(schema)}"
    if {"url", "URL"} & set(schema.names):
        return (
            f"{found}: addresses, no images. CapFilt never downloads; run img2dataset first "
            "(--output_format webdataset or parquet) and give CapFilt its output folder"
        )
    return (
        f"{found}; it needs image bytes in a binary column or a struct with 'bytes' "
        f"({', '.join(_IMAGE_NAMES)}), or set columns.image"
    )


def _listed(schema: pa.Schema) -> str:
    shown = ", ".join(f"{short_reason(f.name)!r} ({short_reason(f.type)})" for f in list(schema)[:20])
    more = len(schema) - 20
    return (shown or "no columns") + (f" and {more} more" if more > 0 else "")


def plain_type(found: pa.DataType) -> pa.DataType:
    """The same values without dictionary or view encoding, which differ from shard to shard."""
    if kind.is_dictionary(found):
        return plain_type(found.value_type)
    if kind.is_string_view(found):
        return pa.string()
    return pa.binary() if kind.is_binary_view(found) else found


def is_string(found: pa.DataType) -> bool:
    return kind.is_string(found) or kind.is_large_string(found)


def _is_image(found: pa.DataType) -> bool:
    if kind.is_struct(found):
        return found.get_field_index("bytes") >= 0 and _is_binary(found.field("bytes").type)
    return _is_binary(found) or kind.is_null(found)  # null: a shard whose images are all missing


def _is_binary(found: pa.DataType) -> bool:
    found = plain_type(found)
    return kind.is_binary(found) or kind.is_large_binary(found)


def _is_text(found: pa.DataType) -> bool:
    return is_string(plain_type(found)) or kind.is_null(found)


def _is_key(found: pa.DataType) -> bool:
    return is_string(plain_type(found)) or kind.is_integer(found)


_FITS: dict[str, Callable[[pa.DataType], bool]] = {
    "image": _is_image,
    "text": _is_text,
    "key": _is_key,
    "status": _is_text,
}


def refuse_unsafe(schema: pa.Schema, where: str | Path) -> None:
    """Refuse what may run code or exhaust memory before a value is touched.

    An Arrow extension type hands its values to whatever Python class is registered under its name; Ray's
    unpickle them. It is refused whether or not anything is registered here (if not, only the field's metadata
    shows it), so that a file is good or bad by itself.
    """
    if len(schema) > MAX_COLUMNS:
        raise ShardError(f"{where}: has {len(schema)} columns; at most {MAX_COLUMNS} are read, drop the rest")
    for field in schema:
        found = _extension_in(field)
        if found is not None:
            raise ShardError(
                f"{where}: column {short_reason(field.name)!r} holds the Arrow extension type {found!r}, "
                "which can run code when it is read; write the file again with plain columns only"
            )


def _extension_in(field: pa.Field) -> str | None:
    if field.metadata and b"ARROW:extension:name" in field.metadata:
        return short_reason(field.metadata[b"ARROW:extension:name"].decode(errors="replace"))
    found = field.type
    while kind.is_dictionary(found):
        found = found.value_type
    if isinstance(found, pa.BaseExtensionType):
        return short_reason(found.extension_name)
    children = (_extension_in(found.field(i)) for i in range(found.num_fields))
    return next((name for name in children if name is not None), None)


# ---- scored shards -------------------------------------------------------------------------------


def scored_schema(
    source: pa.Schema,
    found: ColumnMap,
    *,
    keep_images: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> pa.Schema:
    """The input's columns, then `SCORED`. The metadata key `capfilt` says where the input had its columns.

    `provenance` travels with the data, so it must hold nothing that differs between two equal runs: no time,
    host or path.
    """
    kept = [field.remove_metadata() for field in source if keep_images or field.name != found.image]
    note = {**(provenance or {}), "columns": asdict(found), "images": keep_images}
    return pa.schema([*kept, *SCORED], metadata={"capfilt": json.dumps(note, sort_keys=True)})


def scored_table(chunk: Chunk, scores: Sequence[Scores], schema: pa.Schema) -> pa.Table:
    """The rows of a scored shard, in the order of the chunk. `schema` is from `scored_schema`."""
    if len(scores) != len(chunk.rows):
        raise ValueError(f"{len(scores)} scores for {len(chunk.rows)} rows; every row needs exactly one")
    records = [_record(row, score) for row, score in zip(chunk.rows, scores, strict=True)]
    found = pa.Table.from_pylist(records, schema=SCORED)
    own = {name: found.column(name) for name in SCORED.names}
    passed = {name: chunk.columns.column(name) for name in schema.names if name not in own}
    return pa.table({**passed, **own}, schema=schema)


def _record(row: Row, score: Scores) -> dict[str, Any]:
    itms = [_finite(s) for s in score.itms] or [None] * len(score.captions)
    itcs = [_finite(s) for s in score.itcs] or [None] * len(score.captions)
    best = best_caption(itms)
    return {
        "capfilt_key": row.key,
        "capfilt_status": score.status,
        "capfilt_error": None if score.status == "ok" else short_reason(score.error or score.status),
        "caption_web": row.text,
        "caption_synthetic": None if best is None else score.captions[best],
        "captions_synthetic": list(score.captions),
        "itm_web": _finite(score.itm_web),
        "itc_web": _finite(score.itc_web),
        "itm_synthetic": None if best is None else itms[best],
        "itc_synthetic": None if best is None else itcs[best],
        "itms_synthetic": itms,
        "itcs_synthetic": itcs,
    }


def best_caption(itms: Sequence[float | None]) -> int | None:
    """Position of the highest score, the first of equals and the first of all when nothing is scored."""
    if not itms:
        return None
    ranked = [-math.inf if score is None else score for score in itms]
    return ranked.index(max(ranked))


def _finite(score: float | None) -> float | None:
    """A model in trouble says NaN; a shard says null, which no comparison can mistake for a score."""
    return None if score is None or not math.isfinite(score) else float(score)


def scored_columns(schema: pa.Schema, where: str | Path) -> tuple[ColumnMap, bool]:
    """Read back from a scored shard where its input had its columns, and whether it kept the images."""
    note = (schema.metadata or {}).get(b"capfilt")
    if note is None or not set(SCORED.names) <= set(schema.names):
        raise ShardError(f"{where}: is not a scored shard; run `make capfilt` to write one")
    read = json.loads(note)
    return ColumnMap(**{f.name: read["columns"][f.name] for f in fields(ColumnMap)}), read["images"]
