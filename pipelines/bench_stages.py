"""A step of BLIP-2's two stages, forward and backward, here and as a plain loop over transformers' modules.

stage 1    ITC + ITM + ITG of a Q-Former beside a frozen ViT
stage 2    the queries into a frozen language model, an OPT and a FlanT5

Both sides have the same weights, images and texts and draw the same hard negatives; they are timed only after
losses and gradients agreed in fp32. On both sides dropout is 0, and the optimiser's step is left out.

The plain loop of stage 1 (pipelines/bench_stages_plain.py) is that of LAVIS: texts padded to 32 tokens, and
ITM in one pass over 3B pairs with image tokens of their own. One thing is dearer than there: the Q-Former of
transformers keeps no keys and values, so that ITG computes the queries once more. Where LAVIS is slower than
it must be, a draw for every row, it is not followed. Stage 2 is Blip2ForConditionalGeneration as it is.

`more` has our step without the vision encoder, too: "tokens known", as if they had been stored. On a GPU it
has the peak memory, without what AdamW keeps (8 bytes for each weight that is trained), and the days that the
paper's steps would take on 16 such GPUs, with nothing but these steps: no data, no exchange, no optimiser.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    T5Config,
)

from blip.model import IGNORED, BlipConfig
from blip.vision import VisionConfig
from pipelines import bench_train
from pipelines.bench_sides import Result, Work, in_turns
from pipelines.bench_stages_plain import PlainStage1, PlainStage2, plain_name
from pipelines.bench_train import (
    GRADIENT_CLOSE,
    NO_GRADIENT,
    TEMPERATURE,
    BenchTrainConfig,
    check_losses,
    norm,
)
from pipelines.parallel import DTYPE, Precision, pick_device
from pipelines.train_language import OPTShape, T5Shape, opt_tokenizer, t5_tokenizer, world_texts
from pipelines.world import WorldConfig
from qformer import QFormerConfig, Stage1, Stage2, export_hf
from qformer.frozen import Frozen
from qformer.language import CausalLM, EncoderDecoderLM
from qformer.stage1 import Stage1Config
from qformer.stage2 import Stage2Batch, start_stage2
from qformer.texts import CausalTokenizer, EncoderDecoderTokenizer, Texts

STAGE1, OPT, T5 = STAGES = ("stage 1", "stage 2 OPT", "stage 2 FlanT5")
HERE, THERE, KNOWN = "here", "transformers", "tokens known"
PAPER = {STAGE1: (250_000, 1680), OPT: (80_000, 1920), T5: (80_000, 1520)}  # steps, batch: BLIP-2 section 3.4
GPUS = 16  # of the paper
COMPARED = 4  # images, in fp32 before anything is timed
SPELT = 320  # words that the tokenizers know, which only the export needs; others are drawn as texts


def small_stage1() -> Stage1Config:
    """BLIP-2's Q-Former beside a ViT that a CPU can bear."""
    vision = VisionConfig(width=384, depth=6, heads=6, final_norm=False)
    return Stage1Config(vision, QFormerConfig(image_width=vision.width))


@dataclass(frozen=True)
class BenchStagesConfig:
    """Weights are random: speed does not depend on what they are."""

    model: Stage1Config = field(default_factory=small_stage1)
    opt: OPTShape = field(default_factory=OPTShape)
    t5: T5Shape = field(default_factory=T5Shape)
    opt_words: int = 50272
    t5_words: int = 32128
    batch: int = 4  # images, with a text each
    words: tuple[int, int] = (6, 18)  # of a text, the fewest and the most; two tokens come on top
    padding: int = 32  # tokens of every text in the plain loop of stage 1; here the longest of the batch
    device: str = "cpu"
    precision: Precision = "fp32"  # bf16: frozen weights are bf16, what is trained is autocast
    peak_tflops: float | None = None  # of the device in dense bf16; null: as known, or not told

    def __post_init__(self) -> None:
        _ = self.drawn  # complains of words, padding, batch and peak
        for name in ("opt_words", "t5_words"):
            if getattr(self, name) <= SPELT:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above {SPELT}")

    @property
    def drawn(self) -> BenchTrainConfig:
        """What the bench of pre-training wants to know, to draw pictures and texts."""
        text = replace(BlipConfig().text, max_positions=self.model.qformer.max_positions)
        shown = BlipConfig(self.model.vision, text, dec_id=self.model.dec_id)
        return BenchTrainConfig(
            model=shown,
            batch=self.batch,
            words=self.words,
            padding=self.padding,
            peak_tflops=self.peak_tflops,
        )


