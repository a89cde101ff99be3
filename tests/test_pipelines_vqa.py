"""Questions from others' annotations to shards and from shards to batches."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import Record, jpeg, put, put_json, rows
from PIL import Image
from tiny import tiny_tokenizer

from blip.image import Augmentation, decode, image_transform
from blip.tokenizer import Tokenizer
from blip.vqa import VqaBatch
from capfilt.schema import CLEAN
from pipelines.annotations import Annotation, Vqa, read_vqa, read_vqa_list
from pipelines.ingest_vqa import VqaIngestRun, ingest, main
from pipelines.questions import VQA, Answer, Question
from pipelines.vqa_data import VqaDataConfig, find_groups, training_batches

# ---- the annotations of others -------------------------------------------------------------------

QUESTIONS: Record = {
    "info": {},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 9, "question": "What is this?", "question_id": 9000},
        {"image_id": 458752, "question": "Is it red?", "question_id": 458752001},
        {"image_id": 9, "question": "How many?", "question_id": 9001},
    ],
}


def answered(question_id: int, answer_type: str, *texts: str) -> Record:
    answers = [
        {"answer": text, "answer_confidence": "maybe", "answer_id": i + 1} for i, text in enumerate(texts)
    ]
    return {"question_id": question_id, "question_type": "is", "answer_type": answer_type, "answers": answers}


ANNOTATIONS: Record = {
    "data_subtype": "val2014",
    "annotations": [
        answered(458752001, "yes/no", *["yes"] * 9, "no"),
        answered(9000, "other", "net", "net", "net", "mesh", "net", "net", "netting", "net", "mesh", "net"),
        answered(9001, "number", *["2"] * 10),
    ],
}


def files(folder: Path, questions: Record = QUESTIONS, annotations: Record = ANNOTATIONS) -> Vqa:
    return Vqa(put_json(folder / "questions.json", questions), put_json(folder / "answers.json", annotations))


def test_vqa_weighs_answers_by_how_many_gave_them(tmp_path: Path) -> None:
    net = (Answer("net", 0.7), Answer("mesh", 0.2), Answer("netting", 0.1))
    two = (Answer("2", 1.0),)
    of_9 = (Question("9000", "What is this?", net, "other"), Question("9001", "How many?", two, "number"))
    red = Question("458752001", "Is it red?", (Answer("yes", 0.9), Answer("no", 0.1)), "yes/no")
    assert list(read_vqa(files(tmp_path))) == [
        Annotation("9", "val2014/COCO_val2014_000000000009.jpg", of_9),
        Annotation("458752", "val2014/COCO_val2014_000000458752.jpg", (red,)),
    ]


@pytest.mark.parametrize("subtype", ["test2015", "test-dev2015"])
def test_vqa_s_test_sets_have_no_answers(tmp_path: Path, subtype: str) -> None:
    question = {"image_id": 1, "question": "Why?", "question_id": 1005}
    file = put_json(tmp_path / "q.json", {"data_subtype": subtype, "questions": [question]})
    assert list(read_vqa(Vqa(file))) == [
        Annotation("1", "test2015/COCO_test2015_000000000001.jpg", (Question("1005", "Why?", ()),))
    ]


def test_lists_of_blip(tmp_path: Path) -> None:
    coco, genome = "train2014/COCO_train2014_000000458752.jpg", "image/713545.jpg"
    records = [
        {
            "question_id": 458752000,
            "question": "What is it?",
            "image": coco,
            "dataset": "vqa",
            "answer": ["a", "b", "a", "a"],
        },
        {"question_id": 3, "question": "Where?", "image": genome, "dataset": "vg", "answer": "on a hill"},
        {"question_id": "g7", "question": "Who?", "image": "7.jpg", "answer": "man"},  # as of GQA
        {"question_id": 4, "question": "When?", "image": genome, "dataset": "vg"},
    ]
    file = put_json(tmp_path / "list.json", records)
    shares = (Answer("a", 0.75), Answer("b", 0.25))
    hill = Question("3", "Where?", (Answer("on a hill", 0.2),))
    assert list(read_vqa_list(file)) == [
        Annotation("458752", coco, (Question("458752000", "What is it?", shares),)),
        Annotation("713545", genome, (hill, Question("4", "When?", ()))),
        Annotation("7", "7.jpg", (Question("g7", "Who?", (Answer("man", 1.0),)),)),
    ]


@pytest.mark.parametrize(
    ("questions", "annotations", "complaint"),
    [
        ({"questions": []}, ANNOTATIONS, r"questions\.json: has no key 'data_subtype'"),
        ([], ANNOTATIONS, r"questions\.json: is \[\], expected an object"),
        (
            {"data_subtype": "x", "questions": [{"image_id": "9"}]},
            ANNOTATIONS,
            r'image_id is "9", expected a',
        ),
        ({"data_subtype": "x", "questions": [{"image_id": 9}]}, ANNOTATIONS, r"\[0\] has no key 'question'"),
        (QUESTIONS, {"annotations": {}}, r"annotations is \{\}, expected a list"),
        (QUESTIONS, {"annotations": [{"question_id": 1}]}, r"annotations\[0\] has no key 'answers'"),
        (
            QUESTIONS,
            {"annotations": [{"question_id": 1, "answers": ["yes"]}]},
            r'annotations\[0\] answers\[0\] is "yes", expected an object',
        ),
        (
            QUESTIONS,
            {"annotations": ANNOTATIONS["annotations"][:2]},
            r"questions\[2\] question_id 9001 has no annotation in .*answers\.json",
        ),
        (
            QUESTIONS | {"questions": QUESTIONS["questions"] * 2},
            ANNOTATIONS,
            r"questions\[3\] question_id 9000 .*comes twice",
        ),
        (
            QUESTIONS,
            {"annotations": [*ANNOTATIONS["annotations"], answered(5, "other"), answered(6, "other")]},
            r"answers\.json: question_id 5 and 1 more are not among the questions of .*questions\.json",
        ),
    ],
)
def test_bad_vqa(tmp_path: Path, questions: Any, annotations: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list(read_vqa(files(tmp_path, questions, annotations)))


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        (QUESTIONS, r"x\.json: is no list; if it has 'questions', name it vqa\.questions"),
        (
            [{"image": "a.jpg", "caption": "x"}],
            r"record\[0\] has no key 'question'; it has 'image', 'caption'",
        ),
        (
            [{"image": "a.jpg", "question": "x", "question_id": 1, "answer": ["y", 2]}],
            r"record\[0\] answer\[1\] is 2, expected text",
        ),
        (
            [{"image": "a.jpg", "question": "x", "question_id": 1, "answer": 2}],
            r"record\[0\] answer is 2, expected text or a list",
        ),
        ([{"image": "a.jpg", "question": "x", "question_id": 1.5}], r"question_id is 1\.5, expected"),
    ],
)
def test_bad_vqa_list(tmp_path: Path, tree: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list(read_vqa_list(put_json(tmp_path / "x.json", tree)))


# ---- shards --------------------------------------------------------------------------------------


def test_rows_hold_the_image_and_all_its_questions(tmp_path: Path) -> None:
    image = put(tmp_path / "val2014/COCO_val2014_000000000009.jpg", jpeg(9)).read_bytes()
    out = tmp_path / "out"
    summary = ingest(VqaIngestRun(str(tmp_path), str(out), vqa=files(tmp_path)))
    schema = pq.read_schema(out / "00000.parquet")
    assert schema.equals(VQA) and schema.metadata[b"huggingface"] == VQA.metadata[b"huggingface"]
    (row,) = rows(out)
    assert (row["key"], row["image"]["bytes"]) == ("9", image)
    assert row["image"]["path"] == "COCO_val2014_000000000009.jpg"
    first, second = row["questions"]
    assert (first["id"], first["question"]) == ("9000", "What is this?")
    assert [(one["text"], round(one["weight"], 6)) for one in first["answers"]] == [
        ("net", 0.7),
        ("mesh", 0.2),
        ("netting", 0.1),
    ]
    assert second.pop("answers") == [{"text": "2", "weight": 1.0}]
    assert second == {"id": "9001", "question": "How many?", "answer_type": "number"}
    assert summary.reasons == {"missing_image": 1} and summary.texts_written == 2
    report = json.loads((out / "ingest.json").read_text())
    assert (report["questions"], report["questions_written"], report["questions_of_dropped"]) == (3, 2, 1)
    assert [(image["key"], image["questions"]) for image in report["dropped"]] == [("458752", 1)]


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    """One answer of several, all answers, a question; an image with none of its questions is no row."""
    fine = {
        "image": "a.jpg",
        "question": " Who? \n",
        "question_id": 1,
        "answer": ["me ", "\ud800", "", "me "],
    }
    spoilt = {"image": "a.jpg", "question": "What?", "question_id": 2, "answer": ["", " "]}
    empty = {"image": "b.jpg", "question": " ", "question_id": 3, "answer": "x"}
    unanswered = {"image": "c.jpg", "question": "Where?", "question_id": 4}
    for name in "abc":
        put(tmp_path / f"images/{name}.jpg", jpeg(ord(name)))
    file = put_json(tmp_path / "list.json", [fine, spoilt, empty, unanswered])
    tree = {"images": str(tmp_path / "images"), "out": str(tmp_path / "out"), "vqa_list": {"file": file}}
    assert main([put_json(tmp_path / "run.yaml", tree)]) == 0
    found = {row["key"]: row["questions"] for row in rows(tmp_path / "out")}
    me = [{"text": "me", "weight": 0.5}]
    assert found == {
        "a": [{"id": "1", "question": "Who?", "answers": me, "answer_type": ""}],
        "c": [{"id": "4", "question": "Where?", "answers": [], "answer_type": ""}],
    }
    report = json.loads((tmp_path / "out/ingest.json").read_text())
    assert report["reasons"] == {"no_question": 1}
    assert (report["questions"], report["questions_unusable"]) == (4, 2)


def test_a_run_goes_on_and_is_not_mixed_with_another(tmp_path: Path) -> None:
    for number in (9, 458752):
        put(tmp_path / f"val2014/COCO_val2014_{number:012d}.jpg", jpeg(number))
    run = VqaIngestRun(str(tmp_path), str(tmp_path / "out"), vqa=files(tmp_path), rows_per_shard=1)
    ingest(run)
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    before = [path.stat().st_ino for path in shards]
    ingest(run)
    assert [path.stat().st_ino for path in shards] == before and len(shards) == 2
    changed = {"annotations": [answered(458752001, "yes/no", "maybe"), *ANNOTATIONS["annotations"][1:]]}
    files(tmp_path, annotations=changed)
    with pytest.raises(ValueError, match="made with another annotations"):
        ingest(run)


def test_one_kind_of_annotations_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of vqa and vqa_list"):
        VqaIngestRun("images", "out")


# ---- batches -------------------------------------------------------------------------------------

SIZE = 16
PLAIN = Augmentation(min_scale=1.0, flip=False, randaugment=False)


def asked(number: int, answers: int) -> Record:
    """Question `number`: "w<number>"; its answers "w<number> w0", ... weigh 0.1, 0.2, ..."""
    given = [{"text": f"w{number} w{i}", "weight": (i + 1) / 10} for i in range(answers)]
    return {"id": str(number), "question": f"W{number}!", "answers": given}


def write_shard(path: Path, questions: Sequence[Sequence[Record]], first: int, broken: int = -1) -> None:
    """One row per list of questions, two rows a group; image number `broken` is none."""
    table = [
        {
            "key": str(first + i),
            "image": {"bytes": b"no image" if first + i == broken else png(first + i), "path": ""},
            "questions": own,
        }
        for i, own in enumerate(questions)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table, schema=VQA), path, row_group_size=2)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Images 0 to 4 with questions 0 to 8, of which 2 and 6 have no answers, and image 3 none that has."""
    folder = tmp_path / "shards"
    write_shard(
        folder / "0.parquet", [[asked(0, 1), asked(1, 2), asked(2, 0)], [asked(3, 1)], [asked(4, 3)]], 0
    )
    write_shard(folder / "1.parquet", [[asked(6, 0)], [asked(5, 1), asked(7, 2), asked(8, 1)]], 3)
    return folder


