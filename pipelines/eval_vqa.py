"""Answers to the questions of VQA shards, generated or ranked among given ones, and the accuracy of VQA.

OUT holds answers.json ([{"question_id", "answer"}], what the VQA server takes) and metrics.json: the accuracy
(pipelines.vqa_accuracy), the protocol, the digest of the weights and the fingerprint of the test set. A set
without any answer, such as VQAv2's test-dev, gets answers and no score. In place of a model, `answers` may
name such a file of answers, to be scored alone; it must answer every question once. Several processes
(torchrun) share the images and write the same as one.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.distributed import rank
from blip.generate import Decoding
from blip.vqa import ANSWER, MAX_ANSWER, BlipVQA
from blip.weights import load_vqa
from capfilt.shards import write_json_atomically
from pipelines.config import parse_args, run_main, save_config
from pipelines.parallel import DTYPE, Precision, autocast, processes
from pipelines.questions import Question
from pipelines.testset import (
    AskedImage,
    batches_of_pixels,
    provenance,
    read_questions,
    refuse_doubles,
    server_id,
    some,
)
from pipelines.turns import all_turns
from pipelines.vqa_accuracy import normalise, vqa_accuracy
from qformer import Stage2, load_stage2
from qformer.language import ANSWER as BLIP2_ANSWER
from qformer.stage2 import QUESTION
from qformer.weights import is_blip2


@dataclass(frozen=True)
class VqaProtocol:
    """What decides the numbers. BLIP: 480 px, 3,128 candidates of which 128 are ranked; else 3 beams."""

    candidates: str | None = None  # a JSON list of answers to choose from; null: answers are generated
    k: int = 128  # candidates whose first word is likeliest are ranked
    decoding: Decoding | None = None  # of generated answers; null: BLIP's 3 beams, BLIP-2's 5 for short ones
    template: str = QUESTION  # what the language model of BLIP-2 reads; {} is the question
    people: int = 10  # answered each question; 1, as in GQA: an answer is right if it is theirs
    image_size: int | None = None  # pixels; null: the model's

    def __post_init__(self) -> None:
        for name in ("k", "people"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.template.count("{}") != 1:
            raise ValueError(f"template is {self.template!r}; it must hold {{}} once, for the question")


@dataclass(frozen=True)
class VqaEvalRun:
    out: str
    shards: tuple[str, ...]  # shards of questions (make vqa-shards)
    model: str | None = None  # a BLIP fine-tuned for it, or a stage 2 of BLIP-2, fine-tuned or not
    answers: str | None = None  # or a file of answers
    protocol: VqaProtocol = field(default_factory=VqaProtocol)
    limit: int | None = None  # the questions of the first so many images; null: all
    batch_size: int = 16  # images
    precision: Precision = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.answers is None):
            raise ValueError("give one of model and answers: what is to answer, or a file of answers")


def main(argv: list[str]) -> int:
    run = parse_args(argv, VqaEvalRun)
    protocol: dict[str, Any] = {"people": run.protocol.people, "limit": run.limit}
    images = read_questions(run.shards, run.limit)
    if run.model is None:
        assert run.answers is not None
        answers, questions = read_answers(Path(run.answers)), questions_of(images)
        source = provenance(run.answers, run.shards)
        source["answers"] = source.pop("weights")
    else:
        candidates = read_candidates(Path(run.protocol.candidates)) if run.protocol.candidates else None
        with processes(run.device) as device:
            model = load(run.model, run.protocol, run.precision).to(device)
            decided = replace(run.protocol, decoding=run.protocol.decoding or usual_decoding(model))
            with torch.inference_mode(), autocast(device, run.precision):
                answers, questions = answer_all(model, images, decided, candidates, run.batch_size)
            if rank() > 0:
                return 0
        source = provenance(run.model, run.shards)
        protocol |= asdict(decided) | {"precision": run.precision}
        protocol |= {"image_size": model.config.vision.image_size, "answers": len(candidates or ()) or "open"}
    metrics = score_answers(answers, questions, run.protocol.people)
    out = Path(run.out)
    save_config(run, out)
    rows = [{"question_id": server_id(name), "answer": answers[name]} for name in questions]
    write_json_atomically(out / "answers.json", rows)
    result = {"task": "vqa", "protocol": protocol, "questions": len(questions), "metrics": metrics}
    write_json_atomically(out / "metrics.json", result | source)
    print(f"{len(questions)} questions" + (f", of the first {run.limit} images alone" if run.limit else ""))
    for name, value in metrics.items():
        print(f"  {name} {100 * value:.2f}")
    if not metrics:
        print("  no answers to compare them with")
    print(f"written to {run.out}/metrics.json and {run.out}/answers.json")
    return 0


def load(source: str, protocol: VqaProtocol, precision: Precision) -> BlipVQA | Stage2:
    """What is to answer. Errors: ValueError for candidates that BLIP-2 would have to rank."""
    if not is_blip2(source):
        return load_vqa(source, image_size=protocol.image_size)
    if protocol.candidates is not None:
        raise ValueError(f"{source} is a BLIP-2, which writes its answers; set protocol.candidates to null")
    return load_stage2(source, image_size=protocol.image_size, dtype=DTYPE[precision])


def usual_decoding(model: BlipVQA | Stage2) -> Decoding:
    """That of the model's paper."""
    return BLIP2_ANSWER if isinstance(model, Stage2) else ANSWER


