"""Pre-train a tiny language model on texts of the generated world, without a picture, for stage 2 to freeze.

Its texts are captions, and captions with a question about them and its answer: what a soft prompt that stands
for the caption will be asked. OUT becomes a folder of transformers, weights and tokenizer, as a downloaded
OPT or FlanT5 is one.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blip.model import IGNORED
from pipelines.config import parse_args, run_main, save_config
from pipelines.optim import OptimConfig, lr_at, make_optimizer
from pipelines.world import WorldConfig, make_scene
from pipelines.world_captions import brief_captions, captions
from pipelines.world_questions import ask
from qformer.stage2 import QUESTION
from qformer.texts import EncoderDecoderTokenizer, split_prefix

IMAGE_TOKEN = "<image>"  # so that `export_hf` of a stage 2 finds a row for it
BOS = "</s>"  # OPT's: begins and ends alike
ASKED = ("what colour is", "what shape is")  # what brief captions tell
NEIGHBOUR = 12.0  # logits by which a head prefers a neighbour
SPARE = 8  # rows of the word embedding that no token has


@dataclass(frozen=True)
class OPTShape:
    """A causal language model."""

    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    ffn_dim: int = 512
    max_position_embeddings: int = 128


@dataclass(frozen=True)
class T5Shape:
    """An encoder-decoder language model, gated as FlanT5."""

    d_model: int = 128
    num_layers: int = 2
    num_heads: int = 4
    d_kv: int = 32
    d_ff: int = 256

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise ValueError(
                f"num_heads is {self.num_heads}; a tiny FlanT5 needs two, to see both neighbours"
            )


@dataclass(frozen=True)
class LanguageRun:
    out: str
    opt: OPTShape | None = None
    t5: T5Shape | None = None  # or
    world: WorldConfig = field(default_factory=WorldConfig)
    scenes: int = 20_000  # of which the texts tell
    vocabulary: int = 512  # tokens at most; every word is one, as a common word is in OPT and FlanT5
    steps: int = 1500
    batch_size: int = 64
    length: int = 64  # tokens of a causal model's row; more than a soft prompt and a text have
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.opt is None) == (self.t5 is None):
            raise ValueError("give either opt or t5, the shape of the language model")


@dataclass(frozen=True)
class Page:
    """What is written about one scene, so that a reader can tell the rest from the beginning."""

    told: tuple[str, ...]  # captions, each of which is enough to answer what is asked
    asked: tuple[tuple[str, str], ...]  # questions and answers


def world_pages(config: WorldConfig, scenes: int, seed: int) -> list[Page]:
    """A page of each scene: two brief captions and a detailed one, in any order, and two questions."""
    found = []
    for number in range(scenes):
        rng = np.random.default_rng([seed, number])
        scene = make_scene(config, rng)
        told = [*brief_captions(scene, rng, 2), *captions(scene, rng, 1)]
        asked = [(q, max(a, key=a.__getitem__)) for q, a in ask(scene, config.palette(), rng)]
        asked = [pair for pair in asked if pair[0].startswith(ASKED)]
        order, chosen = rng.permutation(len(told)), rng.permutation(len(asked))[:2]
        found.append(Page(tuple(told[i] for i in order), tuple(asked[i] for i in chosen)))
    return found


def lines_of(page: Page, rng: random.Random) -> list[str]:
    """A caption, and then the rest in any order."""
    first, *others = page.told
    others += [f"{QUESTION.format(question)} {answer}" for question, answer in page.asked]
    return [first, *rng.sample(others, len(others))]


def world_texts(config: WorldConfig, scenes: int, seed: int) -> list[str]:
    """All lines of the pages."""
    return [
        line for page in world_pages(config, scenes, seed) for line in lines_of(page, random.Random(seed))
    ]


# ---- a causal model, as OPT ----------------------------------------------------------------------


def opt_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a space belongs to the word behind it, a line break is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def new_opt(shape: OPTShape, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    config = OPTConfig(
        **asdict(shape),
        word_embed_proj_dim=shape.hidden_size,
        vocab_size=len(tokenizer) + SPARE,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        init_std=0.02 * (768 / shape.hidden_size) ** 0.5,  # OPT's belongs to its width
    )
    return OPTForCausalLM(config)


def opt_batches(
    run: LanguageRun, pages: list[Page], tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, Tensor]]:
    """Pages, each line from <s> to its break as stage 2 will give it behind a soft prompt; for ever."""
    rng = random.Random(run.seed)
    while True:
        drawn = rng.choices(pages, k=run.batch_size)
        rows = [f"{BOS}" + f"\n{BOS}".join(lines_of(page, rng)) + "\n" for page in drawn]
        found = tokenizer(rows, padding=True, truncation=True, max_length=run.length, return_tensors="pt")
        labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORED)
        yield {**found, "labels": labels}


# ---- an encoder-decoder, as FlanT5 ---------------------------------------------------------------


def t5_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Pieces with a mark for spaces, and </s> behind every text.

    FlanT5's are chosen by a unigram model, but of a hundred different words it would leave most in letters.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", special.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def new_t5(shape: T5Shape, tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    config = T5Config(
        **asdict(shape),
        vocab_size=len(tokenizer) + SPARE,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    lm = T5ForConditionalGeneration(config)
    # FlanT5 writes by a matrix of its own; transformers begins with the word embedding, and too large.
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.detach() * shape.d_model**-0.5)
    see_neighbours(lm)
    return lm


@torch.no_grad()
def see_neighbours(lm: T5ForConditionalGeneration) -> None:
    """Lets one head of all blocks look at the word before, and in the encoder another at the word behind.

    A T5 knows places by relative biases alone. They begin near zero and grow by a step of Adam at a time: in
    minutes of training no head finds its neighbour, and which colour belongs to which shape stays a guess.
    """
    before, behind = 1, lm.config.relative_attention_num_buckets // 2 + 1  # T5's numbers of these distances
    encoder, decoder = (
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
        for stack in (lm.encoder, lm.decoder)
    )
    encoder[before, 0] = encoder[behind, 1] = decoder[before, 0] = NEIGHBOUR


def t5_batches(
    run: LanguageRun, pages: list[Page], tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, Tensor]]:
    """Captions to read; to write another, or what is left of it, or an answer. For ever."""
    rng, words = random.Random(run.seed), EncoderDecoderTokenizer(tokenizer)
    while True:
        pairs = []
        for page in rng.choices(pages, k=run.batch_size):
            known, other, *_ = rng.sample(page.told, 2)
            if rng.random() < 0.5:
                question, answer = rng.choice(page.asked)
                pairs.append((f"{known} {QUESTION.format(question)}", answer))
            else:
                begun, rest = split_prefix(other, rng.random()) if rng.random() < 0.5 else ("", other)
                pairs.append((f"{known} {begun}", rest))
        given, wanted = zip(*pairs, strict=True)
        found = words(given, wanted, run.length)
        yield {"input_ids": found.ids, "attention_mask": found.mask, "labels": found.labels}


# ---- both ----------------------------------------------------------------------------------------


def pretrain(run: LanguageRun, lm: PreTrainedModel, batches: Iterator[dict[str, Tensor]]) -> None:
    """Plain next-word training; minutes, so a stopped run begins again."""
    optimizer = make_optimizer(lm, run.optim)
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run.optim, step, run.steps, run.steps)
        loss = lm(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), run.optim.grad_clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == run.steps:
            print(f"step {step + 1}/{run.steps} | lm {loss.item():.3f}", flush=True)


def main(argv: list[str]) -> int:
    run = parse_args(argv, LanguageRun)
    torch.manual_seed(run.seed)
    pages = world_pages(run.world, run.scenes, run.seed)
    texts = [line for page in pages for line in lines_of(page, random.Random(run.seed))]
    if run.opt is not None:
        tokenizer = opt_tokenizer(texts, run.vocabulary)
        lm: PreTrainedModel = new_opt(run.opt, tokenizer)
        batches = opt_batches(run, pages, tokenizer)
    else:
        tokenizer = t5_tokenizer(texts, run.vocabulary)
        lm = new_t5(run.t5 or T5Shape(), tokenizer)
        batches = t5_batches(run, pages, tokenizer)
    print(f"{lm.num_parameters() / 1e6:.1f}M parameters, {len(texts)} texts, {len(tokenizer)} tokens")
    pretrain(run, lm.train(), batches)
    save_config(run, Path(run.out))
    lm.save_pretrained(run.out)
    tokenizer.save_pretrained(run.out)
    print(f"saved {run.out}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
