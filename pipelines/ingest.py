"""Image files and their captions -> clean shards, for training and evaluation. No model.

`images` is the folder that image paths start from. The captions come from one of
  karpathy: {file, splits}            dataset_coco.json, dataset_flickr30k.json
  blip_list: {file}                   BLIP's coco_karpathy_train.json, flickr30k_test.json, ...
  coco: {file}                        captions_val2014.json, nocaps_val_4500_captions.json
  table: {file, image, caption, key, quotes}    TSV or CSV with a header
  none of these                       the .txt beside every image below `images`, one caption a line
OUT holds 00000.parquet, ... with one row per image ({key, image, captions}, in the order of the annotations;
the key is their image id), _done/ and, once all is written, ingest.json: the counts, and every image that was
dropped, with the reason. A finished shard is not written again, unless files that it lacks have appeared.
Exit code 3: finished, but some image files are missing or broken.
"""

import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from blip.image import ImageError, decode
from capfilt.parquet import MAX_IMAGE_BYTES, MAX_KEY_CHARS, MAX_TEXT_CHARS, READ_ROWS
from capfilt.schema import CLEAN, short_reason
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
from pipelines.annotations import (
    Annotation,
    BlipList,
    Coco,
    Karpathy,
    Table,
    below,
    read_blip_list,
    read_coco,
    read_folder,
    read_karpathy,
    read_table,
)
from pipelines.config import as_tree, parse_args, run_main, save_config

log = logging.getLogger(__name__)
THREADS = 8  # they read and decode; Pillow decodes without holding Python's lock

# Why an annotation never becomes a row. All other reasons lie in the image file and make the exit code 3.
OBJECTIONS = {
    "bad_name": "the id or the path is empty, too long or not UTF-8",
    "duplicate_id": "an image with this id came before",
    "no_caption": "there is no caption, or none that is UTF-8, not empty and not too long",
}


@dataclass(frozen=True)
class IngestRun:
    images: str  # the folder that image paths start from
    out: str
    karpathy: Karpathy | None = None
    blip_list: BlipList | None = None
    coco: Coco | None = None
    table: Table | None = None
    require_captions: bool = True  # false: an image without captions is a row with none
    rows_per_shard: int = 1000

    def __post_init__(self) -> None:
        formats = ("karpathy", "blip_list", "coco", "table")
        given = [name for name in formats if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all given; one run reads one kind of annotations")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}; it must be at least 1")

    @property
    def source(self) -> str:
        """The annotation file, or the folder where captions lie beside the images."""
        section = self.karpathy or self.blip_list or self.coco or self.table
        return section.file if section else self.images


def annotations_of(run: IngestRun) -> Iterator[Annotation]:
    if run.karpathy:
        return read_karpathy(run.karpathy.file, run.karpathy.splits)
    if run.blip_list:
        return read_blip_list(run.blip_list.file)
    if run.coco:
        return read_coco(run.coco.file)
    if run.table:
        return read_table(run.table)
    return read_folder(Path(run.images))


# ---- what the annotations alone decide -----------------------------------------------------------


@dataclass(frozen=True)
class Dropped:
    """An annotated image that is not in the shards, and why. `captions`: how many usable ones it had."""

    key: str
    image: str
    reason: str
    detail: str
    captions: int


@dataclass(frozen=True)
class Sorted:
    """Annotations with their usable captions, those that are dropped, and how many captions there were."""

    usable: Sequence[Annotation]
    dropped: Sequence[Dropped]
    captions: int
    captions_unusable: int


def sort_out(annotations: Iterable[Annotation], require_captions: bool) -> Sorted:
    """Drop what cannot be a row, whatever its image file is like. White space around captions goes."""
    usable: list[Annotation] = []
    dropped: list[Dropped] = []
    seen: set[str] = set()
    num_captions = num_unusable = 0
    for given in annotations:
        texts = tuple(text.strip() for text in given.captions if _is_usable(text.strip(), MAX_TEXT_CHARS))
        num_captions += len(given.captions)
        num_unusable += len(given.captions) - len(texts)
        annotation = Annotation(given.key, given.image, texts)
        reason = None
        if not _is_usable(given.key, MAX_KEY_CHARS) or not _is_utf8(given.image):
            reason = "bad_name"
        elif given.key in seen:
            reason = "duplicate_id"
        elif require_captions and not texts:
            reason = "no_caption"
        seen.add(given.key)
        if reason:
            dropped.append(_dropped(annotation, Fault(reason, OBJECTIONS[reason])))
        else:
            usable.append(annotation)
    return Sorted(usable, dropped, num_captions, num_unusable)


def _is_usable(text: str, max_chars: int) -> bool:
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


def _dropped(annotation: Annotation, fault: Fault) -> Dropped:
    lost = len(annotation.captions)
    return Dropped(annotation.key, annotation.image, fault.reason, fault.detail, lost)


