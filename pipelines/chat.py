"""A conversation about one image with a stage 2 of BLIP-2: questions on stdin, an answer to each on stdout.

What was asked and answered before is put in front of every question, as in BLIP-2 figure 4 and LAVIS'
examples/blip2_instructed_generation.ipynb:

    Question: which city is this? Answer: singapore. Question: why? Answer:

An empty line or the end of the input ends it.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from blip.generate import Decoding
from blip.image import ImageError, decode, image_transform
from blip.tokenizer import clean_question
from pipelines.config import parse_args, run_main
from pipelines.parallel import DTYPE, Precision, autocast, pick_device
from qformer import Stage2, load_stage2
from qformer.language import CausalLM, EncoderDecoderLM
from qformer.stage2 import QUESTION

PROMPT = "> "  # on a terminal
Turn = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class ChatRun:
    model: str  # a stage 2: a checkpoint folder, a Hugging Face folder or id, a LAVIS .pth
    image: str  # a file: JPEG, PNG, WebP or GIF
    vision: str | None = None  # where the frozen encoder lies, where the model does not say
    language: str | None = None  # and the frozen language model
    template: str = QUESTION  # {} is the question; the answer is written behind it
    decoding: Decoding = field(default_factory=lambda: Decoding(beams=5, min_length=1, max_length=30))
    context: int = 256  # tokens of the dialogue that are read; the oldest turns are left out
    precision: Precision = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^{}]*\{\}[^{}]*", self.template):
            raise ValueError(f"template is {self.template!r}; it must have one {{}}, where the question goes")
        if self.decoding.top_p is not None:
            raise ValueError("decoding.top_p asks for sampling; a conversation is greedy or has beams")
        if self.context < 1:
            raise ValueError(f"context is {self.context}; it must be at least 1")


def main(argv: list[str]) -> int:
    run = parse_args(argv, ChatRun)
    device = pick_device(run.device)
    look = read_image(Path(run.image))
    model = load_stage2(run.model, vision=run.vision, language=run.language, dtype=DTYPE[run.precision])
    model.vision.to(DTYPE[run.precision])
    pixels = look(model.to(device).config.vision.image_size)[None].to(device)  # [1, 3, S, S]
    turns: list[Turn] = []
    with torch.inference_mode(), autocast(device, run.precision):
        for line in typed(sys.stdin):
            question = clean_question(printable(" ".join(line.split())))
            try:
                template = fit(run, model, turns, question)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            written = model.answer(pixels, [question], run.decoding, template=template)[0]
            answer = first_answer(written, run.template)
            print(printable(answer), flush=True)
            turns.append((question, answer))
    return 0


def read_image(path: Path) -> Callable[[int], Tensor]:
    """A function from S to the pixels [3, S, S] of a file. Raises ValueError where it is no image."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give an image as JPEG, PNG, WebP or GIF")
    try:
        return partial(image_transform, decode(path.read_bytes()))
    except ImageError as error:
        raise ValueError(f"{path} cannot be decoded: {error}; give a JPEG, PNG, WebP or GIF") from error


def typed(source: TextIO) -> Iterator[str]:
    """The lines before the first empty one."""
    while True:
        if source.isatty():
            print(PROMPT, end="", flush=True)
        line = source.readline()
        if not line.strip():
            return
        yield line


def fit(run: ChatRun, model: Stage2, turns: Sequence[Turn], question: str) -> str:
    """The template with as many of the latest turns before it as the language model may read.

    Raises ValueError for a question that is too long alone.
    """
    most = room(run, model)
    for first in range(len(turns) + 1):
        template = with_turns(run.template, turns[first:])
        length = model.language.tokenizer.prompts([template.format(question)])[0].size(1)
        if length <= most:
            return template
    raise ValueError(f"the question has {length} tokens, at most {most} can be read; ask a shorter one")


def room(run: ChatRun, model: Stage2) -> int:
    """Tokens that there may be between the soft prompt and the answer."""
    assert isinstance(model.language, CausalLM | EncoderDecoderLM)
    positions = getattr(model.language.lm.module.config, "max_position_embeddings", None)
    if positions is None:  # FlanT5 has relative ones
        return run.context
    return min(run.context, int(positions) - model.config.qformer.queries - run.decoding.max_length)


def with_turns(template: str, turns: Sequence[Turn]) -> str:
    """The template of the next question, {}, behind turns that each end with a full stop."""
    told = [f"{template.format(asked)} {answered.rstrip('.')}." for asked, answered in turns]
    return " ".join([*(text.replace("{", "{{").replace("}", "}}") for text in told), template])


def first_answer(text: str, template: str) -> str:
    """In one line, without what may follow: a language model goes on and asks itself the next question."""
    opening = template.partition("{}")[0].strip()
    return " ".join((text.partition(opening)[0] if opening else text).split())


def printable(text: str) -> str:
    """Control characters, surrogates and marks that turn the writing direction become their numbers.

    What a model learned from the web, or was asked, must not steer a terminal.
    """
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