ANSWERED = {0: 0, 1: 0, 3: 1, 4: 2, 5: 4, 7: 4, 8: 4}  # question -> its image


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "words")


def config(shards: Path, **values: Any) -> VqaDataConfig:
    given = {"shards": (str(shards),), "batch_size": 3, "window": 2, "workers": 0, "augmentation": PLAIN}
    return VqaDataConfig(**(given | values))


def take(words: Tokenizer, data: VqaDataConfig, count: int, **place: int) -> list[VqaBatch]:
    stream, _ = training_batches(data, words, SIZE, seed=5, **place)
    return list(itertools.islice(stream, count))


def numbers(words: Tokenizer, batch: VqaBatch) -> list[int]:
    """The questions of a batch."""
    return [int(text.removeprefix("w")) for text in words.decode(batch.ids[:, 1:])]


def test_every_answered_question_comes_once_an_epoch(shards: Path, words: Tokenizer) -> None:
    _, epoch = training_batches(config(shards), words, SIZE, seed=5)
    assert epoch == len(ANSWERED) == sum(group.questions for group in find_groups((str(shards),)))
    found = [number for batch in take(words, config(shards), 14) for number in numbers(words, batch)]
    for start in range(0, 42, 7):
        assert sorted(found[start : start + 7]) == sorted(ANSWERED)
    assert found[:7] != found[7:14]


