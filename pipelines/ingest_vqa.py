"""Image files and questions about them -> shards for visual question answering. No model.

`images` is the folder that image paths start from. The questions come from one of
  vqa: {questions, annotations}   the two files of VQAv2 or OK-VQA; without annotations a test set
  vqa_list: {file}                BLIP's vqa_train.json, vqa_val.json, vg_qa.json, vqa_test.json
OUT holds 00000.parquet, ... with one row per image ({key, image, questions}, see pipelines.questions; the key
is the image id), _done/ and, once all is written, ingest.json: the counts, and every image that was dropped,
with the reason. A finished shard is not written again, unless files that it lacks have appeared.
Exit code 3: finished, but some image files are missing or broken.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from pipelines.annotations import Annotation, Vqa, VqaList, read_vqa, read_vqa_list
from pipelines.config import parse_args, run_main
from pipelines.image_shards import Kind, Summary, finish, is_usable, write_shards
from pipelines.questions import VQA, Answer, Question


@dataclass(frozen=True)
class VqaIngestRun:
    images: str  # the folder that image paths start from
    out: str
    vqa: Vqa | None = None
    vqa_list: VqaList | None = None
    rows_per_shard: int = 1000

    def __post_init__(self) -> None:
        if (self.vqa is None) == (self.vqa_list is None):
            raise ValueError("give one of vqa and vqa_list; one run reads one kind of annotations")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}; it must be at least 1")

    @property
    def source(self) -> str:
        """The file with the questions."""
        return self.vqa.questions if self.vqa else self.vqa_list.file if self.vqa_list else ""


def annotations_of(run: VqaIngestRun) -> Iterator[Annotation[Question]]:
    return read_vqa(run.vqa) if run.vqa else read_vqa_list(run.source)


def ingest(run: VqaIngestRun) -> Summary:
    """As `write_shards`. A question of a test set has no answers; one whose answers are all unusable goes."""
    return write_shards(run, annotations_of(run), Kind("questions", "no_question", VQA, usable, asdict))


def usable(given: Question) -> Question | None:
    """Without white space around it and its answers, and without answers that cannot be written."""
    stripped = (Answer(answer.text.strip(), answer.weight) for answer in given.answers)
    answers = tuple(answer for answer in stripped if is_usable(answer.text))
    question = replace(given, question=given.question.strip(), answers=answers)
    if not is_usable(question.id) or not is_usable(question.question):
        return None
    return None if given.answers and not answers else question


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = parse_args(argv, VqaIngestRun)
    return finish(ingest(run), run.out)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
