"""Training BLIP-2's two stages by their tiny configs: they learn, resume, and leave alone what is frozen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_language import opt_folder, t5_folder

from blip.checkpoint import load_state
from blip.tokenizer import write_vocabulary
from pipelines import train_stage1, train_stage2
from pipelines.config import load_config
from pipelines.data import DataConfig, Example
from pipelines.train_stage1 import Stage1Run
from pipelines.train_stage2 import LanguageBatch, Stage2Run
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY
from qformer import load_stage1, load_stage2
from qformer.language import load_language

ROOT = Path(__file__).resolve().parent.parent
WORLD = WorldConfig(seed=4, noisy_rows=0, clean_rows=24, test_rows=0, captions_per_image=2, brief=True)
CONSTANT = ("optim.schedule=constant", "optim.warmup_steps=0")
LANGUAGES = {"opt": opt_folder, "t5": t5_folder}
TINY = {"opt": "configs/tiny/stage2_opt.yaml", "t5": "configs/tiny/stage2_flant5.yaml"}


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stage1(folder: Path, out: Path, *settings: str) -> list[dict[str, float]]:
    """configs/tiny/stage1.yaml with what it reads and writes moved; what was logged."""
    overrides = (
        f"out={out}",
        f"data.shards=[{folder}/world/clean]",
        f"init.tokenizer={folder}/words",
        f"init.vision={ROOT}/weights/tiny/captioner",
        "data.batch_size=8",
        "train.log_every=1",
    )
    assert train_stage1.main([str(ROOT / "configs/tiny/stage1.yaml"), *overrides, *settings]) == 0
    return metrics(out)


def stage2(folder: Path, kind: str, out: Path, *settings: str) -> list[dict[str, float]]:
    overrides = (
        f"out={out}",
        f"language={folder}/{kind}",
        f"stage1.weights={folder}/stage1/model",
        f"data.shards=[{folder}/world/clean]",
        "data.batch_size=8",
        "train.log_every=1",
    )
    assert train_stage2.main([str(ROOT / TINY[kind]), *overrides, *settings]) == 0
    return metrics(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, language models, and a stage 1 of 12 steps."""
    folder = tmp_path_factory.mktemp("stages")
    write_world(WORLD, folder / "world")
    write_vocabulary(VOCABULARY, folder / "words")
    for kind, make in LANGUAGES.items():
        make(folder / kind)
    stage1(folder, folder / "stage1", "train.steps=12", "optim.warmup_steps=2")
    return folder


def test_stage1_learns_and_says_how(folder: Path) -> None:
    lines = metrics(folder / "stage1")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for loss, share in (("itc", 0.98), ("itg", 0.7)):  # the queries take longer to tell 8 pictures apart
        first, last = ([line[loss] for line in part] for part in (lines[:3], lines[-3:]))
        assert np.mean(last) < share * np.mean(first), loss
    assert all({"itm", "temperature", "grounding_gap"} <= line.keys() for line in lines)
    assert lines[0]["itm_prior"] == pytest.approx(0.6365, abs=1e-4)  # one true and two wrong pairs
    assert load_config(Stage1Run, folder / "stage1/config.yaml").train.steps == 12


def test_the_frozen_encoder_is_in_no_file_and_stays_as_it_was(folder: Path) -> None:
    state = load_state(folder / "stage1/state.pt")
    assert {name for name in state["model"] if name.startswith("vision.")} == {"vision.digest"}
    model = load_stage1(folder / "stage1/model")  # checks the sha256
    trained = sum(weight.numel() for weight in model.parameters())
    assert sum(weight.numel() for weight in state["model"].values()) == trained + 32  # bytes of the sha256


def test_a_stopped_stage1_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path) -> None:
    settings = (*CONSTANT, "model.qformer.dropout=0.1")
    whole = stage1(folder, tmp_path / "whole", "train.steps=4", *settings)
    stage1(folder, tmp_path / "parts", "train.steps=2", *settings)
    parts = stage1(folder, tmp_path / "parts", "train.steps=4", *settings)
    assert [line["itg"] for line in parts] == [line["itg"] for line in whole]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kind", LANGUAGES)
