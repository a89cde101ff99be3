"""With and without stage 1: arms that differ in that alone, and their numbers from held-out pictures."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_pipelines_demo_qformer import ROOT, small_stage2

from pipelines.ablation_stage1 import Arm, Stage1AblationRun, plan_seed, read_arm
from pipelines.config import load_config
from pipelines.demo_qformer import share_right, tell
from pipelines.testset import read_testset
from pipelines.world import WorldConfig, WorldRun, read_truth, write_world

CONFIG = ROOT / "configs/tiny/ablation_stage1.yaml"


def loaded(seed: int) -> dict[str, Any]:
    """Step -> the config it will read, overrides and all."""
    steps = plan_seed(load_config(Stage1AblationRun, CONFIG, ["out=runs/x"]), seed)
    return {step.name: load_config(step.entry.config, step.config, step.overrides) for step in steps}


def test_arms_differ_in_where_the_q_former_is_from_alone() -> None:
    run = load_config(Stage1AblationRun, CONFIG, ["out=runs/x"])
    assert len(run.stage2_steps) > 1
    found = loaded(7)
    assert list(found) == ["7/stage1", *(f"7/{arm.folder}" for arm in run.arms())]
    assert len({arm.name for arm in run.arms()}) == len(found) - 1 == 4 * len(run.stage2_steps)
    first = found["7/stage1"]
    for language, steps in product(("opt", "flant5"), run.stage2_steps):
        with_it, without = found[f"7/with_{language}_{steps}"], found[f"7/without_{language}_{steps}"]
        assert with_it.stage1 is not None and with_it.stage1.weights == "runs/x/7/stage1/model"
        assert (without.model, without.init) == (first.model, first.init)  # as stage 1 itself began
        alike = replace(without, out=with_it.out, stage1=with_it.stage1, model=None, init=with_it.init)
        assert alike == with_it
        assert with_it.language == f"runs/x/language_{language}" and with_it.train.seed == 7
        assert (with_it.train.steps, with_it.optim.warmup_steps) == (steps, steps // 10)
    assert loaded(8)[f"8/with_opt_{run.stage2_steps[0]}"].train.seed == 8


def test_an_arm_is_judged_on_held_out_pictures(tmp_path: Path) -> None:
    world = WorldConfig(seed=6, noisy_rows=0, clean_rows=0, test_rows=6, shard_rows=6, brief=True, side=48)
    write_world(world, tmp_path / "world")
    (tmp_path / "world.yaml").write_text(yaml.safe_dump({"out": "unset", "world": vars(world)}))
    run = load_config(Stage1AblationRun, CONFIG, [f"out={tmp_path}", f"recipes.world={tmp_path}/world.yaml"])
    assert load_config(WorldRun, run.recipes.world).world == world
    arm = Arm("OPT", 100, "with")
    folder = tmp_path / "201/with_opt_100"
    model = small_stage2(tmp_path)
    model.config = replace(
        model.config, vision_source=str(tmp_path / "vit.pth"), language_source=str(tmp_path / "opt")
    )
    model.save_pretrained(folder / "model")
    found = read_arm(run, 201, arm)
    scenes = {key: scene for key, (_, scene) in read_truth(tmp_path / "world/test_truth.parquet").items()}
    told = dict(tell(model, list(read_testset([str(tmp_path / "world/test")])), scenes, world, ""))
    gap = found.pop("gap")
    assert found == share_right(told, scenes) and torch.isfinite(torch.tensor(gap))
    (folder / "told.json").write_text(json.dumps({"gap": 1.0}))
    assert read_arm(run, 201, arm) == {"gap": 1.0}  # found once


@pytest.mark.parametrize("seeds", ["[1]", "[1,1]"])
def test_two_seeds_are_the_least(seeds: str) -> None:
    with pytest.raises(ValueError, match="give 2 to 10 different ones"):
        load_config(Stage1AblationRun, CONFIG, [f"seeds={seeds}"])


@pytest.mark.parametrize("steps", ["[]", "[100, 9]", "[100, 100]"])
def test_lengths_of_stage_2_are_some_and_differ(steps: str) -> None:
    with pytest.raises(ValueError, match="give different numbers from 10 on"):
        load_config(Stage1AblationRun, CONFIG, [f"stage2_steps={steps}"])
