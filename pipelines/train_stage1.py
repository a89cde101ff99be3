"""Train BLIP-2's stage 1: the Q-Former learns from a frozen vision encoder to see what texts say.

The objectives are ITC, ITM and ITG. To fine-tune for retrieval the encoder is trained as well. OUT holds
config.yaml, metrics.jsonl, state.pt (to go on after a stop) and, at the end, model/ (a checkpoint folder,
which `qformer.load_stage1` loads; a frozen encoder is not in it, only where it lies and its sha256).
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from blip.model import Batch, lm_of_texts
from blip.tokenizer import BERT_VOCABULARY, Tokenizer
from pipelines.alarms import evaluating, itm_prior, of_neighbours
from pipelines.config import parse_args, run_main
from pipelines.data import DataConfig, training_batches
from pipelines.features import check_kind
from pipelines.launch import launch
from pipelines.optim import OptimConfig
from pipelines.parallel import DTYPE
from pipelines.trainer import TrainConfig
from qformer import Stage1, load_stage1
from qformer.frozen import Frozen
from qformer.stage1 import Stage1Config
from qformer.weights import start_stage1
from qformer.weights_vision import EVA_SOURCE


@dataclass(frozen=True)
class Stage1Init:
    """What a new stage 1 begins with."""

    vision: str = EVA_SOURCE  # a file such as eva_vit_g.pth, a folder, or timm's name
    text: str | None = "bert-base-uncased"  # a Hugging Face BERT, folder or name; null: random
    tokenizer: str = BERT_VOCABULARY  # a folder with a vocabulary, or a Hugging Face name


@dataclass(frozen=True)
class Stage1Start:
    """The trained stage 1 that training goes on from: see `load_stage1`."""

    weights: str  # a checkpoint folder, a Hugging Face folder or id, a LAVIS .pth
    vision: str | None = None  # where the frozen encoder lies, where the weights do not say
    image_size: int | None = None  # pixels; position embeddings are resampled
    dropout: float | None = None
    trains_vision: bool | None = None  # true: the encoder is trained too; null: as it was
    tokenizer: str | None = None


@dataclass(frozen=True)
class Stage1Run:
    out: str
    data: DataConfig
    train: TrainConfig
    model: Stage1Config | None = None  # a new model; BLIP-2's with EVA's ViT-g where nothing else is said
    init: Stage1Init = field(default_factory=Stage1Init)  # of a new model
    start: Stage1Start | None = None  # or a trained one
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if self.start and (self.model or self.init != Stage1Init()):
            raise ValueError(
                "start and model (or init) are both given; a run starts from trained weights or anew"
            )
        if self.data.texts_per_image > 1:
            raise ValueError(
                f"data.texts_per_image is {self.data.texts_per_image}; it must be 1, as ITC and ITM pair "
                "every image with one text"
            )


def build(run: Stage1Run) -> Stage1:
    """The model of the run, with the weights it starts from and its tokenizer; what is frozen computes in the
    precision of the training."""
    if run.start is None:
        model = new_stage1(run.model or Stage1Config(), run.init)
    else:
        start = run.start
        model = load_stage1(
            start.weights,
            vision=start.vision,
            image_size=start.image_size,
            dropout=start.dropout,
            trains_vision=start.trains_vision,
            tokenizer=start.tokenizer,
        )
    if isinstance(model.vision, Frozen):
        model.vision.to(DTYPE[run.train.precision])
    check_kind(run.data.features, model.vision, model.config.vision)
    return model


def new_stage1(config: Stage1Config, init: Stage1Init) -> Stage1:
    """A stage 1 with the words of its tokenizer, of which [DEC] is the last that it knows."""
    tokenizer = Tokenizer(init.tokenizer)
    qformer = replace(config.qformer, vocab_size=tokenizer.dec + 1)
    config = replace(config, qformer=qformer, dec_id=tokenizer.dec)
    return start_stage1(config, init.vision, init.text, tokenizer)


@torch.no_grad()
def inspect(model: Stage1, batch: Batch) -> dict[str, float]:
    """What to log beside the losses; as `pipelines.alarms.inspect`, the gap being ITG's."""
    found = {"temperature": float(model.temperature), "itm_prior": itm_prior(batch)}
    if model.qformer.lm_head is None or len(batch.image_ids.unique()) < 2:
        return found
    write = partial(
        lm_of_texts, model.qformer, batch, first=model.config.dec_id, smoothing=model.config.label_smoothing
    )
    with evaluating(model):
        image = model.project_image(model.image_tokens(batch.pixels))
        _, seen = model.qformer.look_projected(image)
        found["grounding_gap"] = float(write(image=of_neighbours(seen))[0] - write(image=seen)[0])
    return found


def main(argv: list[str]) -> int:
    return launch(parse_args(argv, Stage1Run), build, training_batches, inspect)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
