"""Shards of questions -> training batches, in an order that is a pure function of (seed, files).

As `pipelines.data`, with questions for rows: every question that has answers comes once an epoch, with its
image and all its answers. Any number of data workers gives the same batches; a run resumes at any batch. A
question whose image or answers cannot be used leaves its batch one row shorter and moves no other question.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip.image import Augmentation, ImageError, decode, train_transform
from blip.tokenizer import Tokenizer, clean_question
from blip.vqa import MAX_QUESTION, VqaBatch
from capfilt.parquet import as_records, open_parquet, read_row_group
from capfilt.schema import ShardError
from pipelines.data import Recent, files_in, load
from pipelines.order import Order, Place, batches
from pipelines.questions import Answer, Question, is_vqa

T = TypeVar("T")


@dataclass(frozen=True)
class VqaDataConfig:
    shards: tuple[str, ...]  # folders or files, of `pipelines.ingest_vqa`; all their questions are one stream
    batch_size: int = 16  # questions, of one process
    max_question: int = MAX_QUESTION  # tokens
    max_answer: int = 40  # tokens
    window: int = 32  # groups of images whose questions are shuffled together
    workers: int = 2  # data worker processes; 0 reads in the training process
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "max_question": 3, "max_answer": 3, "window": 1, "workers": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")


@dataclass(frozen=True)
class Asked:
    """A question with answers, and its image as it is stored."""

    image: bytes | None
    question: Question


@dataclass(frozen=True)
class QuestionGroup:
    """A row group of a parquet file, and how many questions with answers are in it."""

    path: Path
    index: int
    questions: int


def find_groups(shards: tuple[str, ...]) -> list[QuestionGroup]:
    """Every group with answered questions, in the order of the files. Questions are read here, to be counted.

    Raises ValueError for other files, a damaged one, and where no question has an answer: now, and not in a
    data worker hours later.
    """
    groups = []
    for place in map(Path, shards):
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder; data.shards must name shards of questions")
        for path in files_in(place) if place.is_dir() else [place]:
            groups += _row_groups(path)
    if not groups:
        raise ValueError(f"{', '.join(shards)}: no question has an answer; training needs answered questions")
    return groups


def _row_groups(path: Path) -> list[QuestionGroup]:
    with open_parquet(path) as file:
        if not is_vqa(file.schema_arrow):
            raise ShardError(
                f"{path}: has no questions, only {', '.join(map(repr, file.schema_arrow.names))}; "
                "write shards of questions with make vqa-shards"
            )
        groups = range(file.metadata.num_row_groups)
        counts = [_count(read_row_group(file, path, i, ["questions"])) for i in groups]
    return [QuestionGroup(path, i, count) for i, count in enumerate(counts) if count]


def _count(table: pa.Table) -> int:
    """Questions whose list of answers is not empty, as `_asked` finds them, without an object for each."""
    answers = pc.struct_field(pc.list_flatten(table.column("questions")), "answers")
    return pc.sum(pc.greater(pc.list_value_length(answers), 0)).as_py() or 0


def read_group(group: QuestionGroup) -> list[Asked]:
    """The answered questions of a group, those about an image next to each other.

    Raises ShardError, which names the file, when a page is damaged.
    """
    with open_parquet(group.path) as file:
        table = read_row_group(file, group.path, group.index, ["image", "questions"])
    return [asked for record in as_records(table, group.path) for asked in _asked(record)]


def _asked(record: dict[str, Any]) -> Iterator[Asked]:
    image = (record["image"] or {}).get("bytes")
    for found in record["questions"] or []:
        if found and found["answers"]:
            usable = [answer for answer in found["answers"] if answer and answer["text"] and answer["weight"]]
            answers = tuple(Answer(answer["text"], answer["weight"]) for answer in usable)
            yield Asked(image, Question(found.get("id") or "", found["question"] or "", answers))


@dataclass(frozen=True)
class Questions:
    """What a batch is made of: B questions, cleaned up, with their images, and A answers."""

    pixels: Tensor  # [B, 3, S, S]
    texts: list[str]  # B
    answers: list[str]  # A
    weights: Tensor  # [A] float, how much each answer counts
    owner: Tensor  # [A] int64, the question that each answer belongs to


Collate = Callable[[Questions], T]  # also what runs in the data workers: words become tensors here


@dataclass(frozen=True)
class MedQuestions:
    """Questions -> the batch of a `BlipVQA`."""

    config: VqaDataConfig
    tokenizer: Tokenizer

    def __call__(self, found: Questions) -> VqaBatch:
        asked = self.tokenizer(found.texts, self.config.max_question)
        answers = self.tokenizer(found.answers, self.config.max_answer)
        return VqaBatch(found.pixels, *asked, *answers, found.weights, found.owner)


class VqaRows(Dataset[T]):
    """A list of places -> a batch: read, decode, augment, collate. Runs in the data workers."""

    def __init__(
        self,
        config: VqaDataConfig,
        groups: list[QuestionGroup],
        collate: Collate[T],
        image_size: int,
        seed: int,
    ):
        self.config, self.groups, self.collate = config, groups, collate
        self.image_size, self.seed = image_size, seed
        self.recent: Recent[Asked] = Recent(config.window)

    def __getitem__(self, places: list[Place]) -> T:
        found = [example for place in places if (example := self._example(place))]
        if not found:
            where = self.groups[places[0][1]].path
            raise ValueError(
                f"{where}: a batch of {len(places)} questions begins here, and none of them has both a "
                "readable image and an answer; check the shards, or raise data.batch_size"
            )
        pixels, questions = zip(*found, strict=True)
        answers = [answer for question in questions for answer in question.answers]
        owner = [row for row, question in enumerate(questions) for _ in question.answers]
        texts = [clean_question(one.question) for one in questions]
        weights = torch.tensor([answer.weight for answer in answers])
        words = [answer.text for answer in answers]
        return self.collate(Questions(torch.stack(pixels), texts, words, weights, torch.tensor(owner)))

    def _example(self, place: Place) -> tuple[Tensor, Question] | None:
        """The image and its question, None where one cannot be used. Its chance is the place's."""
        epoch, group, row = place
        asked = self.recent.rows(group, partial(read_group, self.groups[group]))[row]
        if not asked.question.answers:
            return None
        try:
            image = decode(asked.image)
        except ImageError:
            return None
        rng = random.Random(f"{self.seed} {epoch} {group} {row}")
        return train_transform(image, self.image_size, self.config.augmentation, rng), asked.question


def training_batches(
    config: VqaDataConfig,
    tokenizer: Tokenizer,
    image_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
) -> tuple[Iterator[VqaBatch], int]:
    """`question_batches` for a `BlipVQA`."""
    return question_batches(config, MedQuestions(config, tokenizer), image_size, seed, first, rank, world)


def question_batches(
    config: VqaDataConfig,
    collate: Collate[T],
    image_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
) -> tuple[Iterator[T], int]:
    """Batches of process `rank` out of `world`, from number `first` on, for ever; the questions of an epoch.

    Batch k of all processes together is `config.batch_size * world` questions, of which each process takes
    every `world`-th.
    """
    groups = find_groups(config.shards)
    counts = [group.questions for group in groups]
    places = batches(Order(counts, config.window, seed), config.batch_size * world, first)
    rows = VqaRows(config, groups, collate, image_size, seed)
    return load(rows, places, config.workers, rank, world), sum(counts)
