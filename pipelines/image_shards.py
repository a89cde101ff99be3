"""Annotated image files -> shards with one row per image, each shard written once. No model.

What people wrote about the images may be captions or questions: `Kind` says how rows hold it. Shard k holds
the usable annotations [k * rows_per_shard, (k + 1) * rows_per_shard), less those whose image file cannot be
used: such a file leaves a hole and moves no other row.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from blip.image import ImageError, decode
from capfilt.parquet import MAX_IMAGE_BYTES, MAX_KEY_CHARS, MAX_TEXT_CHARS, READ_ROWS
from capfilt.schema import short_reason
from capfilt.shards import (
    Split,
    check_plan,
    done_path,
    is_done,
    mark_done,
    read_done,
    sweep_temporary,
    write_json_atomically,
    writing_shard,
)
from pipelines.annotations import Annotation, below
from pipelines.config import as_tree, save_config

T = TypeVar("T")

log = logging.getLogger(__name__)
THREADS = 8  # they read and decode; Pillow decodes without holding Python's lock

# Why an annotation never becomes a row. All other reasons lie in the image file and make the exit code 3.
OBJECTIONS = {
    "bad_name": "the id or the path is empty, too long or not UTF-8",
    "duplicate_id": "an image with this id came before",
    "no_caption": "there is no caption, or none that is UTF-8, not empty and not too long",
    "no_question": "there is no question, or none that is, with an answer, UTF-8, not empty and not too long",
}


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What people wrote about images, and how a row holds it."""

    name: str  # "captions": the column of the rows, and the word for it in what is said
    none: str  # which of OBJECTIONS an image without any is dropped for; "" keeps it
    schema: pa.Schema
    usable: Callable[[T], T | None]  # one text as it is written, None where it cannot be
    record: Callable[[T], dict[str, Any]]  # an entry of the column


class Run(Protocol):
    """What a config must say; it is a dataclass."""

    @property
    def images(self) -> str:
        """The folder that image paths start from."""

    @property
    def out(self) -> str:
        """The folder of the shards."""

    @property
    def source(self) -> str:
        """The annotation file, or the folder where annotations lie."""

    @property
    def rows_per_shard(self) -> int: ...


# ---- what the annotations alone decide -----------------------------------------------------------


@dataclass(frozen=True)
class Dropped:
    """An annotated image that is not in the shards, and why. `texts`: how many usable ones it had."""

    key: str
    image: str
    reason: str
    detail: str
    texts: int


@dataclass(frozen=True)
class Sorted(Generic[T]):
    """Annotations with their usable texts, those that are dropped, and how many texts there were."""

    usable: Sequence[Annotation[T]]
    dropped: Sequence[Dropped]
    texts: int
    texts_unusable: int


def sort_out(annotations: Iterable[Annotation[T]], kind: Kind[T]) -> Sorted[T]:
    """Drop what cannot be a row, whatever its image file is like."""
    usable: list[Annotation[T]] = []
    dropped: list[Dropped] = []
    seen: set[str] = set()
    num_texts = num_unusable = 0
    for given in annotations:
        texts = tuple(text for text in map(kind.usable, given.texts) if text is not None)
        num_texts += len(given.texts)
        num_unusable += len(given.texts) - len(texts)
        annotation = replace(given, texts=texts)
        reason = None
        if not is_usable(given.key, MAX_KEY_CHARS) or not _is_utf8(given.image):
            reason = "bad_name"
        elif given.key in seen:
            reason = "duplicate_id"
        elif kind.none and not texts:
            reason = kind.none
        seen.add(given.key)
        if reason:
            dropped.append(_dropped(annotation, Fault(reason, OBJECTIONS[reason])))
        else:
            usable.append(annotation)
    return Sorted(usable, dropped, num_texts, num_unusable)


def is_usable(text: str, max_chars: int = MAX_TEXT_CHARS) -> bool:
    return 0 < len(text) <= max_chars and _is_utf8(text)


def _is_utf8(text: str) -> bool:
    """Half a surrogate pair, which JSON can spell, cannot be written; NUL cannot be in a path."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


# ---- images, and a shard of them -----------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Why an image is not taken: in one word, and in a sentence."""

    reason: str
    detail: str


