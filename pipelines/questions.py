"""Rows for visual question answering: an image, and the questions about it with their weighted answers.

`VQA` is to questions what `capfilt.schema.CLEAN` is to captions: what `pipelines.ingest_vqa` writes, training
and evaluation read.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as kind

from capfilt.schema import IMAGE

_STRING = {"dtype": "string", "_type": "Value"}
_ANSWERS = [{"text": _STRING, "weight": {"dtype": "float32", "_type": "Value"}}]
_FEATURES = {  # what Hugging Face `datasets` must find, as in capfilt.schema
    "key": _STRING,
    "image": {"_type": "Image"},
    "questions": [{"id": _STRING, "question": _STRING, "answers": _ANSWERS, "answer_type": _STRING}],
}

ANSWER = pa.struct([("text", pa.string()), ("weight", pa.float32())])
QUESTION = pa.struct(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(ANSWER)),
        ("answer_type", pa.string()),
    ]
)
VQA = pa.schema(
    [("key", pa.string()), ("image", IMAGE), ("questions", pa.list_(QUESTION))],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True)
class Answer:
    text: str
    weight: float  # in training; among answers of several people the share of those who gave it


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    answers: tuple[Answer, ...]  # none in a test set
    answer_type: str = ""  # "yes/no", "number" or "other" of VQAv2; empty where nothing is told


def weighed(texts: Sequence[str]) -> tuple[Answer, ...]:
    """What people answered -> every different answer, with the share of the people who gave it."""
    return tuple(Answer(text, count / len(texts)) for text, count in Counter(texts).items())


def read_question(found: dict[str, Any] | None) -> Question:
    """A question of a row; what is null is empty, and answers without text are left out."""
    found = found or {}
    answers = (answer for answer in found.get("answers") or [] if answer and answer["text"])
    given = tuple(Answer(answer["text"], answer["weight"] or 0.0) for answer in answers)
    name, question, answer_type = (found.get(part) or "" for part in ("id", "question", "answer_type"))
    return Question(name, question, given, answer_type)


def is_vqa(schema: pa.Schema) -> bool:
    """Whether these are the columns of `VQA`, as far as training reads them."""
    types = {field.name: field.type for field in schema}
    question = _fields(types.get("questions"))
    answer = _fields(question.get("answers"))
    image = types.get("image")
    has_image = kind.is_struct(image) and image.get_field_index("bytes") >= 0 if image else False
    return has_image and "question" in question and {"text", "weight"} <= answer.keys()


def _fields(found: pa.DataType | None) -> dict[str, pa.DataType]:
    """Name -> type in a list of structs; nothing of any other type."""
    if found is None or not kind.is_list(found) or not kind.is_struct(found.value_type):
        return {}
    return {field.name: field.type for field in found.value_type}
