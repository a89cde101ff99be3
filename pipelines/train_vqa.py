"""Fine-tune a pretrained MED on visual question answering (BLIP section 5.3): LM of the answers.

OUT holds config.yaml, metrics.jsonl, state.pt (to go on after a stop) and, at the end, model/ (a checkpoint
folder, which `blip.load_vqa` loads).
"""

import sys
from dataclasses import dataclass, field

from blip.vqa import BlipVQA
from blip.weights import start_vqa
from pipelines.config import parse_args, run_main
from pipelines.launch import launch
from pipelines.optim import OptimConfig
from pipelines.trainer import TrainConfig
from pipelines.vqa_data import VqaDataConfig, training_batches


@dataclass(frozen=True)
class VqaStart:
    """The pretrained MED that fine-tuning starts from: see `start_vqa`."""

    weights: str  # a checkpoint folder, a salesforce .pth
    image_size: int | None = None  # pixels; position embeddings are resampled
    dropout: float | None = None
    drop_path: float | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class VqaRun:
    out: str
    start: VqaStart
    data: VqaDataConfig
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)


def build(run: VqaRun) -> BlipVQA:
    """The model of the run, with the weights it starts from and its tokenizer."""
    start = run.start
    return start_vqa(
        start.weights,
        image_size=start.image_size,
        dropout=start.dropout,
        drop_path=start.drop_path,
        tokenizer=start.tokenizer,
    )


def main(argv: list[str]) -> int:
    return launch(parse_args(argv, VqaRun), build, training_batches)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