@dataclass(frozen=True)
class Sides:
    """Two models that compute the same, on the device and in training."""

    ours: Stage1 | Stage2
    theirs: PlainStage1 | PlainStage2
    frozen: tuple[nn.Module, ...]  # of both


@dataclass(frozen=True)
class Shown:
    """A batch, as each side wants it."""

    ours: Any
    theirs: Any
    tokens: int  # of images and texts, without padding


def measure_stages(config: BenchStagesConfig, folder: Path, seed: int, repeats: int) -> Iterator[Result]:
    """Raises ValueError where the two sides differ."""
    for name in STAGES:
        yield measure(config, name, folder, seed, repeats)


def measure(config: BenchStagesConfig, name: str, folder: Path, seed: int, repeats: int) -> Result:
    """Of one of STAGES; its models are gone when it returns."""
    with TemporaryDirectory(dir=folder) as place:
        sides = make_sides(config, name, Path(place), seed)
    few = replace(config, batch=min(config.batch, COMPARED))
    compare(sides, draw(few, sides, seed), seed)
    return time_steps(config, name, sides, draw(config, sides, seed), seed, repeats)


def make_sides(config: BenchStagesConfig, name: str, folder: Path, seed: int) -> Sides:
    """Ours is drawn on the device, where it is to run; theirs is ours, exported to `folder`."""
    device, dtype = pick_device(config.device), DTYPE[config.precision]
    torch.manual_seed(seed)
    qformer = replace(config.model.qformer, dropout=0.0)
    shape = replace(config.model, qformer=qformer, norm_eps=config.model.vision.eps)  # one eps for both there
    with torch.device(device):
        ours: Any = Stage1(shape)
        ours.vision.to(dtype)
        if name != STAGE1:
            ours = start_stage2(ours, new_opt(config, seed) if name == OPT else new_t5(config, seed))
    export_hf(ours, folder)
    kind: Any = Blip2ForImageTextRetrieval if name == STAGE1 else Blip2ForConditionalGeneration
    loaded = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    frozen = [ours.vision.module, loaded.vision_model.embeddings, loaded.vision_model.encoder]
    if name == STAGE1:
        theirs: Any = PlainStage1(shape, loaded)
        with torch.no_grad():  # what transformers has no place for
            ours.temperature.fill_(TEMPERATURE)
            for head, weight in ours.qformer.lm_head.named_parameters():
                theirs.get_parameter(plain_name(f"qformer.lm_head.{head}")).copy_(weight)
    else:
        theirs = PlainStage2(loaded)
        frozen += [ours.language.lm.module, loaded.language_model]
    ours.train(), theirs.train()
    for module in frozen:
        module.to(dtype).eval().requires_grad_(False)
    return Sides(ours.to(device), theirs.to(device), tuple(frozen))


def new_opt(config: BenchStagesConfig, seed: int) -> CausalLM:
    lm = AutoModelForCausalLM.from_config(opt_shape(config), dtype=DTYPE[config.precision])
    return CausalLM(lm, CausalTokenizer(opt_tokenizer(world_texts(WorldConfig(), 300, seed), SPELT)))


def opt_shape(config: BenchStagesConfig) -> OPTConfig:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    width = {"word_embed_proj_dim": config.opt.hidden_size, "vocab_size": config.opt_words}
    return OPTConfig(**asdict(config.opt), **width, **special)


def new_t5(config: BenchStagesConfig, seed: int) -> EncoderDecoderLM:
    lm = AutoModelForSeq2SeqLM.from_config(t5_shape(config), dtype=DTYPE[config.precision])
    # FlanT5 writes by a matrix of its own; transformers begins with the word embedding, and too large.
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.detach() * config.t5.d_model**-0.5)
    words = t5_tokenizer(world_texts(WorldConfig(), 300, seed), SPELT)
    return EncoderDecoderLM(lm, EncoderDecoderTokenizer(words))


def t5_shape(config: BenchStagesConfig) -> T5Config:
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": config.t5_words}
    return T5Config(**asdict(config.t5), **gated, **special)