def test_a_batch_holds_images_questions_and_answers(shards: Path, words: Tokenizer) -> None:
    for batch in take(words, config(shards), 5):
        asked_now = numbers(words, batch)
        assert len(batch.pixels) == len(asked_now) == 3
        for number, image in zip(asked_now, batch.pixels, strict=True):
            torch.testing.assert_close(image, image_transform(decode(png(ANSWERED[number])), SIZE))
        answers = words.decode(batch.answer_ids[:, 1:])
        counts = {0: 1, 1: 2, 3: 1, 4: 3, 5: 1, 7: 2, 8: 1}
        expected = [
            (row, f"w{n} w{i}", (i + 1) / 10) for row, n in enumerate(asked_now) for i in range(counts[n])
        ]
        found = zip(batch.owner.tolist(), answers, batch.weights.tolist(), strict=True)
        assert [(row, text, round(weight, 6)) for row, text, weight in found] == expected
        assert batch.mask.sum(1).tolist() == [3] * 3 and batch.answer_mask.sum(1).tolist() == [4] * len(
            answers
        )


def same(one: VqaBatch, other: VqaBatch) -> bool:
    return all(torch.equal(mine, vars(other)[name]) for name, mine in vars(one).items())


def test_batches_begin_anywhere_and_are_shared_by_processes(shards: Path, words: Tokenizer) -> None:
    data = config(shards, batch_size=2, augmentation=Augmentation())
    whole = take(words, data, 9)
    for first in (1, 4, 7):
        later = take(words, data, 9 - first, first=first)
        assert all(same(one, other) for one, other in zip(whole[first:], later, strict=True))
    ranks = [take(words, data, 7, rank=rank, world=2) for rank in range(2)]
    assert not same(whole[0], whole[1])
    seen = Counter(n for rank in ranks for batch in rank for n in numbers(words, batch))
    assert seen == dict.fromkeys(ANSWERED, 4)  # 7 batches of 4 questions are 4 epochs
    with pytest.raises(ValueError, match="rank is 2"):
        take(words, data, 1, rank=2, world=2)


