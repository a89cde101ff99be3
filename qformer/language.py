"""Frozen language models of transformers behind two methods: loss(prefix, texts), generate(prefix, prompts).

The only file of qformer/ that knows transformers. In `texts` words become tensors: what is given is read
after the soft prompt, what is wanted is to be written.

    CausalLM (OPT)               [soft prompt; <s> given] is written on: wanted \\n
    EncoderDecoderLM (FlanT5)    [soft prompt; given </s>] is read, then written: wanted </s>

Shapes: B images, P positions of the soft prompt, T of the longest text that is read, U of the longest that is
written, D width of the words, V words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from blip.checkpoint import check_names
from blip.generate import Decoding, sample, signed, uniform
from blip.layers import at_least_fp32
from blip.model import IGNORED
from blip.weights_files import locate, read_tensors
from qformer.frozen import Frozen
from qformer.texts import CausalTokenizer, EncoderDecoderTokenizer, Texts, TextTokenizer

CAPTION = Decoding(beams=5, min_length=8, max_length=30)  # LAVIS caption_coco_ft.yaml
ANSWER = Decoding(beams=5, min_length=1, max_length=10, length_penalty=-1.0)  # BLIP-2 section 4.2
TOKENIZER_FILES = ("tokenizer.json", "merges.txt", "spiece.model", "tokenizer.model", "vocab.txt")
BLIP2_PREFIX = "language_model."  # of the language model's weights in transformers' BLIP-2


class LanguageModel(Protocol):
    """A frozen language model. It is also an nn.Module."""

    @property
    def width(self) -> int:
        """D of the soft prompt."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def lm(self) -> Frozen[Any]:
        """What is frozen."""

    @property
    def blocks(self) -> list[nn.Module]:
        """Of `lm`, in the order in which they compute, an encoder's first: what memory can be saved by."""

    def logits(self, prefix: Tensor, texts: Texts) -> Tensor:
        """Soft prompt [B, P, D] -> next-word logits [B, U, V], each of its label's."""

    def loss(self, prefix: Tensor, texts: Texts) -> Tensor:
        """Mean cross-entropy of the labels that count, in nats a token, without smoothing as in LAVIS."""

    def generate(
        self,
        prefix: Tensor,
        prompts: Sequence[str],
        decoding: Decoding = CAPTION,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """One text for each soft prompt [B, P, D], its prompt not repeated.

        Lengths of `decoding` count what is written, the end included; so does the repetition penalty.
        `seeds`, one per image, are for nucleus: a text depends on its own image, prompt and seed only.
        """


class CausalLM(nn.Module):
    """A causal language model, such as OPT."""

    def __init__(self, lm: PreTrainedModel, tokenizer: CausalTokenizer):
        super().__init__()
        self.lm, self.tokenizer = Frozen(lm), tokenizer

    @property
    def width(self) -> int:
        return _width(self.lm.module)

    @property
    def blocks(self) -> list[nn.Module]:
        return _blocks(self.lm.module)

    def logits(self, prefix: Tensor, texts: Texts) -> Tensor:
        """The logits of a token are those of the position before it; the first one's is the last query."""
        with _own_precision(prefix):
            read = _read(self.lm.module, prefix, texts.ids, texts.mask)
            out = self.lm.module(**read, logits_to_keep=texts.ids.size(1) + 1, use_cache=False)
        return out.logits[:, :-1]  # [B, T, V]

    def loss(self, prefix: Tensor, texts: Texts) -> Tensor:
        return _cross_entropy(self.logits(prefix, texts), texts.labels)

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        prompts: Sequence[str],
        decoding: Decoding = CAPTION,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Pads lie between soft prompt and prompt, as in LAVIS: so every position has some to attend to."""
        end = self.tokenizer.end
        settings = _settings(decoding, seeds, prefix) | {"eos_token_id": end, "pad_token_id": end}
        with _own_precision(prefix):
            read = _read(self.lm.module, prefix, *self.tokenizer.prompts(prompts))
            return self.tokenizer.decode(self.lm.module.generate(**read, **settings))


class EncoderDecoderLM(nn.Module):
    """An encoder-decoder language model, such as FlanT5. Its encoder reads the soft prompt."""

    def __init__(self, lm: PreTrainedModel, tokenizer: EncoderDecoderTokenizer):
        super().__init__()
        self.lm, self.tokenizer = Frozen(lm), tokenizer

    @property
    def width(self) -> int:
        return _width(self.lm.module)

    @property
    def blocks(self) -> list[nn.Module]:
        return _blocks(self.lm.module)

    def logits(self, prefix: Tensor, texts: Texts) -> Tensor:
        written = self.lm.module.prepare_decoder_input_ids_from_labels(texts.labels)
        with _own_precision(prefix):
            read = _read(self.lm.module, prefix, texts.ids, texts.mask)
            logits: Tensor = self.lm.module(**read, decoder_input_ids=written, use_cache=False).logits
        return logits  # [B, U, V]

    def loss(self, prefix: Tensor, texts: Texts) -> Tensor:
        return _cross_entropy(self.logits(prefix, texts), texts.labels)

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        prompts: Sequence[str],
        decoding: Decoding = CAPTION,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        settings = _settings(decoding, seeds, prefix) | {"eos_token_id": self.tokenizer.end}
        with _own_precision(prefix):
            read = _read(self.lm.module, prefix, *self.tokenizer.prompts(prompts))
            return self.tokenizer.decode(self.lm.module.generate(**read, **settings))


def load_language(
    source: str | Path, dtype: torch.dtype = torch.bfloat16, dense_act_fn: str | None = None
) -> CausalLM | EncoderDecoderLM:
    """The language model of a folder or of a name on the Hugging Face hub, frozen, with its tokenizer.

    source: any causal or encoder-decoder model of transformers, e.g. facebook/opt-2.7b, google/flan-t5-xl; or
    transformers' BLIP-2, whose language model is taken.
    dtype: of its weights and of what it computes. The paper has float16 for OPT, in which small gradients are
    lost unless the loss is scaled, and bfloat16 for FlanT5.
    dense_act_fn: "gelu" for FlanT5 beside weights of LAVIS, which computed it with "gelu" where FlanT5 has
    "gelu_new" (LAVIS blip2_t5.py); transformers' BLIP-2 folders say so themselves.
    Raises ValueError where it is missing, damaged, has no tokenizer, or is neither kind.
    """
    folder = locate(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{source} holds no tokenizer of a language model; expected {' or '.join(TOKENIZER_FILES)} in it"
        )
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source} cannot be read as a language model: {error}") from error
    of_blip2 = config.model_type == "blip-2"
    if of_blip2:
        config = config.text_config
    if dense_act_fn is not None:
        if not hasattr(config, "dense_act_fn"):
            raise ValueError(f"{source} is a {config.model_type}, which has no dense_act_fn; leave it out")
        config.dense_act_fn = dense_act_fn
    if not of_blip2:
        return _with_tokenizer(_load(str(folder), config, str(source), dtype), tokenizer)
    tensors = {k: v for k, v in read_tensors(folder).items() if k.startswith(BLIP2_PREFIX)}
    theirs = {name.removeprefix(BLIP2_PREFIX): tensor for name, tensor in tensors.items()}
    return _with_tokenizer(_load(None, config, str(source), dtype, theirs), tokenizer)


class _Draw(LogitsProcessor):
    """Nucleus sampling for a greedy loop: of each row, only the word that its own seed draws stays possible.

    transformers draws all rows from the one global generator, so that a text would depend on its neighbours.
    """

    def __init__(self, decoding: Decoding, seeds: Tensor):
        self.decoding, self.seeds = decoding, seeds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chances = uniform(self.seeds, input_ids.size(1))  # a number of its own for every step
        assert self.decoding.top_p is not None
        words = sample(scores.float(), self.decoding.top_p, self.decoding.top_k, chances)
        return torch.full_like(scores, -torch.inf).scatter(-1, words[:, None], 0.0)


def _settings(decoding: Decoding, seeds: Sequence[int] | None, prefix: Tensor) -> dict[str, Any]:
    """Of transformers' generate; what an LM's own generation_config.json says about them does not count."""
    if decoding.top_p is not None and (seeds is None or len(seeds) != len(prefix)):
        given = "no" if seeds is None else len(seeds)
        raise ValueError(f"nucleus sampling for {len(prefix)} images has {given} seeds; give one per image")
    settings = {
        "num_beams": decoding.beams,
        "do_sample": False,
        "max_new_tokens": decoding.max_length,
        "min_new_tokens": decoding.min_length,
        "length_penalty": decoding.length_penalty,
        "repetition_penalty": decoding.repetition_penalty,
        "early_stopping": False,
    }
    if decoding.top_p is None or seeds is None:
        return settings
    numbers = torch.tensor([signed(seed) for seed in seeds], device=prefix.device)
    return settings | {"logits_processor": LogitsProcessorList([_Draw(decoding, numbers)])}


def _own_precision(x: Tensor) -> torch.autocast:
    """A frozen module computes in the dtype it has, whatever autocast says."""
    return torch.autocast(x.device.type, enabled=False)


def _read(lm: PreTrainedModel, prefix: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The soft prompt [B, P, D], then the words [B, T], as a language model takes them."""
    if len(prefix) != len(ids):
        raise ValueError(f"there are {len(ids)} texts for {len(prefix)} images; give one for each")
    words = lm.get_input_embeddings()(ids.to(prefix.device))  # [B, T, D]
    seen = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
    return {
        "inputs_embeds": torch.cat([prefix.to(words.dtype), words], 1),  # [B, P + T, D]
        "attention_mask": torch.cat([seen, mask.to(prefix.device)], 1),
    }


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, U, V] and [B, U] -> mean over the labels that count, 0 where none does."""
    wrong = F.cross_entropy(
        at_least_fp32(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return wrong / (labels != IGNORED).sum().clamp(min=1)


def _width(lm: PreTrainedModel) -> int:
    """Of the words, where the soft prompt comes in; OPT-350m is wider inside."""
    width: int = lm.get_input_embeddings().embedding_dim
    return width


def _blocks(lm: PreTrainedModel) -> list[nn.Module]:
    return [part for part in lm.modules() if isinstance(part, GradientCheckpointingLayer)]


def _load(
    folder: str | None,
    config: PreTrainedConfig,
    source: str,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The language model of a folder, or of these weights, all of which must be its."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    settings = {"config": config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        if tensors is not None:
            with torch.device("meta"):
                kind = type(kind.from_config(config))  # from_pretrained of the auto classes wants a folder
            settings["state_dict"] = dict(tensors)
        lm, found = kind.from_pretrained(folder, **settings)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the language model of {source} cannot be loaded: {error}") from error
    # What a folder of its own holds besides is between it and transformers, which knows old names.
    unexpected = found["unexpected_keys"] if tensors is not None else ()
    check_names(source, found["missing_keys"], unexpected, [str(name) for name in found["mismatched_keys"]])
    return lm


def _with_tokenizer(lm: PreTrainedModel, tokenizer: Any) -> CausalLM | EncoderDecoderLM:
    rows = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens and its language model "
            f"{rows}; they do not belong together"
        )
    if lm.config.is_encoder_decoder:
        return EncoderDecoderLM(lm, EncoderDecoderTokenizer(tokenizer))
    return CausalLM(lm, CausalTokenizer(tokenizer))
