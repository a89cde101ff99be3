"""Annotations of others -> (key, image path, texts): one generator per format. None opens an image.

A format's dataclass is its section in a config file, its reader stands below it. Every reader gives one
`Annotation` per image, with all its captions or questions, in the order of the file. What does not have the
form that it must have is a ValueError that names the file, the record and what was found; what is merely
unusable (an empty caption, an id twice, a path that leads nowhere) is passed on, for
`pipelines.image_shards` to drop and count.
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
from typing import Any, Generic, NoReturn, TypeVar

from capfilt.schema import short_reason
from pipelines.questions import Answer, Question, weighed

T = TypeVar("T")

DOMAINS = "domains.json"  # beside shards: key -> domain, of what `read_domains` found
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
VG_WEIGHT = 0.2  # of an answer of Visual Genome beside VQA's (salesforce/BLIP data/vqa_dataset.py)
# COCO's number in LAVIS' image ids and in the names of the files of 2014.
COCO_NUMBER = re.compile(r"(?:coco_|COCO_(?:train|val|test)\d{4}_0*)(\d+)")


@dataclass(frozen=True)
class Annotation(Generic[T]):
    """An image and what people wrote about it. `image` is a path below the folder of the images."""

    key: str
    image: str
    texts: tuple[T, ...]  # captions, or questions


# ---- Karpathy's splits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Karpathy:
    """dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json: all splits in one file."""

    file: str
    splits: tuple[str, ...]  # of train, restval, val, test; BLIP trains on COCO's train and restval

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits is empty; name some of train, restval, val, test")


def read_karpathy(file: str, splits: Sequence[str]) -> Iterator[Annotation[str]]:
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


def read_blip_list(file: str) -> Iterator[Annotation[str]]:
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
        yield _key_of(given or PurePosixPath(image).stem), image, texts


def _key_of(name: str) -> str:
    """COCO's own number in place of its longer names, else the name itself."""
    number = COCO_NUMBER.fullmatch(name)
    return number[1] if number else name


# ---- COCO and NoCaps -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Coco:
    """captions_{train,val}{2014,2017}.json, nocaps_val_4500_captions.json."""

    file: str


def read_coco(file: str) -> Iterator[Annotation[str]]:
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


def read_domains(file: str) -> dict[str, str]:
    """{"images": [{"id", "domain"}]} -> key -> domain of the images that have one, as all of NoCaps do."""
    images = _records(_get(_read_json(file), "images", f"{file}:", list), f"{file}: images")
    return {
        str(_get(image, "id", where, int, str)): _get(image, "domain", where, str)
        for where, image in images
        if "domain" in image
    }


def read_results(file: str) -> list[tuple[str, str]]:
    """[{"image_id", "caption"}], what is sent to COCO's and NoCaps' servers -> (key, caption), in order."""
    return [
        (str(_get(record, "image_id", where, int, str)), _get(record, "caption", where, str))
        for where, record in _records(_read_json(file), f"{file}: record")
    ]


# ---- questions and answers -----------------------------------------------------------------------


@dataclass(frozen=True)
class Vqa:
    """v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json; OK-VQA's alike."""

    questions: str
    annotations: str | None = None  # null: the questions have no answers, as those of a test set


def read_vqa(vqa: Vqa) -> Iterator[Annotation[Question]]:
    """{"data_subtype", "questions": [{"question_id", "image_id", "question"}]} and
    {"annotations": [{"question_id", "answers": [{"answer"}][, "answer_type"]}]}.

    An answer weighs the share of the people who gave it, a tenth each in VQAv2. The key is the image id, the
    image COCO's file of this number: "train2014/COCO_train2014_000000000009.jpg" where the subtype is
    "train2014"; "test-dev2015" are images of "test2015". Errors: ValueError, also for a question without its
    annotation and an annotation without its question: these are not two files of one set.
    """
    answers = None if vqa.annotations is None else _answers_of_people(vqa.annotations)
    yield from _grouped(_pairs_of_vqa(vqa, answers))
    if answers:
        raise ValueError(
            f"{vqa.annotations}: question_id {next(iter(answers))} and {len(answers) - 1} more are not among "
            f"the questions of {vqa.questions}; give both files of the same set"
        )