def read_image(root: Path, image: str) -> bytes | Fault:
    """The bytes of the image file, as they are, if they are below `root` and are a whole image."""
    try:
        path = below(root, image)
        if path is None:
            return Fault("outside", "the path is absolute or leads out of the folder of the images")
        if not path.is_file():
            return Fault("missing_image", "there is no such file")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Fault("too_large", f"the file has more than {MAX_IMAGE_BYTES} bytes")
        data = path.read_bytes()
        decode(data)
        return data
    except ImageError as error:
        return Fault(error.fault.value, short_reason(error))
    except OSError as error:
        return Fault("unreadable", error.strerror or type(error).__name__)


def _dropped(annotation: Annotation[T], fault: Fault) -> Dropped:
    lost = len(annotation.texts)
    return Dropped(annotation.key, annotation.image, fault.reason, fault.detail, lost)


def write_shard(path: Path, annotations: Sequence[Annotation[T]], root: Path, kind: Kind[T]) -> list[Dropped]:
    """Write the rows of `annotations`, in their order, less those without a usable image: these come back."""
    dropped: list[Dropped] = []
    with ThreadPoolExecutor(THREADS) as pool, writing_shard(path, kind.schema) as writer:
        for start in range(0, len(annotations), READ_ROWS):  # few enough to be in memory
            part = annotations[start : start + READ_ROWS]
            images = pool.map(partial(read_image, root), [annotation.image for annotation in part])
            rows = []
            for annotation, image in zip(part, images, strict=True):
                if isinstance(image, Fault):
                    dropped.append(_dropped(annotation, image))
                else:
                    rows.append(_row(annotation, image, kind))
            writer.append(pa.Table.from_pylist(rows, schema=kind.schema))
    return dropped


def _row(annotation: Annotation[T], image: bytes, kind: Kind[T]) -> dict[str, Any]:
    return {
        "key": annotation.key,
        "image": {"bytes": image, "path": os.path.basename(annotation.image)},
        kind.name: [kind.record(text) for text in annotation.texts],
    }


# ---- the whole -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """images = rows + dropped; texts = those written, unusable, and of dropped images."""

    kind: str  # of the texts: "captions"
    images: int
    rows: int
    reasons: Mapping[str, int]  # reason -> dropped images
    texts: int
    texts_written: int
    texts_unusable: int  # empty, too long or not UTF-8
    texts_of_dropped: int
    shards: Mapping[str, int]  # file -> rows
    dropped: Sequence[Dropped]


def write_shards(run: Run, annotations: Iterable[Annotation[T]], kind: Kind[T]) -> Summary:
    """Write what is not yet written of the shards, and OUT/ingest.json.

    Errors: ValueError for bad annotations, for an OUT that holds something else, and where not a single image
    is found.
    """
    root, out = Path(run.images), Path(run.out)
    if not root.is_dir():
        raise ValueError(
            f"images is {run.images}, which is no folder; set it to the one that holds the images"
        )
    found = sort_out(annotations, kind)
    _refuse_nothing(run, found)
    starts = range(0, len(found.usable), run.rows_per_shard)
    splits = [
        Split(f"{k:05d}", Path(run.source), start, min(start + run.rows_per_shard, len(found.usable)))
        for k, start in enumerate(starts)
    ]
    fingerprint = _fingerprint(run, found.usable)
    waiting = [split for split in splits if not _is_finished(out, split, fingerprint, root)]
    _refuse_strangers(out, splits)
    save_config(run, out)
    sweep_temporary(out)
    (out / "ingest.json").unlink(missing_ok=True)
    for split in waiting:
        part = found.usable[split.start : split.stop]
        done_path(out, split.id).unlink(missing_ok=True)  # of the shard that is now replaced
        dropped = write_shard(_shard(out, split), part, root, kind)
        mark_done(out, split, fingerprint, _counts(part, dropped, kind), [_shard(out, split)])
        log.info("shard %s of %d: %d images, %d dropped", split.id, len(splits), len(part), len(dropped))
    summary = _summary(out, splits, found, kind)
    write_json_atomically(out / "ingest.json", _report(summary))
    return summary


def _shard(out: Path, split: Split) -> Path:
    return out / f"{split.id}.parquet"


def _counts(part: Sequence[Annotation[T]], dropped: Sequence[Dropped], kind: Kind[T]) -> dict[str, Any]:
    texts = sum(len(annotation.texts) for annotation in part) - sum(image.texts for image in dropped)
    lacks = [_listed(image, kind.name) for image in dropped]
    return {"rows": len(part) - len(dropped), kind.name: texts, "dropped": lacks}


# In files, what is counted has its own name: captions or questions.


