"""BERT word pieces plus [DEC] and [ENC], CLIP's byte pairs, and the papers' clean-up of captions.

The door of transformers.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

BERT_VOCABULARY = "bert-base-uncased"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")

_DROP = re.compile(r'([.!"()*#:;~])')


def clean_caption(text: str, max_words: int = 30) -> str:
    """Lower-case, drop .!"()*#:;~, collapse white space, keep `max_words` words.

    From `pre_caption` in salesforce/BLIP data/utils.py.
    """
    words = _DROP.sub(" ", text.lower()).split()
    return " ".join(words[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """As `clean_caption`, for questions: what is dropped leaves no space ("U.S." is "us"), "?" stays.

    From `pre_question` in salesforce/BLIP data/utils.py.
    """
    words = _DROP.sub("", text.lower()).split()
    return " ".join(words[:max_words])


class Tokenizer:
    """Captions <-> ids. Every text starts with [CLS]; the MED swaps that first id for [ENC] or [DEC].

    `source` is a folder that holds `tokenizer.json` or `vocab.txt`, or a Hugging Face name. For BERT's 30,522
    word pieces [DEC] becomes 30522 and [ENC] 30523, as in BLIP.
    """

    def __init__(self, source: str | Path = BERT_VOCABULARY):
        self._bert = _load(source)
        # BLIP's order: [DEC] first, so that the ids agree with every released checkpoint.
        self._bert.add_special_tokens({"bos_token": "[DEC]"})
        self._bert.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        special = ("[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]")
        self.pad, self.cls, self.sep, self.dec, self.enc = (self._id(token) for token in special)

    def __len__(self) -> int:
        return len(self._bert)

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """ids and mask [R, T] (1 = a real token), padded to the longest, cut at `max_length` tokens.

        A text is nothing but words: "[SEP]" in it becomes the words "[", "sep", "]".
        """
        return _encode(self._bert, texts, max_length)

    def prompt(self, text: str) -> Tensor:
        """[P] ids of a decoder prompt: [DEC] and the words, without the closing [SEP]."""
        words = self._bert(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return torch.tensor([self.dec, *words])

    def decode(self, ids: Tensor) -> list[str]:
        """[R, T] ids -> texts, up to the first [SEP], without special tokens."""
        texts = []
        for row in ids.tolist():
            row = row[: row.index(self.sep)] if self.sep in row else row
            texts.append(str(self._bert.decode(row, skip_special_tokens=True)))
        return texts

    def save(self, folder: str | Path) -> None:
        self._bert.save_pretrained(str(folder))

    def _id(self, token: str) -> int:
        found = self._bert.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found


class ClipTokenizer:
    """Texts -> ids of CLIP: <|startoftext|>, byte pairs in lower case, <|endoftext|>.

    `folder` holds what transformers' CLIPTokenizer wrote: `tokenizer.json`, or `vocab.json` and `merges.txt`.
    """

    def __init__(self, folder: str | Path):
        self._clip = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)

    @staticmethod
    def of(folder: Path) -> "ClipTokenizer | None":
        """None where the folder has none."""
        found = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return ClipTokenizer(folder) if found else None

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """As `Tokenizer`. A text that is cut keeps its end."""
        return _encode(self._clip, texts, max_length)


def _encode(
    tokenizer: BertTokenizer | CLIPTokenizer, texts: Sequence[str], max_length: int
) -> tuple[Tensor, Tensor]:
    encoded = tokenizer(
        list(texts), padding="longest", truncation=True, max_length=max_length, split_special_tokens=True
    )
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])


def write_vocabulary(words: Sequence[str], folder: str | Path) -> None:
    """Write a `vocab.txt` of BERT's special tokens and `words`, from which `Tokenizer(folder)` is built."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")


def _load(source: str | Path) -> BertTokenizer:
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    if not any((folder / name).exists() for name in VOCABULARY_FILES):
        raise ValueError(f"{folder} holds no vocabulary; expected {' or '.join(VOCABULARY_FILES)} in it")
    return BertTokenizer.from_pretrained(str(folder), local_files_only=True)


def _download(name: str) -> Path:
    """The files alone: without a network, `from_pretrained` would make up a vocabulary of seven words."""
    try:
        return Path(snapshot_download(name, allow_patterns=[*VOCABULARY_FILES, "tokenizer_config.json"]))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"the vocabulary {name!r} is no folder and cannot be had from the Hugging Face hub; "
            f"give a folder that holds {' or '.join(VOCABULARY_FILES)}"
        ) from error
