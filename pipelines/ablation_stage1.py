"""What stage 1 is worth (BLIP-2, figure 5): stage 2 with and without it, into an OPT and a FlanT5, by seeds.

For every seed a Q-Former is trained by stage 1, and then by stage 2 with the same recipe and so the same
batches: from that Q-Former and from one as stage 1 began with, for each language model and each number of
steps, a whole schedule each. World, language models and what the frozen ViT sees are those of
`pipelines.demo_qformer`, made once; what comes out is judged on held-out pictures by the world's own truth.

OUT holds manifest.json, <seed>/<arm>/, table.json and table.md. Killed and run again, it goes on where it
stopped.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from capfilt.hold import hold
from capfilt.shards import write_json_atomically
from pipelines.ablation import STUDENT, write_table
from pipelines.config import as_tree, load_config, parse_args, run_main, save_config
from pipelines.demo_qformer import STAGE1, STAGE2, Recipes, first_steps, pictures, share_right, tell
from pipelines.steps import Step, check_steps, run_step
from pipelines.testset import read_testset
from pipelines.train_stage1 import Stage1Run
from pipelines.train_stage2 import Stage2Run, inspect, training_batches
from pipelines.world import WorldRun, read_truth
from qformer import load_stage2

LANGUAGES = ("OPT", "FlanT5")
KINDS = ("with", "without")


@dataclass(frozen=True)
class Arm:
    """One stage 2 of each seed."""

    language: str
    steps: int
    kind: str  # with or without stage 1

    @property
    def name(self) -> str:
        return f"{self.language}, {self.steps} steps, {self.kind} stage 1"

    @property
    def folder(self) -> str:
        return f"{self.kind}_{self.language.lower()}_{self.steps}"


@dataclass(frozen=True)
class Stage1AblationRun:
    out: str
    seeds: tuple[int, ...]  # of the trainings
    recipes: Recipes
    stage2_steps: tuple[int, ...]  # how long stage 2 is; its warmup is a tenth
    pictures: int = 500  # of the test set, that are told of

    def __post_init__(self) -> None:
        if not 2 <= len(set(self.seeds)) == len(self.seeds) <= max(STUDENT):
            raise ValueError(f"seeds is {list(self.seeds)}; give 2 to {max(STUDENT)} different ones")
        steps = self.stage2_steps
        if not steps or min(steps) < 10 or len(set(steps)) < len(steps):
            raise ValueError(f"stage2_steps is {list(steps)}; give different numbers from 10 on")

    def arms(self) -> list[Arm]:
        return [Arm(*each) for each in product(LANGUAGES, self.stage2_steps, KINDS)]

    def stage2(self, arm: Arm) -> str:
        """Its recipe."""
        return self.recipes.stage2_opt if arm.language == "OPT" else self.recipes.stage2_flant5


def main(argv: list[str]) -> int:
    run = parse_args(argv, Stage1AblationRun)
    out = Path(run.out)
    steps = [*first_steps(run.out, run.recipes), *(s for seed in run.seeds for s in plan_seed(run, seed))]
    check_steps(steps)
    with hold(out):
        save_config(run, out)
        for step in steps:
            run_step(out, step)
    found = {arm.name: [read_arm(run, seed, arm) for seed in run.seeds] for arm in run.arms()}
    write_table(out, run.seeds, found)
    return 0


def plan_seed(run: Stage1AblationRun, seed: int) -> Iterator[Step]:
    """Stage 1, and stage 2 of all arms."""
    folder, common = f"{run.out}/{seed}", (f"train.seed={seed}", *pictures(run.out))
    words = f"init.tokenizer={run.out}/world/vocabulary"
    first = (f"out={folder}/stage1", *common, words)
    yield Step(f"{seed}/stage1", STAGE1, run.recipes.stage1, first)
    new = as_tree(load_config(Stage1Run, run.recipes.stage1, first))
    starts = {
        "with": (f"stage1.weights={folder}/stage1/model",),
        "without": ("stage1=null", *(f"{key}={json.dumps(new[key])}" for key in ("model", "init"))),
    }
    for arm in run.arms():
        length = (f"train.steps={arm.steps}", f"optim.warmup_steps={arm.steps // 10}")
        language = f"language={run.out}/language_{arm.language.lower()}"
        overrides = (f"out={folder}/{arm.folder}", language, *length, *starts[arm.kind], *common)
        yield Step(f"{seed}/{arm.folder}", STAGE2, run.stage2(arm), overrides)


def read_arm(run: Stage1AblationRun, seed: int, arm: Arm) -> dict[str, float]:
    """What `share_right` tells and the grounding gap in nats a token, on held-out pictures. Found once, then
    read."""
    folder = Path(run.out) / str(seed) / arm.folder
    path = folder / "told.json"
    if path.exists():
        known: dict[str, float] = json.loads(path.read_text())
        return known
    world = load_config(WorldRun, run.recipes.world).world
    scenes = {key: scene for key, (_, scene) in read_truth(f"{run.out}/world/test_truth.parquet").items()}
    images = list(read_testset([f"{run.out}/world/test"], run.pictures))
    data = load_config(
        Stage2Run, run.stage2(arm), (f"data.shards=[{run.out}/world/test]", "data.batch_size=100")
    ).data
    model = load_stage2(folder / "model", dtype=torch.float32)
    told = dict(tell(model, images, scenes, world, data.prompt))
    size = model.config.vision.image_size
    batches, _ = training_batches(data, model.language.tokenizer, size, seed=0)
    gaps = [inspect(model, next(batches))["grounding_gap"] for _ in range(3)]
    found = {**share_right(told, scenes), "gap": float(np.mean(gaps))}
    write_json_atomically(path, found)
    return found


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
