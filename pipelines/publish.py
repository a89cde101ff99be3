"""Make trained runs small and shippable: weights in half precision, and beside them how they came to be.

For each run OUT of `pipelines.train_blip` (config.yaml, metrics.jsonl, model/) this writes a checkpoint
folder that `load_blip` reads, with recipe.yaml, training_log.jsonl and recipe.json (steps, seconds, digests),
and one picture with the learning curves of all of them.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blip.checkpoint import digest, save_model
from blip.weights import load_blip
from pipelines.config import parse_args, run_main
from pipelines.curves import draw_curves, read_metrics


@dataclass(frozen=True)
class PublishRun:
    runs: tuple[str, ...]  # OUT folders of training runs, each published under its own name
    curves_of: tuple[str, ...]  # OUT folders whose learning curves are drawn, in order
    out: str  # the folder that gets the checkpoint folders
    picture: str  # where the learning curves go, a .png
    max_bytes: int = 5_000_000  # of all weights together


def main(argv: list[str]) -> int:
    run = parse_args(argv, PublishRun)
    total = 0
    for source in map(Path, run.runs):
        folder = Path(run.out) / source.name
        publish(source, folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        total += size
        print(f"{folder}: {size / 1e6:.2f} MB, sha256 {digest(folder)[:16]}")
    if total > run.max_bytes:
        raise ValueError(f"the weights are {total} bytes together; max_bytes allows {run.max_bytes}")
    draw_curves({Path(source).name: read_metrics(source) for source in run.curves_of}, Path(run.picture))
    print(f"learning curves: {run.picture}")
    return 0


def publish(source: Path, folder: Path) -> None:
    """Write the model of a training run as a small checkpoint folder with its history."""
    model = load_blip(source / "model").to(torch.float16)
    if folder.exists():
        shutil.rmtree(folder)
    save_model(model, folder)
    shutil.copy(source / "config.yaml", folder / "recipe.yaml")
    shutil.copy(source / "metrics.jsonl", folder / "training_log.jsonl")
    note = _note(source, folder)
    (folder / "recipe.json").write_text(json.dumps(note, indent=2, sort_keys=True) + "\n")


def _note(source: Path, folder: Path) -> dict[str, Any]:
    metrics = read_metrics(source)
    return {
        "steps": metrics[-1]["step"],
        "seconds": round(metrics[-1]["seconds"]),
        "parameters": sum(p.numel() for p in load_blip(folder).parameters()),
        "sha256_trained_fp32": digest(source / "model"),
        "sha256_shipped_fp16": digest(folder),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
