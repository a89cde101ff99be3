"""Annotations of others -> (key, image path, captions): one generator per format. None opens an image.

A format's dataclass is its section in a config file, its reader stands below it. Every reader gives one
`Annotation` per image, with all its captions, in the order of the file. What does not have the form that it
must have is a ValueError that names the file, the record and what was found; what is merely unusable (an
empty caption, an id twice, a path that leads nowhere) is passed on, for `pipelines.ingest` to drop and count.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from capfilt.schema import short_reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
# COCO's number in LAVIS' image ids and in the names of the files of 2014.
COCO_NUMBER = re.compile(r"(?:coco_|COCO_(?:train|val|test)\d{4}_0*)(\d+)")


@dataclass(frozen=True)
class Annotation:
    """An image and what people wrote about it. `image` is a path below the folder of the images."""

    key: str
    image: str
    captions: tuple[str, ...]


# ---- Karpathy's splits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Karpathy:
    """dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json: all splits in one file."""

    file: str
    splits: tuple[str, ...]  # of train, restval, val, test; BLIP trains on COCO's train and restval

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits is empty; name some of train, restval, val, test")


def read_karpathy(file: str, splits: Sequence[str]) -> Iterator[Annotation]:
    """{"images": [{"split", "filename"[, "filepath"][, "cocoid"], "sentences": [{"raw"}]}]}.

    The key is COCO's id where there is one, else the file's name without suffix: `imgid` is but its place in
    this file. Errors: ValueError, also for a split in which there is no image.
    """
    tree = _read_json(file)
    if isinstance(tree, list):
        raise ValueError(
            f"{file}: is a list, such as BLIP's coco_karpathy_train.json; name it blip_list.file"
        )
    found: Counter[str] = Counter()
    for where, image in _records(_get(tree, "images", f"{file}:", list), f"{file}: images"):
        split = _get(image, "split", where, str)
        found[split] += 1
        if split not in splits:
            continue
        name = _get(image, "filename", where, str)
        folder = _get(image, "filepath", where, str) if "filepath" in image else ""
        key = str(_get(image, "cocoid", where, int)) if "cocoid" in image else PurePosixPath(name).stem
        sentences = _records(_get(image, "sentences", where, list), f"{where} sentences")
        captions = tuple(_get(sentence, "raw", place, str) for place, sentence in sentences)
        yield Annotation(key, os.path.join(folder, name), captions)
    absent = [split for split in splits if not found[split]]
    if absent:
        there = ", ".join(f"{split} ({count})" for split, count in found.items())
        raise ValueError(f"{file}: no image is in the split {absent[0]!r}; there are {there or 'no images'}")


# ---- the lists of BLIP and LAVIS -----------------------------------------------------------------


@dataclass(frozen=True)
class BlipList:
    """coco_karpathy_{train,val,test}.json, flickr30k_{train,val,test}.json: one split a file."""

    file: str


def read_blip_list(file: str) -> Iterator[Annotation]:
    """[{"image", "caption"[, "image_id"]}], with one caption a record (train) or a list of them (val, test).

    The key is the image id, COCO's own number in place of LAVIS' "coco_<number>"; without an id it comes from
    the file's name in the same way, as BLIP's evaluation takes it.
    """
    tree = _read_json(file)
    if isinstance(tree, dict):
        raise ValueError(f"{file}: is no list; name it karpathy.file if it has 'sentences', else coco.file")
    yield from _grouped(_pairs_of_list(tree, f"{file}: record"))


def _pairs_of_list(tree: Any, name: str) -> Iterator[tuple[str, str, list[str]]]:
    for where, record in _records(tree, name):
        image = _get(record, "image", where, str)
        captions = _get(record, "caption", where, str, list)
        if isinstance(captions, str):
            captions = [captions]
        texts = [_typed(text, f"{where} caption[{i}]", str) for i, text in enumerate(captions)]
        given = str(_get(record, "image_id", where, int, str)) if "image_id" in record else None
        key = given or PurePosixPath(image).stem
        number = COCO_NUMBER.fullmatch(key)
        yield number[1] if number else key, image, texts


# ---- COCO and NoCaps -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Coco:
    """captions_{train,val}{2014,2017}.json, nocaps_val_4500_captions.json."""

    file: str


def read_coco(file: str) -> Iterator[Annotation]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; the key is the id.

    Without "annotations", as in the files of test images, no image has captions. Captions of an id that is
    not among the images come last, with an empty path.
    """
    tree = _read_json(file)
    captions: dict[str, list[str]] = {}
    images = _get(tree, "images", f"{file}:", list)
    annotations = _get(tree, "annotations", f"{file}:", list) if "annotations" in tree else []
    for where, record in _records(annotations, f"{file}: annotations"):
        key = str(_get(record, "image_id", where, int, str))
        captions.setdefault(key, []).append(_get(record, "caption", where, str))
    for where, image in _records(images, f"{file}: images"):
        key = str(_get(image, "id", where, int, str))
        yield Annotation(key, _get(image, "file_name", where, str), tuple(captions.pop(key, ())))
    for key, texts in captions.items():
        yield Annotation(key, "", tuple(texts))


