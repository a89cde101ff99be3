"""Questions about the generated world are answered truly; a tiny run learns from them; the recipe."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_files import rows

from blip import load_vqa
from blip.image import decode, image_transform
from blip.tokenizer import Tokenizer, write_vocabulary
from pipelines import train_blip, train_vqa
from pipelines.config import load_config
from pipelines.questions import VQA
from pipelines.train_vqa import VqaRun
from pipelines.world import WorldConfig, make_scene, read_truth, write_world
from pipelines.world_captions import VOCABULARY
from pipelines.world_questions import QUESTION_VOCABULARY, QuestionsRun, ask, main, questions_of
from pipelines.world_text import COLOURS, SHAPES, TEXTURES, TONES, Scene, judge

ROOT = Path(__file__).resolve().parent.parent

# ---- the truth of the generated questions --------------------------------------------------------


def is_true(caption: str, scene: Scene) -> bool:
    verdict = judge(caption, scene)
    assert verdict.parsed, caption
    return verdict.true


def right_answers(question: str, scene: Scene) -> set[str]:
    """By the judge of captions: every answer that makes a true caption of the question."""
    name = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    if found := re.fullmatch(r"what colour is the (\w+)\?", question):
        return {colour for colour in COLOURS if is_true(f"there is a {colour} {found[1]}", scene)}
    if found := re.fullmatch(r"what shape is (\w+)\?", question):
        return {shape for shape in SHAPES if is_true(f"there is a {found[1]} {shape}", scene)}
    if found := re.fullmatch(rf"how big is the {name}\?", question):
        sizes = ("large", "big", "small", "little")
        return {size for size in sizes if is_true(f"a {size} {found[1]} {found[2]}", scene)}
    if found := re.fullmatch(rf"what pattern has the {name}\?", question):
        return {texture for texture in TEXTURES if is_true(f"a {texture} {found[1]} {found[2]}", scene)}
    if found := re.fullmatch(rf"is there an? {name}\?", question):
        return {"yes" if is_true(f"there is a {found[1]} {found[2]}", scene) else "no"}
    if found := re.fullmatch(rf"is the {name} ([a-z ]+) the {name}\?", question):
        caption = f"the {found[1]} {found[2]} is {found[3]} the {found[4]} {found[5]}"
        return {"yes" if is_true(caption, scene) else "no"}
    if question == "is the background dark or light?":
        thing = scene.objects[0]
        start = f"{thing.colour} {thing.shape}"
        return {tone for tone in TONES if is_true(f"a {tone} background with a {start}", scene)}
    assert question == "how many shapes are there?", question
    return {{2: "two", 3: "three", 4: "four"}[len(scene.objects)]}


def test_every_answer_is_the_truth() -> None:
    config, counts, said = WorldConfig(objects_min=2, objects_max=4), Counter[str](), Counter[str]()
    rng = np.random.default_rng(0)
    for _ in range(120):
        scene = make_scene(config, rng)
        for question, answers in ask(scene, config.palette(), rng):
            assert answers.keys() == right_answers(question, scene), (question, scene)
            assert sum(answers.values()) == pytest.approx(1)
            counts[" ".join(question.split()[:2])] += 1
            if question.startswith("is the") or question.startswith("is there"):
                said[f"{question.split()[1]} {next(iter(answers))}"] += 1
    assert counts.keys() == {
        *("what colour", "what shape", "how big", "what pattern", "how many", "is the", "is there")
    }
    assert said["there yes"] == said["there no"] == 120
    assert 0.8 < said["the yes"] / said["the no"] < 1.25


def test_every_word_is_in_the_vocabulary_and_needed(tmp_path: Path) -> None:
    config, rng, used = WorldConfig(objects_min=2, objects_max=4), np.random.default_rng(1), set[str]()
    for _ in range(60):
        for question, answers in ask(make_scene(config, rng), config.palette(), rng):
            used |= {*question.replace("?", " ?").split(), *answers}
    assert used <= set(QUESTION_VOCABULARY)
    assert set(QUESTION_VOCABULARY) - set(VOCABULARY) <= used
    write_vocabulary(QUESTION_VOCABULARY, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids, _ = tokenizer([" ".join(QUESTION_VOCABULARY)], 500)
    assert len(ids[0]) == len(QUESTION_VOCABULARY) + 2 and 1 not in ids  # [UNK]


def test_questions_of_a_picture_depend_on_the_seed_and_the_picture_alone() -> None:
    config = WorldConfig()
    scene, palette = make_scene(config, np.random.default_rng(2)), config.palette()
    run = QuestionsRun("world", "out")
    found = questions_of("a", scene, palette, run)
    assert found == questions_of("a", scene, palette, run)
    assert [question["id"] for question in found] == [f"a-{i}" for i in range(6)]
    assert len({question["question"] for question in found}) == 6
    others = (questions_of("b", scene, palette, run), questions_of("a", scene, palette, replace(run, seed=1)))
    assert found not in others


# ---- from the world to a model that answers ------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world, the questions about it, and two steps of pre-training with their words."""
    folder = tmp_path_factory.mktemp("runs")
    small = WorldConfig(noisy_rows=16, clean_rows=12, test_rows=4, shard_rows=8, side=32)
    write_world(small, folder / "world")
    config = str(ROOT / "configs/tiny/world_questions.yaml")
    assert main([config, f"world={folder}/world", f"out={folder}/world_vqa"]) == 0
    overrides = (
        f"out={folder}/tiny/pretrain_vqa",
        f"data.shards=[{folder}/world/noisy]",
        f"init.tokenizer={folder}/world_vqa/vocabulary",
        "train.steps=2",
        "data.batch_size=8",
    )
    assert train_blip.main([str(ROOT / "configs/tiny/pretrain.yaml"), *overrides]) == 0
    return folder


