"""What a training step keeps of its forward pass for the backward pass, in bytes, from shapes alone.

Counted is what autograd saves: the input of every matrix product with trained weights, queries, keys, values
and results of attention, the input of every norm and activation; of dropout one byte a number. Attention is
taken to be a fused kernel, which keeps no scores. Under autocast what a matrix product saves has two bytes, a
copy for each product; the input of a norm, and what goes from block to block, has four.

Shapes: B images, N tokens of width D_v, Q queries, T tokens of a text, P positions of width D, V words.
"""

from dataclasses import dataclass, replace
from math import ceil

from torch import nn

from blip.med import MEDConfig
from blip.model import Blip
from blip.vision import VisionConfig, VisionEncoder
from blip.vqa import BlipVQA
from qformer import Stage1, Stage2
from qformer.language import LanguageModel
from qformer.qformer import QFormerConfig

Model = Blip | BlipVQA | Stage1 | Stage2
WRITTEN_OUT = {"NewGELUActivation": 3}  # of transformers, not one kernel: what it keeps beside its input


@dataclass(frozen=True)
class Step:
    """What a process computes at once."""

    images: int  # B
    length: int  # T of the longest text; shorter ones are padded
    words: int  # of all texts, which LM learns
    bf16: bool = False  # autocast
    checkpointed: int = 0  # blocks of every stack whose activations are computed again
    wrong_texts: bool = False  # ITM has texts made wrong, see pipelines.contrasts

    @property
    def matrix(self) -> int:
        """Bytes of a number that a matrix product reads or writes."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept, and that one block needs more while it is computed again."""

    bytes: float = 0.0
    again: float = 0.0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.bytes + other.bytes, max(self.again, other.again))


def kept_by(model: Model, step: Step) -> dict[str, Kept]:
    """By part of the model, and "words" for the next-word logits with all that is as long as they are."""
    vision = model.config.vision
    found = {"vision": _vit(vision, step) if isinstance(model.vision, VisionEncoder) else Kept()}
    match model:
        case Blip():
            found["text"] = _med(model, step)
            if model.config.text.writes:
                found["words"] = _words(model.config.text, step)
        case BlipVQA():  # a question, and one answer to it
            memory = step.images * step.length
            reading = _seen(vision, model.config.text, step, 1) + _texts(
                model.config.text, step, 1, looks=True
            )
            writing = _projected(memory, model.config.text.width, model.config.text, step, 2)
            found["text"] = reading + writing + _texts(model.config.text, step, 1, looks=True)
            found["words"] = _words(model.config.text, step)
        case Stage1():
            found["qformer"] = _stage1(model, step)
            if model.config.qformer.writes:
                found["words"] = _words(model.config.qformer, step)
        case Stage2():
            qformer = model.config.qformer
            text = step.length if model.config.reads_question else 0
            found["qformer"] = _seen_by_queries(vision, qformer, step, 1) + _queries(qformer, step, 1, text)
            written = replace(step, length=2 * text) if text else step  # a question and its answer
            found["language"] = _language(model.language, qformer.queries, written)
    return found


# ---- blocks, bytes for one position ------------------------------------------------------------------


def _self_attention(width: int, dropout: float, step: Step) -> float:
    read = 3 * 2 if step.bf16 else 4  # by queries, keys and values
    return width * (read + 3 * step.matrix + step.matrix + 4 + bool(dropout))


def _cross_attention(width: int, dropout: float, step: Step) -> float:
    return width * (3 * step.matrix + 4 + bool(dropout))


def _mlp(width: int, hidden: int, dropout: float, step: Step) -> float:
    return width * (step.matrix + 4 + bool(dropout)) + 2 * hidden * step.matrix


def _stack(blocks: int, positions: float, width: int, each: float, step: Step) -> Kept:
    """Of `each` byte a position; of checkpointed blocks only what comes in."""
    again = min(step.checkpointed, blocks)
    kept = (blocks - again) * each + again * 4 * width
    return Kept(positions * kept, positions * each if again else 0.0)


