"""VQA's accuracy against public examples, ranking against transformers, runs against single answers."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import jpeg, put_json
from test_blip_parity import begin, hf_config, inputs
from tiny import randomize, tiny_tokenizer
from transformers import BlipForQuestionAnswering

from blip import Blip, BlipConfig, BlipVQA, Tokenizer, load_vqa
from blip.image import decode, image_transform
from blip.med import MEDConfig
from blip.tokenizer import write_vocabulary
from blip.vision import VisionConfig
from pipelines import eval_vqa
from pipelines.config import ConfigError, run_main
from pipelines.eval_vqa import accuracy, read_answers, read_candidates, score_answers
from pipelines.questions import VQA, Answer, Question, weighed
from pipelines.testset import MOST_QUESTIONS, read_questions, server_id
from pipelines.vqa_accuracy import normalise, vqa_accuracy
from pipelines.world import WorldConfig, write_world
from pipelines.world_questions import QUESTION_VOCABULARY, QuestionsRun, write_questions

# ---- the accuracy --------------------------------------------------------------------------------

NORMALISED = [  # apple/axlearn, axlearn/vision/metrics_vqa_test.py
    ("n/a", "n"),
    ("no one", "no 1"),
    ("0-9", "0 9"),
    ("02/12/2011", "02 12 2011"),
    ("20+", "20"),
    ("6 fifty-five", "6 fifty 5"),
    ("8 - 2", "8 2"),
    ("none", "0"),
    ("", ""),
    ("a", ""),
    ("horse, man", "horse man"),
    ("t-shirt", "t shirt"),
    ("streamers_and_fake_records", "streamers and fake records"),
    ("june 29, 2013", "june 29 2013"),
    ("black/white", "black white"),
    ("chicken, rice, vegetables", "chicken rice vegetables"),
    ("hammer time!", "hammer time"),
    ("???", ""),
    ("someone", "someone"),
    # facebookresearch/mmf, tests/datasets/test_processors.py
    ("two", "2"),
    ("a building", "building"),
    ("snow, mountain", "snow mountain"),
    ("isnt", "isn't"),
    # by hand, from the tables and patterns of GT-Vision-Lab/VQA vqaEval.py
    ("The 1,000-foot Drop.", "1000foot drop"),
    ("3.50", "3.50"),
    ("u.s.a.", "usa"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("somebody'd", "somebodyd"),
    ("'ows'at", "'ow's'at"),
    ("Im", "im"),
    ("twas", "'twas"),
    ("weve", "we've"),
    ("lets", "lets"),
    ("10:20", "10:20"),
    (" an\n\tapple ", "apple"),
]


@pytest.mark.parametrize(("answer", "expected"), NORMALISED)
def test_answers_are_normalised_as_the_official_evaluation_does(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


ACCURACIES = [  # apple/axlearn, axlearn/vision/metrics_vqa_test.py
    ("none", "panther none leather dog cat none none none none dog", 1.0),
    ("a", "a a a a a a a a a a", 1.0),
    ("100", "about-100 100 0 0 thousands 1 0 100 many unknown", 0.6),
    ("3:18", "10:20 10:00 10:20 10-19 10:19 10:20 10-19 3:18 10:20 10:19", 0.3),
    ("maybe", "no yes yes no yes maybe yes yes yes yes", 0.3),
    ("russian", "english french german russian latin russian russian latin latin russian", 1.0),
    (
        "toilet-paper",
        "toilet-paper nothing toilet-paper nothing paper handle bowl valve toilet-paper nothing",
        0.9,
    ),
    ("yes", "yes yes yes yes yes yes yes yes no yes", 1.0),
    # by hand: unanimous people are not normalised, nor is the answer to be compared with them
    ("two", "2 2 2 2 2 2 2 2 2 2", 0.0),
    ("two", "2 2 2 2 2 2 2 2 2 3", 1.0),
    ("2", "two two 2 4 4 4 4 4 4 4", 0.9),
]


@pytest.mark.parametrize(("answer", "people", "expected"), ACCURACIES)
def test_accuracy_is_the_official_one(answer: str, people: str, expected: float) -> None:
    given = [text.replace("-", " ") for text in people.split()]
    answer = answer.replace("-", " ")
    assert vqa_accuracy(answer, given) == pytest.approx(expected)
    assert accuracy(answer, Question("1", "?", weighed(given)), people=10) == pytest.approx(expected)


def test_accuracy_is_the_mean_over_nine_of_ten() -> None:
    for right in range(11):
        people = ["cat"] * right + [f"other {i}" for i in range(10 - right)]
        subsets = [people[:i] + people[i + 1 :] for i in range(10)]
        expected = sum(min(subset.count("cat") / 3, 1) for subset in subsets) / 10
        assert vqa_accuracy("Cat.", people) == pytest.approx(expected if right < 10 else 0.0)


def test_what_was_dropped_of_ten_people_agrees_with_nobody() -> None:
    """Nine said "2", one nothing that could be written: they do not all agree, so all is normalised."""
    assert accuracy("two", Question("1", "?", (Answer("2", 0.9),)), people=10) == 1.0
    assert accuracy("two", Question("1", "?", (Answer("2", 1.0),)), people=10) == 0.0


def test_one_person_is_right_or_wrong() -> None:
    hill = Question("1", "where?", (Answer("on a hill", 0.2),))
    assert (accuracy("On the hill.", hill, people=1), accuracy("hill", hill, people=1)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="question 2 has several answers"):
        accuracy("a", Question("2", "?", (Answer("a", 0.5), Answer("b", 0.5))), people=1)
    with pytest.raises(ValueError, match=r"question 3: the share 0\.333.* of 'a' is no whole number of 10"):
        accuracy("a", Question("3", "?", (Answer("a", 1 / 3),)), people=10)


# ---- ranking -------------------------------------------------------------------------------------


def test_ranking_is_that_of_every_candidate_by_transformers(tmp_path: Path) -> None:
    """Among the k likeliest by their first word, the one with the least smoothed loss, each scored alone."""
    theirs = randomize(BlipForQuestionAnswering(hf_config(vision=48, text=48)))
    theirs.save_pretrained(tmp_path)
    ours = load_vqa(tmp_path, tokenizer=tiny_tokenizer(tmp_path / "words"))
    assert ours.tokenizer is not None
    pixels, _, _ = inputs(theirs.config)
    asked = random.Random(0)
    questions = [" ".join(f"w{asked.randrange(40)}" for _ in range(1 + row % 7)) for row in range(20)]
    images = [row // 3 % 2 for row in range(20)]
    words = [f"w{7 * i % 40} w{11 * i % 37 + 1}" for i in range(24)] + ["w0", "w7 w8 w9", "w7 w30"]
    candidates = ours.tokenizer(words, 40)
    found = {k: ours.rank(pixels, questions, candidates, k, images=images) for k in (1, 3, 9, 27, 99)}
    for row, image in enumerate(images):
        losses, firsts = transformers_losses(theirs, ours.tokenizer, pixels[image], questions[row], words)
        for k, chosen in found.items():
            kept = sorted(range(len(words)), key=lambda number: -firsts[number])[:k]
            assert chosen[row] == min(kept, key=lambda number: losses[number])
    assert len({tuple(chosen) for chosen in found.values()}) > 1  # k matters here
    assert found[27] == found[99] and len(set(found[27])) > 1


def transformers_losses(
    theirs: Any, tokenizer: Any, pixels: torch.Tensor, question: str, words: list[str]
) -> tuple[list[float], list[float]]:
    """Of each candidate the loss, smoothed by 0.1 and summed over its words; and P(its first word)."""
    ids = begin(tokenizer([question], 35)[0], 49)
    losses, firsts = [], []
    with torch.no_grad():
        image = theirs.vision_model(pixels[None])[0]
        states = theirs.text_encoder(ids, encoder_hidden_states=image)[0]
        for candidate in words:
            answer = begin(tokenizer([candidate], 40)[0], 48)
            logits = theirs.text_decoder(answer, encoder_hidden_states=states).logits[0, :-1].double()
            log_probs = logits.log_softmax(-1)
            right = log_probs.gather(1, answer[0, 1:, None])[:, 0]
            losses.append(-(0.9 * right + 0.1 * log_probs.mean(-1)).sum().item())
            firsts.append(round(right[0].exp().item(), 6))  # equal for equal first words
    return losses, firsts


# ---- whole runs ----------------------------------------------------------------------------------


def make_asked(found: Path) -> Path:
    """A generated world with questions, and a model of random weights that knows its words."""
    world = WorldConfig(seed=5, noisy_rows=0, clean_rows=0, test_rows=5, shard_rows=3, side=48)
    write_world(world, found / "world")
    write_questions(QuestionsRun(str(found / "world"), str(found / "asked"), questions_per_image=4))
    write_vocabulary(QUESTION_VOCABULARY, found / "words")
    words = Tokenizer(found / "words")
    text = MEDConfig(len(words), width=32, depth=2, heads=4, hidden=64, max_positions=40)
    vision = VisionConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3)
    settings = BlipConfig(vision, text, embed=16, dec_id=words.dec, enc_id=words.enc)
    randomize(BlipVQA(settings, words)).save_pretrained(found / "models/vqa")
    Blip(settings, words).save_pretrained(found / "models/med")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_asked(tmp_path_factory.mktemp("vqa"))


def config(folder: Path, out: str, **more: object) -> list[str]:
    tree = {
        "out": str(folder / out),
        "model": str(folder / "models/vqa"),
        "shards": [str(folder / "asked/test")],
        "device": "cpu",
        "batch_size": 2,
    }
    return [put_json(folder / f"{out}.yaml", tree | more)]


def answers_of(folder: Path, out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / out / "answers.json").read_text())
    return found


def test_answers_are_those_of_each_question_alone(folder: Path) -> None:
    protocol = {"decoding": {"beams": 2, "min_length": 1, "max_length": 6}}
    assert eval_vqa.main(config(folder, "open", protocol=protocol)) == 0
    model = load_vqa(folder / "models/vqa")
    decoding = eval_vqa.Decoding(beams=2, min_length=1, max_length=6)
    alone, accuracies = [], []
    for image in read_questions([str(folder / "asked/test")]):
        pixels = image_transform(decode(image.data), 32)[None]
        for question in image.questions:
            (answer,) = model.answer(pixels, [question.question], decoding)
            alone.append({"question_id": question.id, "answer": answer})
            people = [one.text for one in question.answers for _ in range(round(10 * one.weight))]
            accuracies.append(vqa_accuracy(answer, people))
    assert answers_of(folder, "open") == alone and len(alone) == 20
    found = json.loads((folder / "open/metrics.json").read_text())
    assert found["metrics"] == {"accuracy": pytest.approx(sum(accuracies) / 20)}
    assert (found["questions"], found["protocol"]["answers"], found["protocol"]["image_size"]) == (
        20,
        "open",
        32,
    )
    assert len(found["weights"]["sha256"]) == len(found["data"]["fingerprint"]) == 64


def test_ranked_answers_are_candidates_and_a_file_of_them_scores_the_same(folder: Path) -> None:
    candidates = put_json(folder / "candidates.json", ["yes", "no", "red", "circle", "two", "large"])
    protocol = {"candidates": candidates, "k": 4}
    assert eval_vqa.main(config(folder, "ranked", protocol=protocol)) == 0
    answers = answers_of(folder, "ranked")
    assert {row["answer"] for row in answers} <= {"yes", "no", "red", "circle", "two", "large"}
    given = str(folder / "ranked/answers.json")
    assert eval_vqa.main(config(folder, "again", model=None, answers=given)) == 0
    ranked, again = (json.loads((folder / name / "metrics.json").read_text()) for name in ("ranked", "again"))
    assert ranked["metrics"] == again["metrics"] and ranked["protocol"]["answers"] == 6
    assert "weights" not in again and len(again["answers"]["sha256"]) == 64
    assert answers_of(folder, "again") == answers


def test_a_part_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_vqa.main(config(folder, "part", limit=2, precision="bf16")) == 0
    assert "8 questions, of the first 2 images alone" in capsys.readouterr().out
    assert json.loads((folder / "part/metrics.json").read_text())["protocol"]["limit"] == 2


def asked_shard(path: Path, questions: list[tuple[str, list[str]]]) -> str:
    """One image with these (id, answers of people)."""
    asked = [
        {"id": name, "question": "what?", "answers": [vars(one) for one in weighed(given)]}
        for name, given in questions
    ]
    row = {"key": "7", "image": {"bytes": jpeg(1), "path": None}, "questions": asked}
    pq.write_table(pa.Table.from_pylist([row], VQA), path)
    return str(path)


def test_a_test_set_without_answers_gets_no_score_and_numbers_for_ids(folder: Path, tmp_path: Path) -> None:
    shard = asked_shard(tmp_path / "test.parquet", [(str(number), []) for number in range(19)])
    assert len(list(read_questions([shard]))) == -(-19 // MOST_QUESTIONS)
    assert eval_vqa.main(config(folder, "blind", shards=[shard])) == 0
    assert [row["question_id"] for row in answers_of(folder, "blind")] == list(range(19))
    assert json.loads((folder / "blind/metrics.json").read_text())["metrics"] == {}
    assert [server_id(name) for name in ("42", "042", "g7")] == [42, "042", "g7"]


def test_each_type_of_answer_has_an_accuracy_of_its_own() -> None:
    types = {"1": "yes/no", "2": "number", "3": "yes/no", "4": ""}
    asked = {name: Question(name, "?", weighed(["a"] * 10), kind) for name, kind in types.items()}
    found = score_answers({"1": "a", "2": "b", "3": "c", "4": "a"}, asked, 10)
    assert found == {"accuracy": 0.5, "accuracy yes/no": 0.5, "accuracy number": 0.0}


def test_missing_and_doubled_ids_are_listed(tmp_path: Path) -> None:
    asked = {name: Question(name, "?", (Answer("a", 1.0),)) for name in ("1", "2", "3")}
    with pytest.raises(ValueError, match="no answer to the questions 1, 3; answers to unknown questions 9"):
        score_answers({"2": "a", "9": "b"}, asked, 10)
    with pytest.raises(ValueError, match="the questions 2 have no answers of people, others have"):
        score_answers(dict.fromkeys(asked, "a"), asked | {"2": Question("2", "?", ())}, 10)
    double = [{"question_id": number, "answer": "a"} for number in (1, 2, 1, 3, 3, 3)]
    with pytest.raises(ValueError, match=r"double\.json answers '1' 2 times, '3' 3 times; each must"):
        read_answers(Path(put_json(tmp_path / "double.json", double)))
    shard = asked_shard(tmp_path / "twice.parquet", [("5", ["a"]), ("6", ["a"]), ("5", ["b"])])
    with pytest.raises(ValueError, match="these shards ask '5' 2 times; each must be there once"):
        eval_vqa.questions_of(read_questions([shard]))
    with pytest.raises(ValueError, match="the question 'what\\?' has no id"):
        eval_vqa.questions_of(read_questions([asked_shard(tmp_path / "no.parquet", [("", ["a"])])]))
    with pytest.raises(ValueError, match="there is no question"):
        eval_vqa.questions_of(read_questions([asked_shard(tmp_path / "none.parquet", [])]))


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"yes": 1}, "must hold a JSON list, but holds a dict"),
        (["yes", 2], "all of them text"),
        ([], "must hold a list of answers"),
        (["yes", " "], "none empty"),
        (["yes", "no", "yes"], "lists 'yes' 2 times"),
    ],
)
def test_bad_lists_of_candidates(tmp_path: Path, tree: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_candidates(Path(put_json(tmp_path / "list.json", tree)))


def test_bad_files_of_answers(tmp_path: Path) -> None:
    for tree in ([{"question_id": 1}], ["yes"]):
        with pytest.raises(ValueError, match=r"must hold a list of \{question_id, answer\}"):
            read_answers(Path(put_json(tmp_path / "x.json", tree)))
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read as JSON"):
        read_answers(tmp_path / "nowhere.json")


def test_bad_configs_and_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="give one of model and answers"):
        eval_vqa.main(config(folder, "neither", model=None))
    with pytest.raises(ConfigError, match="people is 0"):
        eval_vqa.main(config(folder, "nobody", protocol={"people": 0}))
    with pytest.raises(SystemExit) as stop:
        run_main(eval_vqa.main, config(folder, "wrong", model=str(folder / "models/med")))
    assert stop.value.code == 1 and "is a Blip, not a BlipVQA" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no shard of questions"):
        list(read_questions([str(folder / "world/test")]))
