"""What the gallery shows of one evaluation: its best, its worst and some random examples, and their images.

Everything is read twice: the words of all rows, to choose, then the images of the chosen ones alone.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from capfilt.report_images import small
from pipelines.annotations import read_results
from pipelines.eval_vqa import accuracy, questions_of, read_answers
from pipelines.metrics import cider_d
from pipelines.questions import Question
from pipelines.results_ranks import Ranking, read_ranks
from pipelines.results_runs import Evaluation
from pipelines.testset import AskedImage, Stored, fingerprint, read_questions, read_testset

KINDS = ("best", "worst", "random")
T = TypeVar("T", bound="Example")


@dataclass(frozen=True)
class Captioned:
    """`score` is CIDEr-D, None where nobody described the image."""

    key: str
    caption: str
    references: tuple[str, ...]
    score: float | None


@dataclass(frozen=True)
class Answered:
    """`score` is the accuracy, None where nobody answered; `people` answered each question."""

    key: str
    question: Question
    answer: str
    people: int
    score: float | None


@dataclass(frozen=True)
class Hit:
    """A candidate that was found: the key of its image, and its text where texts are sought."""

    key: str
    text: str | None
    right: bool


@dataclass(frozen=True)
class Query:
    """An image that seeks its texts (`text` is None), or a text that seeks its image.

    `rank` wrong ones of `of` candidates stand before the best right one. `truth` has its right texts.
    """

    key: str
    text: str | None
    rank: int
    of: int
    top: tuple[Hit, ...]
    truth: tuple[str, ...]

    @property
    def score(self) -> float:
        return -self.rank


Example = Captioned | Answered | Query


def images_of(example: Example) -> set[str]:
    """The keys of the images on its card."""
    if isinstance(example, Query) and example.text is not None:
        return {example.key, *(hit.key for hit in example.top)}
    return {example.key}


@dataclass(frozen=True)
class Group:
    """Examples of one kind that are shown, drawn from `of_all`."""

    side: str  # of a retrieval, in words; else nothing
    kind: str  # of KINDS
    examples: tuple[Example, ...]
    of_all: int


@dataclass(frozen=True)
class Shown:
    """What the gallery shows of a run, and the images by key: a JPEG, or why there is none."""

    run: Evaluation
    groups: tuple[Group, ...]
    images: Mapping[str, bytes | str]


def examples_of(run: Evaluation, per_gallery: int, seed: int) -> Shown:
    """Choose, and fetch the images.

    Errors: ValueError, or OSError, that says why there is nothing to show of this run.
    """
    if run.task not in _READERS:
        raise ValueError("this evaluation stores no example, only numbers")
    if fingerprint(run.shards) != run.found["data"]["fingerprint"]:
        raise ValueError(f"{', '.join(run.shards)}: the shards have changed since; run the evaluation again")
    groups = [
        Group(side, kind, chosen, len(found))
        for side, found in _READERS[run.task](run)
        for kind in KINDS
        if (chosen := pick(found, kind, per_gallery, seed))
    ]
    wanted = {key for group in groups for example in group.examples for key in images_of(example)}
    stored: Iterable[Stored] = (read_questions if run.task == "vqa" else read_testset)(run.shards)
    return Shown(run, tuple(groups), fetch(stored, wanted))


def pick(found: Sequence[T], kind: str, size: int, seed: int) -> tuple[T, ...]:
    """The `size` best, worst or random examples, one an image. Equal ones are drawn by chance, by the seed.

    None of the best and worst where nothing has a score.
    """
    lots = [random.Random(f"{seed} {number}").random() for number in range(len(found))]
    if kind != "random" and any(example.score is None for example in found):
        return ()
    sign = {"best": -1.0, "worst": 1.0, "random": 0.0}[kind]
    order = sorted(range(len(found)), key=lambda i: (sign * (found[i].score or 0.0), lots[i]))
    of_images: dict[str, T] = {}
    for i in order:
        if len(of_images) < size:
            of_images.setdefault(found[i].key, found[i])
    return tuple(of_images.values())


def fetch(stored: Iterable[Stored], wanted: set[str]) -> dict[str, bytes | str]:
    """Key -> thumbnail, or why there is none."""
    found: dict[str, bytes | str] = {}
    for image in stored:
        if len(found) == len(wanted):
            break
        if image.key in wanted and image.key not in found:
            found[image.key] = small(image.data)
    return found


# ---- the tasks -----------------------------------------------------------------------------------

Found = list[tuple[str, Sequence[Example]]]  # side, all of its examples


def _captions(run: Evaluation) -> Found:
    file = run.model if "results" in run.found else str(run.folder / "captions.json")
    given, limit = dict(read_results(file)), run.found["protocol"].get("limit")
    images = islice(read_testset(run.shards, with_images=False), limit)
    references = {image.key: image.texts for image in images if image.key in given}
    if len(references) != run.size:
        raise ValueError(f"{file} is of other images; run the evaluation again")
    written = {key: given[key] for key in references}
    scores: Mapping[str, float] = cider_d(written, references)[1] if any(references.values()) else {}
    found = [Captioned(key, text, references[key], scores.get(key)) for key, text in written.items()]
    return [("", found)]


def _answers(run: Evaluation) -> Found:
    protocol = run.found["protocol"]
    answers, people = read_answers(run.folder / "answers.json"), int(protocol["people"])
    asked: dict[str, str] = {}
    images: list[AskedImage] = []
    for image in read_questions(run.shards, protocol.get("limit")):
        images.append(AskedImage(image.key, b"", image.questions))
        asked |= {question.id: image.key for question in image.questions}
    questions = questions_of(images)
    if questions.keys() != answers.keys():
        raise ValueError(f"{run.folder}/answers.json is of other questions; run the evaluation again")
    found = [
        Answered(asked[name], question, answers[name], people, _accuracy(answers[name], question, people))
        for name, question in questions.items()
    ]
    return [("", found)]


def _accuracy(answer: str, question: Question, people: int) -> float | None:
    return accuracy(answer, question, people) if question.answers else None


def _queries(run: Evaluation) -> Found:
    rankings = read_ranks(run.folder, run.found["images"], run.found["texts"])
    if rankings is None:
        raise ValueError(f"{run.folder} has no ranks.json; run the evaluation again")
    sides = rankings.get("itm") or rankings["itc"]
    if not all(ranking.top for ranking in sides.values()):
        raise ValueError(f"{run.folder}/ranks.json does not tell what was found first")
    keys: list[str] = []
    texts: list[str] = []
    owners: list[int] = []
    for number, image in enumerate(read_testset(run.shards, run.size, with_images=False)):
        keys.append(image.key)
        texts += image.texts
        owners += [number] * len(image.texts)
    truth: list[list[str]] = [[] for _ in keys]
    for text, owner in zip(texts, owners, strict=True):
        truth[owner].append(text)

    def by_image(i: int, ranking: Ranking) -> Query:
        top = tuple(Hit(keys[owners[t]], texts[t], owners[t] == i) for t in ranking.top[i])
        return Query(keys[i], None, ranking.rank[i], len(texts), top, tuple(truth[i]))

    def by_text(t: int, ranking: Ranking) -> Query:
        top = tuple(Hit(keys[i], None, i == owners[t]) for i in ranking.top[t])
        return Query(keys[owners[t]], texts[t], ranking.rank[t], len(keys), top, ())

    return [
        ("Texts of an image", [by_image(i, sides["tr"]) for i in range(len(keys))]),
        ("The image of a text", [by_text(t, sides["ir"]) for t in range(len(texts))]),
    ]


_READERS: Mapping[str, Callable[[Evaluation], Found]] = {
    "captions": _captions,
    "retrieval": _queries,
    "vqa": _answers,
}