def _vit(config: VisionConfig, step: Step) -> Kept:
    positions, hidden = step.images * config.tokens, config.hidden or 4 * config.width
    each = config.width * (2 * 4 + 6 * step.matrix) + 2 * hidden * step.matrix
    stem = 3 * config.image_size**2 * step.matrix
    for i, width in enumerate(config.stem, start=1):  # two convolutions, each with its norm and ReLU
        stem += 2 * width * (config.image_size // 2**i) ** 2 * 2 * step.matrix
    norms = (config.final_norm + config.pre_norm) * positions * config.width * 4
    return _stack(config.depth, positions, config.width, each, step) + Kept(step.images * stem + norms)


# ---- what texts and queries look at -----------------------------------------------------------------


def _projected(tokens: float, memory: int, text: MEDConfig | QFormerConfig, step: Step, copies: int) -> Kept:
    """`tokens` of width `memory` as keys and values of every block that looks, and chosen `copies` - 1 times
    for other texts."""
    blocks = _looking(text)
    read = blocks * 2 * 2 if step.bf16 else 4
    return Kept(tokens * (memory * read + blocks * 2 * text.width * step.matrix * copies))


def _looking(text: MEDConfig | QFormerConfig) -> int:
    return ceil(text.depth / text.cross_every) if isinstance(text, QFormerConfig) else text.depth


def _seen(vision: VisionConfig, text: MEDConfig | QFormerConfig, step: Step, copies: int) -> Kept:
    return _projected(step.images * vision.tokens, vision.width, text, step, copies)


def _seen_by_queries(vision: VisionConfig, qformer: QFormerConfig, step: Step, copies: int) -> Kept:
    """With the norm before them, whose input is the frozen encoder's result."""
    norm = Kept(step.images * vision.tokens * vision.width * 4)
    return _seen(vision, qformer, step, copies) + norm


# ---- texts and queries ------------------------------------------------------------------------------


def _texts(text: MEDConfig, step: Step, times: int, looks: bool) -> Kept:
    """`times` texts for each image."""
    positions = times * step.images * step.length
    each = _self_attention(text.width, text.dropout, step) + _mlp(text.width, text.hidden, text.dropout, step)
    if looks:
        each += _cross_attention(text.width, text.dropout, step)
    embedded = Kept(positions * text.width * (4 + bool(text.dropout)))
    return _stack(text.depth, positions, text.width, each, step) + embedded


def _med(model: Blip, step: Step) -> Kept:
    """ITC reads every text once, ITM three times or four, LM writes it once."""
    text, pairs = model.config.text, 3 + step.wrong_texts
    kept = _seen(model.config.vision, text, step, pairs - 1 if text.reads else 1)
    if text.reads:
        kept += _texts(text, step, 1, looks=False) + _texts(text, step, pairs, looks=True)
        kept += _similarities(model, step)
    return kept + _texts(text, step, 1, looks=True) if text.writes else kept


def _similarities(model: Blip, step: Step) -> Kept:
    """ITC with a queue: cosines, their log-softmax and targets, both ways, and the candidates themselves."""
    if model.teacher is None:
        return Kept()
    candidates = step.images + len(model.teacher.id_queue)
    each = 2 * step.matrix + 4
    return Kept(2 * candidates * (each * step.images + step.matrix * model.config.embed))


def _queries(qformer: QFormerConfig, step: Step, times: int, text: int) -> Kept:
    """Queries that look at an image, beside `text` tokens that they see."""
    rows, dropout = times * step.images, qformer.dropout
    both = qformer.queries + text
    attend = _self_attention(qformer.width, dropout, step) + _mlp(
        qformer.width, qformer.hidden, dropout, step
    )
    look = _cross_attention(qformer.width, dropout, step) * _looking(qformer) / qformer.depth
    each = attend + look * qformer.queries / both
    embedded = Kept(rows * both * qformer.width * (4 + bool(dropout)))
    return _stack(qformer.depth, rows * both, qformer.width, each, step) + embedded


def _stage1(model: Stage1, step: Step) -> Kept:
    """Queries look alone for ITC and ITG, and beside a text in ITM's three pairs or four."""
    qformer, pairs = model.config.qformer, 3 + step.wrong_texts
    text = MEDConfig(width=qformer.width, depth=qformer.depth, hidden=qformer.hidden, dropout=qformer.dropout)
    kept = _seen_by_queries(model.config.vision, qformer, step, pairs - 1) + _queries(qformer, step, 1, 0)
    kept += _queries(qformer, step, pairs, step.length) + _texts(text, step, 1, looks=False)
    if not qformer.writes:
        return kept
    again = step.images * qformer.queries * 2 * qformer.width * step.matrix  # keys and values beside a text's
    return kept + _texts(text, step, 1, looks=False) + Kept(qformer.depth * again)


def _words(text: MEDConfig | QFormerConfig, step: Step) -> Kept:
    """The LM head: dense, GELU and norm, then the likelihood of every word."""
    return Kept(step.words * (text.width * (3 * step.matrix + 4) + 4 * text.vocab_size))


# ---- a frozen language model ------------------------------------------------------------------------


def _language(language: LanguageModel, queries: int, step: Step) -> Kept:
    """The gradient of the soft prompt passes through every block, but no weight has one: no input is kept."""
    lm = language.lm.module
    size = language.lm.dtype.itemsize
    reads = set(lm.get_encoder().modules()) if lm.config.is_encoder_decoder else set()
    written = step.images * step.length
    ends = written + (written + step.images * queries if reads else step.images * queries)  # of both stacks
    kept = Kept(ends * language.width * size)
    for number, block in enumerate(language.blocks):
        positions = step.images * (step.length + (queries if block in reads or not reads else 0))
        again = number >= len(language.blocks) - step.checkpointed
        each = positions * _of_frozen(block, size)
        kept += Kept(positions * language.width * size, each) if again else Kept(each)
    return kept + Kept(written * 4 * lm.config.vocab_size)


def _of_frozen(block: nn.Module, size: int) -> float:
    """Bytes a position: what each linear layer gives, or something as large that was made of it.

    Who owns three or four of them, a gated MLP or an attention, keeps as much as the last of these reads.
    """
    kept = 0.0
    for part in block.modules():
        own = [layer for layer in part.children() if isinstance(layer, nn.Linear)]
        kept += size * sum(layer.out_features for layer in own)
        if len(own) > 2:
            kept += size * own[-1].in_features
        more = sum(WRITTEN_OUT.get(type(child).__name__, 0) for child in part.children())
        kept += size * more * own[0].out_features if own else 0.0
        gain = getattr(part, "weight", None)
        if gain is not None and gain.ndim == 1 and getattr(part, "bias", None) is None and size < 4:
            kept += 4 * len(gain)  # a norm of squares, computed in fp32
    return kept
