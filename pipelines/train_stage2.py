"""Train BLIP-2's stage 2: what the Q-Former saw becomes a soft prompt for a frozen language model.

The Q-Former is that of a stage 1 or, to see what stage 1 is worth, a new one; or training goes on from a
stage 2, to fine-tune it and its encoder on captions. OUT holds config.yaml, metrics.jsonl, state.pt (to go on
after a stop) and, at the end, model/ (a checkpoint folder, which `qformer.load_stage2` loads; of the frozen
parts it has the places and the sha256).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from blip.generate import Decoding
from pipelines.alarms import IMAGES, evaluating
from pipelines.config import parse_args, run_main
from pipelines.data import DataConfig, Example, collated_batches
from pipelines.features import check_kind
from pipelines.launch import launch
from pipelines.optim import OptimConfig
from pipelines.parallel import DTYPE
from pipelines.train_stage1 import Stage1Init, new_stage1
from pipelines.trainer import TrainConfig
from qformer import Stage2, load_stage1, load_stage2
from qformer.frozen import Frozen
from qformer.language import load_language
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2Batch, start_stage2
from qformer.texts import EncoderDecoderTokenizer, TextTokenizer, split_prefix


@dataclass(frozen=True)
class Stage1Source:
    """A trained stage 1."""

    weights: str  # a checkpoint folder, a Hugging Face folder or id, a LAVIS .pth
    vision: str | None = None  # where the frozen encoder lies, where the weights do not say
    image_size: int | None = None  # pixels; position embeddings are resampled


@dataclass(frozen=True)
class Stage2Start:
    """The trained stage 2 that training goes on from: see `load_stage2`."""

    weights: str  # a checkpoint folder, a Hugging Face folder or id, a LAVIS .pth
    vision: str | None = None  # where the frozen encoder lies, where the weights do not say
    image_size: int | None = None  # pixels; position embeddings are resampled
    dropout: float | None = None
    trains_vision: bool | None = None  # true: the encoder is trained too; null: as it was


@dataclass(frozen=True)
class Stage2Run:
    out: str
    language: str  # a causal or encoder-decoder language model, folder or Hugging Face name
    data: DataConfig
    train: TrainConfig
    stage1: Stage1Source | None = None
    model: Stage1Config | None = None  # or without stage 1: a new Q-Former, as stage 1 would begin with
    init: Stage1Init = field(default_factory=Stage1Init)
    start: Stage2Start | None = None  # or a stage 2
    dense_act_fn: str | None = None  # "gelu" for FlanT5 beside weights of LAVIS, see `load_language`
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.stage1, self.model, self.start)) != 1:
            raise ValueError(
                "give either stage1, a trained one, or model, the shape of a new one, or start, a stage 2 to "
                "go on from"
            )
        if self.start is not None and self.dense_act_fn is not None:
            raise ValueError("dense_act_fn is what the weights of start say; leave it out")
        if self.data.texts_per_image > 1 or self.data.contrasts:
            raise ValueError(
                "data.texts_per_image must be 1 and data.contrasts empty, as for one text an image"
            )


@dataclass(frozen=True)
class LanguageBatch:
    """Examples -> a `Stage2Batch`. The prompt is given, the text wanted.

    Without a prompt a causal model writes all of a text, and an encoder-decoder reads its beginning.
    """

    config: DataConfig
    tokenizer: TextTokenizer

    def __call__(self, found: list[Example]) -> Stage2Batch:
        pairs = [self._pair(example) for example in found]
        given, wanted = ([pair[part] for pair in pairs] for part in range(2))
        texts = self.tokenizer(given, wanted, self.config.max_length)
        return Stage2Batch(torch.stack([example.pixels for example in found]), texts)

    def _pair(self, example: Example) -> tuple[str, str]:
        if not self.config.prompt and isinstance(self.tokenizer, EncoderDecoderTokenizer):
            return split_prefix(example.texts[0], example.chance)
        return self.config.prompt, example.texts[0]


def training_batches(
    config: DataConfig,
    tokenizer: TextTokenizer,
    image_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
) -> tuple[Iterator[Stage2Batch], int]:
    """`collated_batches` for a stage 2."""
    return collated_batches(config, LanguageBatch(config, tokenizer), image_size, seed, first, rank, world)


def build(run: Stage2Run) -> Stage2:
    """The model of the run; what is frozen computes in the precision of the training."""
    dtype = DTYPE[run.train.precision]
    if run.start is not None:
        model = go_on(run.start, run.language, dtype)
    else:
        language = load_language(run.language, dtype, run.dense_act_fn)
        if run.stage1 is not None:
            source = run.stage1
            stage1 = load_stage1(source.weights, vision=source.vision, image_size=source.image_size)
        else:
            stage1 = new_stage1(run.model or Stage1Config(), run.init)
        model = start_stage2(stage1, language, run.language, run.dense_act_fn)
    if isinstance(model.vision, Frozen):
        model.vision.to(dtype)
    check_kind(run.data.features, model.vision, model.config.vision)
    return model


def go_on(start: Stage2Start, language: str, dtype: torch.dtype) -> Stage2:
    """The trained stage 2, its language model in `dtype`."""
    return load_stage2(
        start.weights,
        vision=start.vision,
        language=language,
        dtype=dtype,
        image_size=start.image_size,
        dropout=start.dropout,
        trains_vision=start.trains_vision,
    )


@torch.no_grad()
def inspect(model: Stage2, batch: Stage2Batch) -> dict[str, float]:
    """What to log beside the loss: the grounding gap and the share of unique captions, as
    `pipelines.alarms.inspect`."""
    if len(batch.pixels) < 2:
        return {}
    with evaluating(model):
        prompt = model.soft_prompt(batch.pixels)  # [B, Q, D_lm]
        gap = model.language.loss(prompt.roll(1, 0), batch.texts) - model.language.loss(prompt, batch.texts)
        captions = model.language.generate(
            prompt[:IMAGES], [""] * len(prompt[:IMAGES]), Decoding(beams=1, max_length=20)
        )
    return {"grounding_gap": float(gap), "unique_captions": len(set(captions)) / len(captions)}


def main(argv: list[str]) -> int:
    return launch(parse_args(argv, Stage2Run), build, training_batches, inspect)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