def write_shard(path: Path, annotations: Sequence[Annotation], root: Path) -> list[Dropped]:
    """Write the rows of `annotations`, in their order, less those without a usable image: these come back."""
    dropped: list[Dropped] = []
    with ThreadPoolExecutor(THREADS) as pool, writing_shard(path, CLEAN) as writer:
        for start in range(0, len(annotations), READ_ROWS):  # few enough to be in memory
            part = annotations[start : start + READ_ROWS]
            images = pool.map(partial(read_image, root), [annotation.image for annotation in part])
            rows = []
            for annotation, image in zip(part, images, strict=True):
                if isinstance(image, Fault):
                    dropped.append(_dropped(annotation, image))
                else:
                    rows.append(_row(annotation, image))
            writer.append(pa.Table.from_pylist(rows, schema=CLEAN))
    return dropped


def _row(annotation: Annotation, image: bytes) -> dict[str, Any]:
    return {
        "key": annotation.key,
        "image": {"bytes": image, "path": os.path.basename(annotation.image)},
        "captions": [{"text": text, "source": "human", "itm": None} for text in annotation.captions],
    }


# ---- the whole -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """images = rows + dropped; captions = those written, unusable, and of dropped images."""

    images: int
    rows: int
    reasons: Mapping[str, int]  # reason -> dropped images
    captions: int
    captions_written: int
    captions_unusable: int  # empty, too long or not UTF-8
    captions_of_dropped: int
    shards: Mapping[str, int]  # file -> rows
    dropped: Sequence[Dropped]


def ingest(run: IngestRun) -> Summary:
    """Write what is not yet written of the shards, and OUT/ingest.json.

    Shard k holds the usable annotations [k * rows_per_shard, (k + 1) * rows_per_shard), less those whose
    image file cannot be used: such a file leaves a hole and moves no other row. Errors: ValueError for bad
    annotations, for an OUT that holds something else, and where not a single image is found.
    """
    root, out = Path(run.images), Path(run.out)
    if not root.is_dir():
        raise ValueError(
            f"images is {run.images}, which is no folder; set it to the one that holds the images"
        )
    found = sort_out(annotations_of(run), run.require_captions)
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
        dropped = write_shard(_shard(out, split), part, root)
        mark_done(out, split, fingerprint, _counts(part, dropped), [_shard(out, split)])
        log.info("shard %s of %d: %d images, %d dropped", split.id, len(splits), len(part), len(dropped))
    summary = _summary(out, splits, found)
    write_json_atomically(out / "ingest.json", asdict(summary))
    return summary


def _shard(out: Path, split: Split) -> Path:
    return out / f"{split.id}.parquet"


def _counts(part: Sequence[Annotation], dropped: Sequence[Dropped]) -> dict[str, Any]:
    captions = sum(len(annotation.captions) for annotation in part) - sum(image.captions for image in dropped)
    lacks = [asdict(image) for image in dropped]
    return {"rows": len(part) - len(dropped), "captions": captions, "dropped": lacks}


def _fingerprint(run: IngestRun, annotations: Sequence[Annotation]) -> dict[str, str]:
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


def _refuse_nothing(run: IngestRun, found: Sorted) -> None:
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


def _summary(out: Path, splits: Sequence[Split], found: Sorted) -> Summary:
    counts = [mark.counts for split in splits if (mark := read_done(out, split.id))]
    dropped = [*found.dropped, *(Dropped(**image) for count in counts for image in count["dropped"])]
    return Summary(
        images=len(found.usable) + len(found.dropped),
        rows=sum(count["rows"] for count in counts),
        reasons=dict(Counter(image.reason for image in dropped)),
        captions=found.captions,
        captions_written=sum(count["captions"] for count in counts),
        captions_unusable=found.captions_unusable,
        captions_of_dropped=sum(image.captions for image in dropped),
        shards={_shard(out, split).name: count["rows"] for split, count in zip(splits, counts, strict=True)},
        dropped=dropped,
    )


def describe(summary: Summary) -> str:
    """The summary for a person, with one example for every reason."""
    lines = [
        f"{summary.rows} rows with {summary.captions_written} captions in {len(summary.shards)} shards; "
        f"{len(summary.dropped)} of {summary.images} images dropped"
    ]
    for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
        first = next(image for image in summary.dropped if image.reason == reason)
        lines.append(f"  {count:>9}  {reason}, e.g. {short_reason(first.image or first.key)}: {first.detail}")
    if summary.captions_unusable:
        lines.append(f"  {summary.captions_unusable:>9}  captions left out: empty, too long or not UTF-8")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = parse_args(argv, IngestRun)
    summary = ingest(run)
    print(describe(summary))
    print(f"clean shards in {run.out}; what was dropped is listed in {run.out}/ingest.json")
    return 3 if summary.reasons.keys() - OBJECTIONS.keys() else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
