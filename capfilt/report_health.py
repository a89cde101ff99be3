"""Is the captioner generic? Lengths, repeats and beginnings of captions, beside those of the web's texts."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_WORDS = 30  # the last bin of the length histogram holds all longer texts
_SHOWN = 10  # captions and beginnings that are listed


@dataclass(frozen=True)
class Health:
    """What texts look like as texts. All counts are of `texts`."""

    texts: int
    unique: int  # different texts, whatever their case and punctuation
    lengths: tuple[int, ...]  # texts of 0, 1, ..., MAX_WORDS or more words
    mean_words: float
    words: int  # different words
    distinct_pairs: float  # different pairs of neighbouring words, as a share of all such pairs
    echoed: int  # texts that say a word twice in a row, or the same three words twice
    prompted: int  # texts that begin with the prompt
    frequent: tuple[tuple[str, int], ...]  # texts that are there more than once
    beginnings: tuple[tuple[str, int], ...]  # the first three words


def health(texts: Sequence[str], prompt: str = "") -> Health:
    """Look at `texts`; blank ones are not counted. `prompt` is what the captioner was told to begin with."""
    split = [(text, words) for text in texts if (words := re.findall(r"\w+(?:['\u2019]\w+)*", text.lower()))]
    said = Counter(" ".join(words) for _, words in split)
    lengths = Counter(min(len(words), MAX_WORDS) for _, words in split)
    pairs = Counter(pair for _, words in split for pair in pairwise(words))
    start = " ".join(prompt.lower().split())
    return Health(
        texts=len(split),
        unique=len(said),
        lengths=tuple(lengths[n] for n in range(MAX_WORDS + 1)),
        mean_words=sum(len(words) for _, words in split) / max(1, len(split)),
        words=len({word for _, words in split for word in words}),
        distinct_pairs=len(pairs) / max(1, pairs.total()),
        echoed=sum(_echoes(words) for _, words in split),
        prompted=sum(bool(start) and " ".join(text.lower().split()).startswith(start) for text, _ in split),
        frequent=_most([(text, n) for text, n in said.items() if n > 1]),
        beginnings=_most(list(Counter(" ".join(words[:3]) for _, words in split).items())),
    )


def _echoes(words: Sequence[str]) -> bool:
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return any(a == b for a, b in pairwise(words)) or len(set(threes)) < len(threes)


def _most(counts: list[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:_SHOWN])