# ---- tables and folders --------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A TSV or CSV file with a header and a caption a line; the names are those of open_clip."""

    file: str
    image: str = "filepath"  # the column of image paths
    caption: str = "title"
    key: str | None = None  # null: the path without suffix
    quotes: bool = True  # false: a quotation mark is a character like any other


def read_table(table: Table) -> Iterator[Annotation]:
    """The lines of an image need not be neighbours. Fields are parted by tabs if the header has one."""
    try:
        with open(table.file, newline="", encoding="utf-8-sig") as lines:
            yield from _grouped(_pairs_of_table(table, lines))
    except OSError as error:
        raise ValueError(_unreadable(table.file, error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{table.file}: is not UTF-8 ({error}); save it as UTF-8") from error


def _pairs_of_table(table: Table, lines: Iterator[str]) -> Iterator[tuple[str, str, list[str]]]:
    header = next(lines, "")
    rows = csv.DictReader(
        chain([header], lines),
        delimiter="\t" if "\t" in header else ",",
        quoting=csv.QUOTE_MINIMAL if table.quotes else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for role, name in (("image", table.image), ("caption", table.caption), ("key", table.key)):
            if name is not None and name not in (rows.fieldnames or ()):
                there = ", ".join(map(repr, rows.fieldnames or ())) or "none"
                raise ValueError(f"{table.file}: has no column {name!r}; set table.{role} to one of {there}")
        for row in rows:
            if None in row or None in row.values():  # where DictReader puts what is too much or missing
                many = "more" if None in row else "fewer"
                raise ValueError(f"{table.file}: line {rows.line_num} has {many} fields than the header")
            key = row[table.key] if table.key else os.path.splitext(row[table.image])[0]
            yield key, row[table.image], [row[table.caption]]
    except csv.Error as error:
        advice = "double the quotation marks inside quoted texts, or set table.quotes to false"
        raise ValueError(f"{table.file}: line {rows.reader.line_num}: {error}; {advice}") from error


def read_folder(root: Path) -> Iterator[Annotation]:
    """Every image below `root`; its captions are the lines of the .txt of the same name beside it, if any.

    The key is the path without suffix. Names that start with a '.' are left out, and no link to a folder is
    followed. Errors: OSError for a folder that cannot be listed.
    """
    for folder, folders, files in os.walk(root, onerror=_stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                image = os.path.relpath(os.path.join(folder, name), root)
                key = os.path.splitext(image)[0]
                yield Annotation(key, image, _lines_of(root, f"{key}.txt"))


def _stop(error: OSError) -> NoReturn:
    raise error


def _lines_of(root: Path, name: str) -> tuple[str, ...]:
    path = below(root, name)
    if path is None or not path.is_file():
        return ()
    # Bytes that are not UTF-8 become surrogates, by which the caption is found to be unusable.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    return tuple(line for line in text.split("\n") if line.strip())


def below(root: Path, name: str) -> Path | None:
    """The file `name` of the folder `root`, all links followed; None where that leads out of `root`."""
    path = Path(os.path.realpath(root / name))
    return path if path.is_relative_to(os.path.realpath(root)) and not os.path.isabs(name) else None


# ---- what the readers share ----------------------------------------------------------------------


def _grouped(pairs: Iterable[tuple[str, str, list[str]]]) -> Iterator[Annotation]:
    """(key, image, some of its captions) in any order -> one annotation per key and image."""
    found: dict[tuple[str, str], list[str]] = {}
    for key, image, captions in pairs:
        found.setdefault((key, image), []).extend(captions)
    for (key, image), captions in found.items():
        yield Annotation(key, image, tuple(captions))


def _read_json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_bytes())
    except OSError as error:
        raise ValueError(_unreadable(file, error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({short_reason(error)}); is it whole?") from error


def _unreadable(file: str, error: OSError) -> str:
    return f"{file}: cannot be read ({error.strerror}); it must be the file with the annotations"


def _records(values: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list, each with its place, for errors."""
    return ((f"{name}[{number}]", value) for number, value in enumerate(_typed(values, name, list)))


_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def _get(record: Any, name: str, where: str, *kinds: type) -> Any:
    """`record[name]`. Errors: ValueError when there is none or it is of another kind."""
    if name not in _typed(record, where, dict):
        raise ValueError(f"{where} has no key {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return _typed(record[name], f"{where} {name}", *kinds)


def _typed(value: Any, where: str, *kinds: type) -> Any:
    if type(value) not in kinds:  # and not isinstance: true is no id
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{where} is {short_reason(json.dumps(value))}, expected {wanted}")
    return value