def answer_all(
    model: BlipVQA | Stage2,
    images: Iterable[AskedImage],
    protocol: VqaProtocol,
    candidates: Sequence[str] | None,
    batch_size: int,
) -> tuple[dict[str, str], dict[str, Question]]:
    """(id -> answer, id -> question), in order. Errors: ValueError as `questions_of`, or a broken image."""
    answer = answerer_of(model, protocol, candidates)
    device = next(model.parameters()).device
    own: list[list[tuple[AskedImage, list[str]]]] = []  # batches of this process
    for chosen, pixels in batches_of_pixels(images, model.config.vision.image_size, batch_size, device):
        asked = [question.question for image in chosen for question in image.questions]
        about = [number for number, image in enumerate(chosen) for _ in image.questions]
        said = iter(answer(pixels, asked, about))
        seen = [AskedImage(image.key, b"", image.questions) for image in chosen]
        own.append([(image, list(islice(said, len(image.questions)))) for image in seen])
    found = [row for batch in all_turns(own) for row in batch]
    questions = questions_of(image for image, _ in found)
    return dict(zip(questions, (one for _, answers in found for one in answers), strict=True)), questions


def answerer_of(
    model: BlipVQA | Stage2, protocol: VqaProtocol, candidates: Sequence[str] | None
) -> Callable[[Tensor, Sequence[str], Sequence[int]], list[str]]:
    """Pixels [B, 3, S, S], questions and the number of the image of each -> an answer to each."""
    decoding = protocol.decoding or usual_decoding(model)
    if isinstance(model, Stage2):
        write, template = model.answer, protocol.template
        return lambda pixels, asked, about: write(pixels, asked, decoding, template=template, images=about)
    if model.tokenizer is None:
        raise ValueError("answers need the model's vocabulary, and this folder has none")
    if not candidates:
        plain = model.answer
        return lambda pixels, asked, about: plain(pixels, asked, decoding, images=about)
    choose, words, k = model.rank, list(candidates), protocol.k
    tokens = model.tokenizer(words, MAX_ANSWER)
    return lambda pixels, asked, about: [words[i] for i in choose(pixels, asked, tokens, k, about)]


def questions_of(images: Iterable[AskedImage]) -> dict[str, Question]:
    """id -> question, in order. Errors: ValueError where there is none, or an id comes twice or is empty."""
    found = [question for image in images for question in image.questions]
    if not found:
        raise ValueError("there is no question; shards must name shards of questions (make vqa-shards)")
    refuse_doubles("these shards ask", [question.id for question in found])
    if nameless := [question.question for question in found if not question.id]:
        raise ValueError(f"the question {nameless[0]!r} has no id; each needs one of its own")
    return {question.id: question for question in found}


def read_answers(path: Path) -> dict[str, str]:
    """id -> answer, of a file of [{"question_id", "answer"}]. Errors: ValueError: another, or ids twice."""
    found = _read_list(path)
    if any(not isinstance(row, dict) or not {"question_id", "answer"} <= row.keys() for row in found):
        raise ValueError(f"{path} must hold a list of {{question_id, answer}}")
    refuse_doubles(f"{path} answers", [str(row["question_id"]) for row in found])
    return {str(row["question_id"]): str(row["answer"]) for row in found}


def read_candidates(path: Path) -> list[str]:
    """A JSON list of answers, such as BLIP's answer_list.json. Errors: ValueError for another, or doubles."""
    found = _read_list(path)
    if not found or any(not isinstance(answer, str) or not answer.strip() for answer in found):
        raise ValueError(f"{path} must hold a list of answers, all of them text and none empty")
    refuse_doubles(f"{path} lists", found)
    return found


def score_answers(
    answers: Mapping[str, str], questions: Mapping[str, Question], people: int
) -> dict[str, float]:
    """{"accuracy"}, beside it that of each type of answer where they are told, as VQAv2's server gives them;
    nothing where no question has an answer.

    Errors: ValueError where a question is not answered, an answer has no question, or some questions have
    answers of people and others do not.
    """
    missing = [name for name in questions if name not in answers]
    strange = [name for name in answers if name not in questions]
    if missing or strange:
        kinds = {"no answer to the questions": missing, "answers to unknown questions": strange}
        found = "; ".join(f"{what} {some(names)}" for what, names in kinds.items() if names)
        raise ValueError(f"{found}. Every question must be answered once; a part is scored with limit alone")
    silent = [name for name, question in questions.items() if not question.answers]
    if len(silent) == len(questions):
        return {}
    if silent:
        raise ValueError(f"the questions {some(silent)} have no answers of people, others have")
    each: dict[str, list[float]] = {"accuracy": []}
    for name, question in questions.items():
        right = accuracy(answers[name], question, people)
        each["accuracy"].append(right)
        if question.answer_type:
            each.setdefault(f"accuracy {question.answer_type}", []).append(right)
    return {name: sum(values) / len(values) for name, values in each.items()}


def accuracy(answer: str, question: Question, people: int) -> float:
    """Of an answer, by the `people` whose shares the shard holds. Those with an unusable answer gave none."""
    if people == 1:
        if len(question.answers) > 1:
            raise ValueError(f"question {question.id} has several answers; set people to how many gave one")
        return float(normalise(answer) == normalise(question.answers[0].text))
    given = []
    for one in question.answers:
        count = round(one.weight * people)
        if abs(one.weight * people - count) > 0.01:
            raise ValueError(
                f"question {question.id}: the share {one.weight:g} of {one.text!r} is no whole number of "
                f"{people} people; set protocol.people to how many answered, 1 where one did"
            )
        given += [one.text] * count
    return vqa_accuracy(answer, given + [""] * (people - len(given)))


def _read_list(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a JSON list, but holds a {type(found).__name__}")
    return found


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