def draw(config: BenchStagesConfig, sides: Sides, seed: int) -> Shown:
    """The same pictures and texts of random words for both; FlanT5 reads one half and writes the other."""
    device = pick_device(config.device)
    batch = bench_train.draw_batch(config.drawn, seed)
    tokens = config.batch * config.model.vision.tokens + int(batch.mask.sum())
    if isinstance(sides.ours, Stage1):
        return Shown(batch.to(device), bench_train.padded(batch, config.padding).to(device), tokens)
    language = sides.ours.language
    assert isinstance(language, CausalLM | EncoderDecoderLM)
    words = language.lm.module.get_input_embeddings().num_embeddings
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(SPELT, words, batch.ids.shape, generator=numbers) * batch.mask
    labels = ids.masked_fill(batch.mask == 0, IGNORED)
    texts = Texts(ids, batch.mask, labels)
    if isinstance(language, EncoderDecoderLM):
        half = ids.size(1) // 2
        texts = Texts(ids[:, :half], batch.mask[:, :half], labels[:, half:].contiguous())
    asked = Stage2Batch(batch.pixels, texts).to(device)
    return Shown(asked, asked, tokens)


def compare(sides: Sides, shown: Shown, seed: int) -> None:
    """In fp32. Raises ValueError where a loss differs by 1e-4, or a gradient by 1e-3 of its norm."""
    dtypes = [next(module.parameters()).dtype for module in sides.frozen]
    for module in sides.frozen:
        module.to(torch.float32)
    found = bench_train.losses_and_gradients(sides.ours, shown.ours, seed)
    check_losses(found, bench_train.losses_and_gradients(sides.theirs, shown.theirs, seed))
    check_gradients(sides)
    for model in (sides.ours, sides.theirs):
        model.zero_grad()
    for module, dtype in zip(sides.frozen, dtypes, strict=True):
        module.to(dtype)


def check_gradients(sides: Sides) -> None:
    """As `bench_train.check_gradients`, of weights that each side has once."""
    pairs = {
        name: (weight.grad, sides.theirs.get_parameter(plain_name(name)).grad)
        for name, weight in sides.ours.named_parameters()
    }
    nothing = NO_GRADIENT * norm(theirs for _, theirs in pairs.values() if theirs is not None)
    for name, (found, expected) in pairs.items():
        if found is None or expected is None:
            raise ValueError(f"{name} has a gradient on one side at most, so nothing is timed")
        difference = float((found - expected.view_as(found)).norm())
        if not difference <= max(GRADIENT_CLOSE * float(expected.norm()), nothing):  # NaN is refused, too
            raise ValueError(
                f"gradients of {name} differ by {difference:.2g} at a norm of {float(expected.norm()):.2g}, "
                f"allowed are {GRADIENT_CLOSE:g} of it, so nothing is timed; one side is wrong"
            )


def time_steps(
    config: BenchStagesConfig, name: str, sides: Sides, shown: Shown, seed: int, repeats: int
) -> Result:
    device = pick_device(config.device)
    with torch.no_grad():
        known = replace(shown.ours, pixels=sides.ours.vision(shown.ours.pixels))
    work = {HERE: (sides.ours, shown.ours), THERE: (sides.theirs, shown.theirs), KNOWN: (sides.ours, known)}
    steps: dict[str, Work] = {
        side: partial(bench_train.step, model, batch, seed, config.precision)
        for side, (model, batch) in work.items()
    }
    counts = {side: bench_train.flops(step) for side, step in steps.items()}
    peaks = {side: weights(work[side][0]) + taken(step, device) for side, step in steps.items()}
    times = in_turns({side: partial(timeit, step, number=1) for side, step in steps.items()}, repeats)
    whole = Result(f"{name}, {device.type} {config.precision}", "images", config.batch, times)
    found = bench_train.details(whole, counts, shown.tokens, bench_train.peak(config.drawn, device))
    found[f"{KNOWN} images/s"] = whole.rates[KNOWN]
    if device.type == "cuda":
        found |= {f"{side} GB": peak / 1e9 for side, peak in peaks.items()}
        found |= {f"{side} days": days(name, rate) for side, rate in whole.rates.items()}
    return replace(whole, seconds={side: times[side] for side in (HERE, THERE)}, more=found)


def weights(model: nn.Module) -> int:
    """Bytes, of what is frozen too."""
    held = [model, *(part.module for part in model.modules() if isinstance(part, Frozen))]
    return sum(weight.nbytes for module in held for weight in module.parameters())


def taken(step: Work, device: torch.device) -> int:
    """Bytes that a step takes at its peak on a GPU, on top of what is there before."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def days(name: str, rate: float) -> float:
    """Of the paper's steps, at so many images a second on each of its GPUs."""
    steps, batch = PAPER[name]
    return steps * batch / (GPUS * rate) / 86_400