def test_stage2_learns_to_use_a_language_model(folder: Path, tmp_path: Path, kind: str) -> None:
    settings = ("train.steps=30", "optim.warmup_steps=2", "optim.lr=5e-3", "data.prompt=a photo of")
    lines = stage2(folder, kind, tmp_path / "out", *settings)
    assert np.mean([line["lm"] for line in lines[-6:]]) < np.mean([line["lm"] for line in lines[:6]])
    assert all({"grounding_gap", "unique_captions"} <= line.keys() for line in lines)
    model = load_stage2(tmp_path / "out/model", dtype=torch.float32)
    size = model.config.vision.image_size
    texts = model.caption(torch.zeros(2, 3, size, size))
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    before = load_stage1(folder / "stage1/model").qformer.state_dict()["blocks.0.attend.query.weight"]
    assert not torch.equal(model.qformer.state_dict()["blocks.0.attend.query.weight"], before)  # it goes on


def test_a_stopped_stage2_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path) -> None:
    whole = stage2(folder, "t5", tmp_path / "whole", "train.steps=4", *CONSTANT)
    stage2(folder, "t5", tmp_path / "parts", "train.steps=2", *CONSTANT)
    parts = stage2(folder, "t5", tmp_path / "parts", "train.steps=4", *CONSTANT)
    assert [line["lm"] for line in parts] == [line["lm"] for line in whole]


def test_stage2_can_do_without_stage1(folder: Path, tmp_path: Path) -> None:
    """With the Q-Former that stage 1 would have begun with."""
    alike = load_config(Stage1Run, ROOT / "configs/tiny/stage1.yaml")
    text = (ROOT / "configs/tiny/stage1.yaml").read_text()
    model = text[text.index("model:") : text.index("optim:")]
    plain = (ROOT / TINY["opt"]).read_text().replace("stage1: {weights: runs/tiny/stage1/model}\n", model)
    (tmp_path / "new.yaml").write_text(plain)
    settings = (
        f"out={tmp_path}/out",
        f"language={folder}/opt",
        f"init.tokenizer={folder}/words",
        f"init.vision={ROOT}/weights/tiny/captioner",
        f"data.shards=[{folder}/world/clean]",
        "data.batch_size=8",
        "train.steps=1",
    )
    assert train_stage2.main([str(tmp_path / "new.yaml"), *settings]) == 0
    found = load_stage2(tmp_path / "out/model", dtype=torch.float32).config.qformer
    assert alike.model is not None and (found.width, found.text) == (alike.model.qformer.width, False)
    both = tmp_path / "both.yaml"
    both.write_text(plain + "stage1: {weights: somewhere}\n")
    with pytest.raises(ValueError, match="give either stage1, a trained one, or model"):
        train_stage2.main([str(both)])


@pytest.mark.parametrize(
    ("kind", "prompt", "given", "wanted"),
    [
        ("opt", "", [""], ["a red cat left of a dog"]),
        ("opt", "a photo of", ["a photo of"], ["a red cat left of a dog"]),
        ("t5", "a photo of", ["a photo of"], ["a red cat left of a dog"]),
        ("t5", "", ["a red"], ["cat left of a dog"]),  # chance 0.4 of the first half of seven words
    ],
)
def test_what_is_given_and_what_is_wanted(
    folder: Path, kind: str, prompt: str, given: list[str], wanted: list[str]
) -> None:
    words = load_language(folder / kind).tokenizer
    data = DataConfig(("unused",), prompt=prompt, max_length=32)
    example = Example(torch.zeros(3, 8, 8), ["a red cat left of a dog"], None, 1, chance=0.4)
    found, expected = LanguageBatch(data, words)([example]).texts, words(given, wanted, 32)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "min_lr"),
    [("opt", 1920, 80_000, 5e-5), ("flant5", 1520, 80_000, 5e-5)],
)
def test_the_recipes_are_those_of_the_paper(name: str, batch: int, steps: int, min_lr: float) -> None:
    """BLIP-2 section 3.4; 16 processes without accumulation have the batch of one with it."""
    second = load_config(Stage2Run, ROOT / f"configs/stage2_{name}.yaml")
    first = load_config(Stage1Run, ROOT / "configs/stage1.yaml")
    assert second.data.batch_size * second.train.accumulate == batch
    assert (second.train.steps, second.optim.min_lr) == (steps, min_lr)
    assert first.data.batch_size * first.train.accumulate == 1680
    assert first.train.steps == 250_000
    for optim in (first.optim, second.optim):
        assert (optim.lr, optim.betas, optim.weight_decay, optim.warmup_steps) == (
            1e-4,
            (0.9, 0.98),
            0.05,
            2000,
        )