def _pairs_of_vqa(
    vqa: Vqa, answers: dict[str, tuple[tuple[Answer, ...], str]] | None
) -> Iterator[tuple[str, str, list[Question]]]:
    """Takes the answers of each question, and their type, out of `answers`."""
    tree = _read_json(vqa.questions)
    subtype = _get(tree, "data_subtype", f"{vqa.questions}:", str).replace("-dev", "")
    questions = _get(tree, "questions", f"{vqa.questions}:", list)
    for where, record in _records(questions, f"{vqa.questions}: questions"):
        number, text = _get(record, "image_id", where, int), _get(record, "question", where, str)
        name = str(_get(record, "question_id", where, int, str))
        if answers is not None and name not in answers:
            raise ValueError(
                f"{where} question_id {name} has no annotation in {vqa.annotations} (or comes twice); give "
                "both files of the same set"
            )
        given, answer_type = ((), "") if answers is None else answers.pop(name)
        image = f"{subtype}/COCO_{subtype}_{number:012d}.jpg"
        yield str(number), image, [Question(name, text, given, answer_type)]


def _answers_of_people(file: str) -> dict[str, tuple[tuple[Answer, ...], str]]:
    """Of each question, and their type."""
    found = {}
    annotations = _get(_read_json(file), "annotations", f"{file}:", list)
    for where, record in _records(annotations, f"{file}: annotations"):
        people = _records(_get(record, "answers", where, list), f"{where} answers")
        texts = [_get(answer, "answer", place, str) for place, answer in people]
        answer_type = _get(record, "answer_type", where, str) if "answer_type" in record else ""
        found[str(_get(record, "question_id", where, int, str))] = weighed(texts), answer_type
    return found


@dataclass(frozen=True)
class VqaList:
    """BLIP's vqa_train.json, vqa_val.json, vqa_test.json, vg_qa.json; lists of LAVIS in this form (GQA)."""

    file: str


def read_vqa_list(file: str) -> Iterator[Annotation[Question]]:
    """[{"image", "question", "question_id"[, "answer"][, "dataset"]}] with one answer, or a list of people's.

    One of a list weighs as in `read_vqa`; a single one 1, but VG_WEIGHT where the dataset is "vg". The key is
    that of the file's name, as in `read_blip_list`.
    """
    tree = _read_json(file)
    if isinstance(tree, dict):
        raise ValueError(f"{file}: is no list; if it has 'questions', name it vqa.questions")
    yield from _grouped(_pairs_of_vqa_list(tree, f"{file}: record"))


def _pairs_of_vqa_list(tree: Any, name: str) -> Iterator[tuple[str, str, list[Question]]]:
    for where, record in _records(tree, name):
        image, text = _get(record, "image", where, str), _get(record, "question", where, str)
        given = _get(record, "answer", where, str, list) if "answer" in record else []
        if isinstance(given, str):
            answers: tuple[Answer, ...] = (
                Answer(given, VG_WEIGHT if record.get("dataset") == "vg" else 1.0),
            )
        else:
            answers = weighed([_typed(one, f"{where} answer[{i}]", str) for i, one in enumerate(given)])
        question = Question(str(_get(record, "question_id", where, int, str)), text, answers)
        yield _key_of(PurePosixPath(image).stem), image, [question]


# ---- tables and folders --------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A TSV or CSV file with a header and a caption a line; the names are those of open_clip."""

    file: str
    image: str = "filepath"  # the column of image paths
    caption: str = "title"
    key: str | None = None  # null: the path without suffix
    quotes: bool = True  # false: a quotation mark is a character like any other


def read_table(table: Table) -> Iterator[Annotation[str]]:
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


def read_folder(root: Path) -> Iterator[Annotation[str]]:
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


def _grouped(pairs: Iterable[tuple[str, str, list[T]]]) -> Iterator[Annotation[T]]:
    """(key, image, some of its texts) in any order -> one annotation per key and image."""
    found: dict[tuple[str, str], list[T]] = {}
    for key, image, texts in pairs:
        found.setdefault((key, image), []).extend(texts)
    for (key, image), texts in found.items():
        yield Annotation(key, image, tuple(texts))


def _read_json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_bytes())
    except OSError as error:
        raise ValueError(_unreadable(file, error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({short_reason(error)}); is it whole?") from error


def _unreadable(file: str, error: OSError) -> str:
    return f"{file}: cannot be read ({error.strerror}); check the path"


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