def test_a_question_without_an_image_leaves_a_hole(shards: Path, words: Tokenizer) -> None:
    data = config(shards, batch_size=7, window=4)
    whole = take(words, data, 4)
    write_shard(shards / "1.parquet", [[asked(6, 0)], [asked(5, 1), asked(7, 2), asked(8, 1)]], 3, broken=4)
    for batch, left in zip(whole, take(words, data, 4), strict=True):
        expected = [number for number in numbers(words, batch) if number not in (5, 7, 8)]
        assert numbers(words, left) == expected
        assert left.owner.unique().tolist() == list(range(len(expected))) == [0, 1, 2, 3]


def test_texts_are_cut(shards: Path, words: Tokenizer) -> None:
    (batch,) = take(words, config(shards, max_question=3, max_answer=3), 1)
    assert batch.ids.size(1) == 3 and batch.answer_ids.size(1) == 3


def test_shards_that_cannot_be_learnt_from(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder; data\.shards must name"):
        find_groups((str(tmp_path / "nowhere"),))
    pq.write_table(pa.Table.from_pylist([], schema=CLEAN), tmp_path / "clean.parquet")
    with pytest.raises(
        ValueError, match=r"clean\.parquet: has no questions, only 'key', 'image', 'captions'"
    ):
        find_groups((str(tmp_path / "clean.parquet"),))
    write_shard(tmp_path / "test.parquet", [[asked(1, 0)], []], 0)
    with pytest.raises(ValueError, match="no question has an answer"):
        find_groups((str(tmp_path / "test.parquet"),))
    put(tmp_path / "cut.parquet", (shards / "0.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut\.parquet: is not a whole parquet file"):
        find_groups((str(tmp_path / "cut.parquet"),))


@pytest.mark.parametrize("name", ["batch_size", "max_question", "max_answer", "window", "workers"])
def test_numbers_that_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least"):
        VqaDataConfig(("x",), **{name: -1})


def test_a_batch_without_any_image_is_an_error(tmp_path: Path, words: Tokenizer) -> None:
    write_shard(tmp_path / "bad/0.parquet", [[asked(1, 1)]], 0, broken=0)
    with pytest.raises(ValueError, match=r"0\.parquet: a batch of 3 questions begins here, and none"):
        take(words, config(tmp_path / "bad"), 1)