def test_shards_of_the_world_s_questions(runs: Path) -> None:
    for split, name, count in (("clean", "train", 12), ("test", "test", 4)):
        scenes = read_truth(runs / f"world/{split}_truth.parquet")
        found = rows(runs / "world_vqa" / name)
        assert [row["key"] for row in found] == list(scenes) and len(found) == count
        images = [row["image"] for row in rows(runs / "world" / split)]
        assert [row["image"] for row in found] == images
        for row in found:
            assert len(row["questions"]) == 6
            for question in row["questions"]:
                answers = {answer["text"] for answer in question["answers"]}
                assert answers == right_answers(question["question"], scenes[row["key"]][1])
    assert pq.read_schema(runs / "world_vqa/test/00000.parquet").equals(VQA)


def test_a_world_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished world; make one with make world"):
        main([str(ROOT / "configs/tiny/world_questions.yaml"), f"world={tmp_path}"])


def fine_tune(runs: Path, out: Path, *settings: str) -> list[dict[str, Any]]:
    """configs/tiny/vqa.yaml with what it reads and writes moved; what was logged."""
    overrides = (
        f"out={out}",
        f"start.weights={runs}/tiny/pretrain_vqa/model",
        f"data.shards=[{runs}/world_vqa/train]",
        "data.batch_size=8",
        "train.log_every=1",
    )
    assert train_vqa.main([str(ROOT / "configs/tiny/vqa.yaml"), *overrides, *settings]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_tiny_run_ends_with_a_model_that_answers(runs: Path, tmp_path: Path) -> None:
    lines = fine_tune(runs, tmp_path / "vqa", "train.steps=12", "optim.warmup_steps=2")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert np.mean([line["lm"] for line in lines[-3:]]) < 0.8 * np.mean([line["lm"] for line in lines[:3]])
    assert all(line["grad_norm"] > 0 and "itc" not in line for line in lines)
    vqa = load_vqa(tmp_path / "vqa/model")
    row = rows(runs / "world_vqa/test")[0]
    image = image_transform(decode(row["image"]["bytes"]), vqa.config.vision.image_size)[None]
    questions = [question["question"] for question in row["questions"]]
    answers = vqa.answer(image.expand(len(questions), -1, -1, -1), questions)
    assert len(answers) == 6 and all(isinstance(answer, str) for answer in answers)
    saved = load_config(VqaRun, tmp_path / "vqa/config.yaml")
    assert saved.data.max_question == 35 and saved.train.steps == 12


def test_a_stopped_run_goes_on_as_if_it_had_not(runs: Path, tmp_path: Path) -> None:
    """And not with another config. Its rate must not depend on how long it is to last."""
    constant = ("optim.schedule=constant", "start.dropout=0.1", "start.drop_path=0.1")
    whole = fine_tune(runs, tmp_path / "whole", "train.steps=4", *constant)
    fine_tune(runs, tmp_path / "parts", "train.steps=2", *constant)
    parts = fine_tune(runs, tmp_path / "parts", "train.steps=4", *constant)
    assert [line["lm"] for line in parts] == [line["lm"] for line in whole]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match=r"another config: data\.max_answer was 40, is 9"):
        fine_tune(runs, tmp_path / "parts", "train.steps=5", "data.max_answer=9", *constant)


def test_blocks_of_all_three_parts_can_be_computed_again(runs: Path, tmp_path: Path) -> None:
    settings = ("train.steps=2", "start.dropout=0.1")
    plain = fine_tune(runs, tmp_path / "plain", *settings)
    frugal = fine_tune(runs, tmp_path / "frugal", "train.checkpoint_blocks=9", *settings)
    for line, other in zip(plain, frugal, strict=True):
        assert (line["lm"], line["grad_norm"]) == pytest.approx((other["lm"], other["grad_norm"]), rel=1e-4)


def test_bf16_runs(runs: Path, tmp_path: Path) -> None:
    exact = fine_tune(runs, tmp_path / "exact", "train.steps=1")
    half = fine_tune(runs, tmp_path / "half", "train.steps=1", "train.precision=bf16")
    assert half[0]["lm"] == pytest.approx(exact[0]["lm"], rel=0.05) and half[0]["lm"] != exact[0]["lm"]
    weights = load_vqa(tmp_path / "half/model").state_dict().values()
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {torch.float32}


# ---- the recipe ----------------------------------------------------------------------------------


def test_the_recipe_is_that_of_blip() -> None:
    """salesforce/BLIP configs/vqa.yaml and data/__init__.py: 16 on each of 16 GPUs, 10 epochs."""
    run = load_config(VqaRun, ROOT / "configs/vqa.yaml")
    batch = run.data.batch_size * run.train.accumulate
    assert batch == 16 * 16
    assert abs(run.train.steps - 10 * (443_757 + 214_354 + 1_445_322) / batch) < 1
    assert (run.optim.lr, run.optim.min_lr, run.optim.weight_decay) == (2e-5, 0.0, 0.05)
    assert (run.optim.schedule, run.optim.betas, run.optim.warmup_steps) == ("cosine", (0.9, 0.999), 0)
    assert (run.start.image_size, run.start.drop_path, run.start.dropout) == (480, 0.1, None)
    assert run.data.max_question == 35
    assert (run.data.augmentation.min_scale, run.data.augmentation.flip) == (0.5, True)
    assert run.data.augmentation.randaugment
