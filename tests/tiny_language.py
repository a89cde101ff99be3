"""Tiny real language models with random weights and tokenizers of their own, as folders of transformers."""

import string
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

OPT_PAD, OPT_BOS, OPT_IMAGE = range(3)
T5_PAD, T5_END, T5_UNKNOWN, T5_IMAGE = range(4)
SENTENCE = "a an the of cat dog bird red green blue big small photo question answer what is on left right"
SPACE, LINE_BREAK = "\u0120", "\u010a"  # as byte-level BPE spells them
WIDTH = 32  # of both
M = TypeVar("M", bound=transformers.PreTrainedModel)

SPARE = 8  # rows of the word embedding that no token has, as in the released models


@cache
def opt_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as OPT's: a space belongs to the word behind it, a line break is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=130,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *"AQ?:'.</>", SPACE, LINE_BREAK],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


@cache
def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Unigram pieces with a mark for spaces and </s> behind every text, as T5's."""
    special = ["<pad>", "</s>", "<unk>", "<image>"]
    letters = list(string.ascii_lowercase + string.digits + "?:'")
    pieces = [(piece, 0.0) for piece in special] + [("\u2581", -3.0)]
    pieces += [("\u2581" + word, -4.0) for word in SENTENCE.split() if len(word) > 1]
    pieces += [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=T5_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", T5_END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def opt_config() -> transformers.OPTConfig:
    tokenizer = opt_tokenizer()
    return transformers.OPTConfig(
        vocab_size=len(tokenizer) + SPARE,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=96,
        pad_token_id=OPT_PAD,
        bos_token_id=OPT_BOS,
        eos_token_id=tokenizer("\n", add_special_tokens=False)["input_ids"][0],
    )


def t5_config(dense_act_fn: str = "gelu") -> transformers.T5Config:
    """As FlanT5: gated, its LM head not the word embedding. LAVIS computes it with "gelu"."""
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()) + SPARE,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=T5_PAD,
        bos_token_id=T5_END,
        eos_token_id=T5_END,
        decoder_start_token_id=T5_PAD,
    )
    config.dense_act_fn = dense_act_fn
    return config


def tiny_opt(seed: int = 0) -> transformers.OPTForCausalLM:
    return _lively(transformers.OPTForCausalLM(opt_config()), seed, gain=3)


def tiny_t5(seed: int = 0, dense_act_fn: str = "gelu") -> transformers.T5ForConditionalGeneration:
    return _lively(transformers.T5ForConditionalGeneration(t5_config(dense_act_fn)), seed, gain=2)


def opt_folder(folder: Path, seed: int = 0) -> Path:
    tiny_opt(seed).save_pretrained(folder)
    opt_tokenizer().save_pretrained(folder)
    return folder


def t5_folder(folder: Path, seed: int = 0, dense_act_fn: str = "gelu_new") -> Path:
    """As on the hub: "gelu_new", the gate that FlanT5 itself has."""
    tiny_t5(seed, dense_act_fn).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


def prefix(images: int, positions: int = 4, seed: int = 0) -> torch.Tensor:
    """A soft prompt [B, P, D] of noise."""
    return torch.randn(images, positions, WIDTH, generator=torch.Generator().manual_seed(seed))


def _lively(model: M, seed: int, gain: float) -> M:
    """In eval mode, with weights that make it write texts of many words and lengths about its soft prompt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, gain * weight.size(1) ** -0.5, generator=generator)
            elif not name.endswith("norm.weight"):
                weight.normal_(0, 0.1, generator=generator)
        model.get_input_embeddings().weight.mul_(0.3)  # or a word would be followed by itself
    return model.eval()
