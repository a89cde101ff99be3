"""Fine-tune BLIP-2's stage 2 on visual question answering (section 4.3): the Q-Former reads the question.

A stage 2 brings what looks and the projection; stage 1 brings what reads: words, positions and the MLPs of
text, which stage 2 went without. OUT holds config.yaml, metrics.jsonl, state.pt (to go on after a stop) and,
at the end, model/ (a checkpoint folder with the Q-Former's words, which `qformer.load_stage2` loads).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from blip.tokenizer import Tokenizer
from blip.weights import tokenizer_for
from blip.weights_files import locate
from pipelines.config import parse_args, run_main
from pipelines.launch import launch
from pipelines.optim import OptimConfig
from pipelines.parallel import DTYPE
from pipelines.train_stage2 import Stage2Start, go_on
from pipelines.trainer import TrainConfig
from pipelines.vqa_data import Questions, VqaDataConfig, question_batches
from qformer import Stage2, load_stage1
from qformer.frozen import Frozen
from qformer.stage2 import QUESTION, Asked, Stage2Batch, let_read
from qformer.texts import TextTokenizer


@dataclass(frozen=True)
class Reader:
    """The trained stage 1 whose Q-Former reads: see `load_stage1`."""

    weights: str  # a checkpoint folder, a Hugging Face folder or id, a LAVIS .pth
    vision: str | None = None  # where its frozen encoder lies, where the weights do not say


@dataclass(frozen=True)
class Stage2VqaRun:
    out: str
    language: str  # a causal or encoder-decoder language model, folder or Hugging Face name
    start: Stage2Start
    stage1: Reader
    data: VqaDataConfig
    train: TrainConfig
    template: str = QUESTION  # what the language model reads; {} is the question
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template is {self.template!r}; it must hold {{}} once, for the question")


@dataclass(frozen=True)
class AskedQuestions:
    """Questions -> the batch of a stage 2, in which each question stands before each of its answers."""

    config: VqaDataConfig
    words: Tokenizer  # of the Q-Former
    tokenizer: TextTokenizer  # of the language model
    template: str

    def __call__(self, found: Questions) -> Stage2Batch:
        ids, mask = self.words(found.texts, self.config.max_question)
        given = [self.template.format(found.texts[row]) for row in found.owner.tolist()]
        longest = self.config.max_question + self.config.max_answer
        texts = self.tokenizer(given, found.answers, longest)
        return Stage2Batch(found.pixels, texts, Asked(ids, mask, found.weights, found.owner))


def build(run: Stage2VqaRun) -> Stage2:
    """The model of the run; what is frozen computes in the precision of the training."""
    dtype = DTYPE[run.train.precision]
    stage1 = load_stage1(run.stage1.weights, vision=run.stage1.vision)
    model = let_read(go_on(run.start, run.language, dtype), stage1)
    if isinstance(model.vision, Frozen):
        model.vision.to(dtype)
    return model


def training_batches(
    run: Stage2VqaRun,
    words: Tokenizer,
    config: VqaDataConfig,
    tokenizer: TextTokenizer,
    image_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
) -> tuple[Iterator[Stage2Batch], int]:
    """`question_batches` for a stage 2."""
    collate = AskedQuestions(config, words, tokenizer, run.template)
    return question_batches(config, collate, image_size, seed, first, rank, world)


def main(argv: list[str]) -> int:
    run = parse_args(argv, Stage2VqaRun)
    words = tokenizer_for(locate(run.stage1.weights), None)
    if words is None:
        raise ValueError(f"{run.stage1.weights} holds no vocabulary, but its Q-Former is to read questions")
    return launch(run, build, partial(training_batches, run, words))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
