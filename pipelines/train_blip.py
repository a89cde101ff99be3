"""Train a MED: pre-training (ITC + ITM + LM), a captioner (LM) or a filter (ITC + ITM).

The objectives are those the model has heads for: one that reads has ITC and ITM, one that writes has LM.
OUT holds config.yaml, metrics.jsonl, state.pt (to go on after a stop) and, at the end, model/ (a checkpoint
folder).
"""

import sys
from dataclasses import dataclass, field, replace

from blip.model import Blip, BlipConfig
from blip.momentum import MomentumConfig
from blip.tokenizer import BERT_VOCABULARY, Tokenizer
from blip.weights import init_text, init_vision, load_blip
from pipelines.alarms import inspect
from pipelines.config import parse_args, run_main
from pipelines.data import DataConfig, training_batches
from pipelines.launch import launch
from pipelines.optim import OptimConfig
from pipelines.trainer import TrainConfig


@dataclass(frozen=True)
class InitConfig:
    """What a new model begins with; without vision and text it is random."""

    tokenizer: str = BERT_VOCABULARY  # a folder with a vocabulary, or a Hugging Face name
    vision: str | None = None  # a timm name or a state dict file; BLIP: deit_base_patch16_224
    text: str | None = None  # a Hugging Face BERT, folder or name; BLIP: bert-base-uncased


@dataclass(frozen=True)
class StartConfig:
    """The trained model that fine-tuning starts from, and what of it: see `load_blip`."""

    weights: str  # a checkpoint folder, a Hugging Face folder or id, a salesforce .pth
    reads: bool | None = None  # false makes a captioner: no ITC, no ITM
    writes: bool | None = None  # false makes a filter: no LM
    image_size: int | None = None  # pixels; position embeddings are resampled
    dropout: float | None = None
    drop_path: float | None = None
    negative_floor: float | None = None  # of ITM, see BlipConfig
    negative_all_rank: bool | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class TrainRun:
    out: str
    data: DataConfig
    train: TrainConfig
    model: BlipConfig | None = None  # a new model; ViT-B/16 with BERT-base where nothing else is said
    init: InitConfig = field(default_factory=InitConfig)  # of a new model
    start: StartConfig | None = None  # or a trained one
    optim: OptimConfig = field(default_factory=OptimConfig)
    momentum: MomentumConfig | None = None  # the teacher of ITC; null: ITC within the batch

    def __post_init__(self) -> None:
        if self.start and (self.model or self.init != InitConfig()):
            raise ValueError(
                "start and model (or init) are both given; a run starts from trained weights or anew"
            )
        if self.data.features is not None:
            raise ValueError(
                "data.features are tokens of a frozen encoder, but a Blip trains its own; leave it out"
            )


def build(run: TrainRun) -> Blip:
    """The model of the run, with the weights it starts from, its tokenizer and its teacher."""
    if run.start:
        start = run.start
        model = load_blip(
            start.weights,
            image_size=start.image_size,
            reads=start.reads,
            writes=start.writes,
            dropout=start.dropout,
            drop_path=start.drop_path,
            tokenizer=start.tokenizer,
        )
        if start.negative_floor is not None:
            model.config = replace(model.config, negative_floor=start.negative_floor)
        if start.negative_all_rank is not None:
            model.config = replace(model.config, negative_all_rank=start.negative_all_rank)
    else:
        model = _new(run.model or BlipConfig(), run.init)
    if model.config.text.reads and run.data.texts_per_image > 1:
        raise ValueError(
            f"data.texts_per_image is {run.data.texts_per_image}; it must be 1 but for a captioner "
            "(start.reads: false), as ITC and ITM pair every image with one text"
        )
    if run.momentum is not None:
        model.with_teacher(run.momentum)
    return model


def _new(config: BlipConfig, init: InitConfig) -> Blip:
    tokenizer = Tokenizer(init.tokenizer)
    text = replace(config.text, vocab_size=len(tokenizer))
    model = Blip(replace(config, text=text, dec_id=tokenizer.dec, enc_id=tokenizer.enc), tokenizer)
    if init.vision:
        init_vision(model, init.vision)
    if init.text:
        init_text(model, init.text)
    return model


def main(argv: list[str]) -> int:
    return launch(parse_args(argv, TrainRun), build, training_batches, inspect)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