def _listed(image: Dropped, name: str) -> dict[str, Any]:
    return {name if key == "texts" else key: value for key, value in asdict(image).items()}


def _read_listed(values: Mapping[str, Any], name: str) -> Dropped:
    return Dropped(**{"texts" if key == name else key: value for key, value in values.items()})


def _report(summary: Summary) -> dict[str, Any]:
    name, tree = summary.kind, asdict(summary)
    del tree["kind"]
    tree["dropped"] = [_listed(image, name) for image in summary.dropped]
    return {re.sub("^texts", name, key): value for key, value in tree.items()}


def _fingerprint(run: Run, annotations: Sequence[Annotation[T]]) -> dict[str, str]:
    """The config, key by key so that a difference can be named, and what the annotations say."""
    digest = hashlib.sha256()
    for annotation in annotations:
        digest.update(json.dumps(astuple(annotation)).encode() + b"\n")
    config = {name: json.dumps(value) for name, value in as_tree(run).items() if name != "out"}
    return {**config, "annotations": digest.hexdigest()}


def _is_finished(out: Path, split: Split, fingerprint: Mapping[str, str], root: Path) -> bool:
    """Whether the shard is there, and what it lacks is still not to be had. Errors: FingerprintMismatch."""
    if not is_done(out, split, fingerprint):
        return False
    mark = read_done(out, split.id)
    assert mark is not None
    return all(isinstance(read_image(root, image["image"]), Fault) for image in mark.counts["dropped"])


def _refuse_nothing(run: Run, found: Sorted[T]) -> None:
    """Stop before anything is written where no row would be."""
    if not found.usable:
        reasons = Counter(image.reason for image in found.dropped)
        why = "; ".join(f"{count} {reason}: {OBJECTIONS[reason]}" for reason, count in reasons.items())
        raise ValueError(f"{run.source}: no image can become a row ({why or 'there are none'})")
    if not any(os.path.isfile(os.path.join(run.images, annotation.image)) for annotation in found.usable):
        first = os.path.join(run.images, found.usable[0].image)
        raise ValueError(
            f"images is {run.images}, but none of the {len(found.usable)} images of {run.source} is there; "
            f"the first is looked for as {first!r}"
        )


def _refuse_strangers(out: Path, splits: Sequence[Split]) -> None:
    """Refuse an OUT with shards that this run would overwrite without having made them, or would not make."""
    check_plan(out, splits)
    ours = {_shard(out, split) for split in splits} if (out / "config.yaml").exists() else set()
    for path in sorted(set(out.glob("*.parquet")) - ours):
        raise ValueError(f"{path}: is no shard of this run; choose another out, or remove it")


def _summary(out: Path, splits: Sequence[Split], found: Sorted[T], kind: Kind[T]) -> Summary:
    counts = [mark.counts for split in splits if (mark := read_done(out, split.id))]
    lacking = [_read_listed(image, kind.name) for count in counts for image in count["dropped"]]
    dropped = [*found.dropped, *lacking]
    return Summary(
        kind=kind.name,
        images=len(found.usable) + len(found.dropped),
        rows=sum(count["rows"] for count in counts),
        reasons=dict(Counter(image.reason for image in dropped)),
        texts=found.texts,
        texts_written=sum(count[kind.name] for count in counts),
        texts_unusable=found.texts_unusable,
        texts_of_dropped=sum(image.texts for image in dropped),
        shards={_shard(out, split).name: count["rows"] for split, count in zip(splits, counts, strict=True)},
        dropped=dropped,
    )


def describe(summary: Summary) -> str:
    """The summary for a person, with one example for every reason."""
    lines = [
        f"{summary.rows} rows with {summary.texts_written} {summary.kind} in {len(summary.shards)} shards; "
        f"{len(summary.dropped)} of {summary.images} images dropped"
    ]
    for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
        first = next(image for image in summary.dropped if image.reason == reason)
        lines.append(f"  {count:>9}  {reason}, e.g. {short_reason(first.image or first.key)}: {first.detail}")
    if summary.texts_unusable:
        lines.append(f"  {summary.texts_unusable:>9}  {summary.kind} left out: empty, too long or not UTF-8")
    return "\n".join(lines)


def finish(summary: Summary, out: str) -> int:
    """Tell a person; the exit code: 3 where image files are missing or broken."""
    print(describe(summary))
    print(f"shards in {out}; what was dropped is listed in {out}/ingest.json")
    return 3 if summary.reasons.keys() - OBJECTIONS.keys() else 0
