"""What stage 1 is worth (BLIP-2, figure 5): stage 2 with and without it, into an OPT and a FlanT5, by seeds.

For every seed a Q-Former is trained by stage 1, and then four times by stage 2 with the same recipe and so
the same batches: from that Q-Former and from one as stage 1 began with, for each language model. World,
language models and what the frozen ViT sees are those of `pipelines.demo_qformer`, made once; what comes out
is judged on held-out pictures by the world's own truth.

OUT holds manifest.json, <seed>/<arm>/, table.json and table.md. Killed and run again, it goes on where it
stopped.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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

LANGUAGES = {"OPT": "opt", "FlanT5": "flant5"}
ARMS = {  # in the table -> (folder below a seed, language model)
    f"{name}, {kind} stage 1": (f"{kind}_{folder}", name)
    for name, folder in LANGUAGES.items()
    for kind in ("with", "without")
}


@dataclass(frozen=True)
class Stage1AblationRun:
    out: str
    seeds: tuple[int, ...]  # of the trainings
    recipes: Recipes
    pictures: int = 500  # of the test set, that are told of

    def __post_init__(self) -> None:
        if not 2 <= len(set(self.seeds)) == len(self.seeds) <= max(STUDENT):
            raise ValueError(f"seeds is {list(self.seeds)}; give 2 to {max(STUDENT)} different ones")


def main(argv: list[str]) -> int:
    run = parse_args(argv, Stage1AblationRun)
    out = Path(run.out)
    steps = [*first_steps(run.out, run.recipes), *(s for seed in run.seeds for s in plan_seed(run, seed))]
    check_steps(steps)
    with hold(out):
        save_config(run, out)
        for step in steps:
            run_step(out, step)
    found = {
        arm: [read_arm(run, out / str(seed) / folder, language) for seed in run.seeds]
        for arm, (folder, language) in ARMS.items()
    }
    write_table(out, run.seeds, found)
    return 0


def plan_seed(run: Stage1AblationRun, seed: int) -> Iterator[Step]:
    """Stage 1, and stage 2 four times."""
    folder, common = f"{run.out}/{seed}", (f"train.seed={seed}", *pictures(run.out))
    words = f"init.tokenizer={run.out}/world/vocabulary"
    first = (f"out={folder}/stage1", *common, words)
    yield Step(f"{seed}/stage1", STAGE1, run.recipes.stage1, first)
    new = as_tree(load_config(Stage1Run, run.recipes.stage1, first))
    starts = {
        "with": (f"stage1.weights={folder}/stage1/model",),
        "without": ("stage1=null", *(f"{key}={json.dumps(new[key])}" for key in ("model", "init"))),
    }
    for config, language in ((run.recipes.stage2_opt, "opt"), (run.recipes.stage2_flant5, "flant5")):
        for kind, start in starts.items():
            name = f"{kind}_{language}"
            overrides = (f"out={folder}/{name}", f"language={run.out}/language_{language}", *start, *common)
            yield Step(f"{seed}/{name}", STAGE2, config, overrides)


def read_arm(run: Stage1AblationRun, folder: Path, language: str) -> dict[str, float]:
    """Shares of captions and answers that are right, and the grounding gap in nats a token, on held-out
    pictures. Found once, then read."""
    path = folder / "told.json"
    if path.exists():
        known: dict[str, float] = json.loads(path.read_text())
        return known
    world = load_config(WorldRun, run.recipes.world).world
    scenes = {key: scene for key, (_, scene) in read_truth(f"{run.out}/world/test_truth.parquet").items()}
    images = list(read_testset([f"{run.out}/world/test"], run.pictures))
    config = run.recipes.stage2_opt if language == "OPT" else run.recipes.stage2_flant5
    data = load_config(Stage2Run, config, (f"data.shards=[{run.out}/world/test]", "data.batch_size=100")).data
    model = load_stage2(folder / "model", dtype=torch.float32)
    captions, answers = share_right(dict(tell(model, images, scenes, world, data.prompt)), scenes)
    size = model.config.vision.image_size
    batches, _ = training_batches(data, model.language.tokenizer, size, seed=0)
    gaps = [inspect(model, next(batches))["grounding_gap"] for _ in range(3)]
    found = {"captions right": captions, "answers right": answers, "gap": float(np.mean(gaps))}
    write_json_atomically(path, found)
    return found


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
