"""Each alarm is provoked by a real model, and stays silent where nothing is wrong."""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_pipelines_trainer import OPTIM, logged
from tiny import pixels, tiny_batch, tiny_blip, tiny_config, tiny_tokenizer
from torch import nn

from blip.generate import Decoding
from blip.model import Batch, Blip
from pipelines.alarms import IMAGES, LEAST_UNIQUE, PATIENCE, Alarms, entropy, inspect
from pipelines.log import RunLog
from pipelines.trainer import TrainConfig, train

BATCH = tiny_batch(tuple(range(IMAGES)))


def with_words(folder: Path) -> Blip:
    """As `tiny_blip`, with a tokenizer."""
    model = Blip(tiny_config(), tiny_tokenizer(folder / "words")).eval()
    model.load_state_dict(tiny_blip().state_dict())
    return model


def run(folder: Path, model: Blip, batch: Batch, steps: int = 8) -> list[dict[str, object]]:
    """The log of a training run on the same batch, every step of it."""
    config = TrainConfig(steps=steps, log_every=1, save_every=1000, device="cpu")
    with RunLog(folder, total_steps=steps) as log:
        batches, optimizer = itertools.repeat(batch), torch.optim.SGD(model.parameters(), lr=0.0)
        train(
            model,
            batches,
            optimizer,
            replace(OPTIM, lr=1e-12),
            config,
            log,
            folder,
            0,
            1,
            partial(inspect, model),
        )
    return logged(folder)


def said(lines: list[dict[str, object]], word: str) -> list[int]:
    """The steps at which an alarm with this word was given."""
    return [int(str(line["step"])) for line in lines if word in str(line.get("alarms", ""))]


def test_a_model_that_says_nothing_is_told_so(tmp_path: Path) -> None:
    """Without cross-attention: the same words whatever the image, and the same caption for all."""
    model = with_words(tmp_path)
    for block in model.med.blocks:
        nn.init.zeros_(block.look.out.weight)
    lines = run(tmp_path / "run", model, BATCH)
    assert all(abs(line["grounding_gap"]) < 1e-4 for line in lines)
    assert {line["unique_captions"] for line in lines} == {1 / IMAGES}
    assert (
        said(lines, "grounding_gap is")
        == said(lines, "unique_captions is 0.0625")
        == [OPTIM.warmup_steps + 1]
    )


def test_itm_at_its_prior_is_told_after_a_while(tmp_path: Path) -> None:
    model = with_words(tmp_path)
    nn.init.zeros_(model.heads["itm"].weight)
    with torch.no_grad():
        model.heads["itm"].bias.copy_(torch.tensor([2 / 3, 1 / 3]).log())
    lines = run(tmp_path / "run", model, BATCH, steps=12)
    assert all(line["itm"] == pytest.approx(0.6365, abs=1e-4) for line in lines)
    assert said(lines, "itm is 0.6365: this is the entropy") == [OPTIM.warmup_steps + PATIENCE]


def test_a_clamped_temperature_is_told(tmp_path: Path) -> None:
    model = with_words(tmp_path)
    model.temperature.data.fill_(0.7)  # is clamped to 0.5 after the first step
    lines = run(tmp_path / "run", model, BATCH)
    assert lines[-1]["temperature"] == 0.5
    assert said(lines, "temperature is 0.5: the end") == [OPTIM.warmup_steps + 1]


def test_a_model_that_looks_rings_no_alarm(tmp_path: Path) -> None:
    model = with_words(tmp_path)
    before = json.dumps({k: v.sum().item() for k, v in model.state_dict().items()})
    torch.manual_seed(0)
    found = inspect(model.train(), BATCH)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert model.training
    assert before == json.dumps({k: v.sum().item() for k, v in model.state_dict().items()})
    captions = model.eval().caption(BATCH.pixels, "", Decoding(max_length=20))
    assert found["unique_captions"] == len(set(captions)) / IMAGES > LEAST_UNIQUE
    assert Alarms(0)(1, {"itm": 0.2, "temperature": 0.07, "grounding_gap": 0.5, "unique_captions": 0.9}) == []


def test_the_gap_is_the_loss_with_the_neighbours_image_minus_the_own() -> None:
    model = tiny_blip(reads=False)
    gap = inspect(model, BATCH)["grounding_gap"]
    moved = replace(BATCH, pixels=BATCH.pixels.roll(1, 0))
    assert gap == pytest.approx(float(model(moved)["lm"] - model(BATCH)["lm"]), abs=1e-5)
    assert inspect(model, replace(BATCH, pixels=pixels(IMAGES), image_ids=torch.ones(IMAGES).long())) == {}


def test_an_alarm_is_given_once_and_again_when_it_comes_back() -> None:
    alarms = Alarms(warmup_steps=1)
    gaps = [0.0, 0.0, 0.0, 0.5, 0.0]
    assert [len(alarms(step, {"grounding_gap": gap})) for step, gap in enumerate(gaps, 1)] == [0, 1, 0, 0, 1]
    assert entropy(1 / 3) == pytest.approx(0.6365, abs=5e-5)
