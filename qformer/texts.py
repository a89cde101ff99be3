"""Words <-> tensors for language models. Small, without weights: it goes to the workers that load data.

Texts come in two parts: what is `given` is read (a prompt, a question, the first words of a caption), what is
`wanted` is to be written.

    CausalTokenizer (OPT)               reads <s> given wanted \\n    labels: wanted \\n
    EncoderDecoderTokenizer (FlanT5)    reads given </s>             labels: wanted </s>

Shapes: B texts, T tokens of the longest that is read, U of the longest that is written.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from blip.model import IGNORED

MAX_LENGTH = 32  # tokens; LAVIS blip2_opt.py, blip2_t5.py `max_txt_len`


@dataclass(frozen=True)
class Texts:
    """What a language model reads after the soft prompt, and what it shall write."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 1 = a real token
    labels: Tensor  # [B, U], IGNORED = does not count; U = T for a causal model, the same tokens as in `ids`

    def to(self, device: torch.device) -> "Texts":
        return Texts(*(field.to(device, non_blocking=True) for field in vars(self).values()))


class TextTokenizer(Protocol):
    """Words <-> tensors, without the weights of the language model."""

    def __call__(self, given: Sequence[str], wanted: Sequence[str], max_length: int = MAX_LENGTH) -> Texts:
        """Texts of B pairs; no words are given where `given` is empty. Cut at `max_length` tokens."""

    def prompts(self, given: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T] of what is read before writing."""

    def decode(self, ids: Tensor) -> list[str]:
        """[B, U] ids -> texts, up to the end, without special tokens."""


class CausalTokenizer:
    """For models that write on. A line break is the end, as in LAVIS blip2_opt.py; `tokenizer` is
    transformers'."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        line_break = _ids(tokenizer, ["\n"])[0]
        if not line_break or line_break[-1] == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} has no token for a line break, which ends a "
                'caption; give a language model whose tokenizer has "\\n"'
            )
        self.end: int = line_break[-1]
        # Put there by hand: whether a tokenizer does it depends on its files and on transformers' version.
        self._start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def __call__(self, given: Sequence[str], wanted: Sequence[str], max_length: int = MAX_LENGTH) -> Texts:
        """Labels are the wanted tokens and the end; <s> is one too where nothing is given, as in LAVIS.

        A text that is cut loses its end, so that nobody learns to stop in mid-sentence.
        """
        pairs = zip(given, wanted, strict=True)
        whole = _ids(self._tokenizer, [f"{one.strip()} {_plain(two)}".strip() + "\n" for one, two in pairs])
        ids, mask = _pad([[*self._start, *row][:max_length] for row in whole], self.end)
        labels = ids.masked_fill(mask == 0, IGNORED)
        for i, opening in enumerate(_ids(self._tokenizer, [text.strip() for text in given])):
            if opening:
                labels[i, : len(self._start) + len(opening)] = IGNORED
        return Texts(ids, mask, labels)

    def prompts(self, given: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded on the left, where writing does not go on."""
        rows = [[*self._start, *row] for row in _ids(self._tokenizer, [text.strip() for text in given])]
        return _pad(rows, self.end, left=True)

    def decode(self, ids: Tensor) -> list[str]:
        return _decode(self._tokenizer, ids, self.end)

    def save(self, folder: str | Path, token: str) -> int:
        """Write transformers' files, with one special token more if it is new; the id of that token."""
        return _save(self._tokenizer, folder, token)


class EncoderDecoderTokenizer:
    """For models that read one text and write another, as in LAVIS blip2_t5.py."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if self.end is None or self.pad is None or self._rows([""], MAX_LENGTH)[0][-1:] != [self.end]:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} puts no end ({tokenizer.eos_token}) behind a "
                "text, or has no padding; give the tokenizer that an encoder-decoder came with"
            )

    def __call__(self, given: Sequence[str], wanted: Sequence[str], max_length: int = MAX_LENGTH) -> Texts:
        """Both halves are cut at `max_length` and keep their end."""
        assert len(given) == len(wanted), f"{len(given)} given texts for {len(wanted)} wanted ones"
        ids, mask = _pad(self._rows([text.strip() for text in given], max_length), self.pad)
        labels, _ = _pad(self._rows([_plain(text) for text in wanted], max_length), IGNORED)
        return Texts(ids, mask, labels)

    def prompts(self, given: Sequence[str]) -> tuple[Tensor, Tensor]:
        return _pad(self._rows([text.strip() for text in given], None), self.pad)

    def decode(self, ids: Tensor) -> list[str]:
        return _decode(self._tokenizer, ids, self.end)

    def save(self, folder: str | Path, token: str) -> int:
        """Write transformers' files, with one special token more if it is new; the id of that token."""
        return _save(self._tokenizer, folder, token)

    def _rows(self, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
        return _ids(
            self._tokenizer,
            texts,
            add_special_tokens=True,
            truncation=max_length is not None,
            max_length=max_length,
        )


def split_prefix(text: str, chance: float) -> tuple[str, str]:
    """A caption as (given, wanted) for prefix language modelling, which BLIP-2 trains encoder-decoders with.

    The authors: "randomly sample a split point from position 1 to the midpoint of the sequence" (LAVIS issue
    139; the code was not published). Positions are words here, so that none is torn and no tokenizer is
    needed. `chance`, uniform in [0, 1), is the caller's: the same number splits the same text alike. Nothing
    is given of a text of one word.
    """
    words = text.split()
    place = 1 + int(chance * (len(words) // 2)) if len(words) > 1 else 0
    return " ".join(words[:place]), " ".join(words[place:])


def _ids(tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[list[int]]:
    """A text is nothing but words: "</s>" in it becomes the pieces of which it is spelt."""
    settings = {"add_special_tokens": False, "split_special_tokens": True} | settings
    found: list[list[int]] = tokenizer(list(texts), **settings)["input_ids"]
    return found


def _plain(text: str) -> str:
    """In one line, since a line break is an end."""
    return " ".join(text.split())


def _pad(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids and mask [B, T]."""
    most = max(map(len, rows), default=0)
    ids = torch.full((len(rows), most), fill)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(most - len(row), most) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _decode(tokenizer: Any, ids: Tensor, end: int) -> list[str]:
    rows = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]


def _save(tokenizer: Any, folder: str | Path, token: str) -> int:
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([token], special_tokens=True)
    extended.save_pretrained(str(folder))
    return int(extended.convert_tokens_to_ids(token))
