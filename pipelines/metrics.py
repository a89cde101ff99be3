"""Caption metrics without Java: BLEU-1..4, ROUGE-L and CIDEr-D with the numbers of coco-caption.

coco-caption (github.com/tylin/coco-caption, as a package pycocoevalcap) is what published numbers are made
with. Its scorers are followed here to the last rule, also where a rule is odd; its tokenizer, a Java program,
by one regular expression.

A corpus is `hypotheses` {id: caption} and `references` {id: [caption, ...]}, both raw text. Every metric
gives (score of the corpus, {id: score}) in the order of `hypotheses`, and ValueError for a corpus that
`check_ids` refuses. In formulas h is a hypothesis, r one of its R references, |s| a number of words.
"""

import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Id = TypeVar("Id", bound=Hashable)
Words = list[str]
Gram = tuple[str, ...]
Bleu = tuple[float, float, float, float]  # BLEU-1, BLEU-2, BLEU-3, BLEU-4

TOKENIZER = "python-ptb/1"  # to be written beside every score: without a tokenizer CIDEr-D falls by a third
MAX_GRAM = 4  # words
ROUGE_BETA = 1.2  # how much more recall weighs than precision
CIDER_SIGMA = 6.0  # words of difference in length
SHOWN_IDS = 10  # in an error

# ---- the tokenizer -------------------------------------------------------------------------------

# Accents that are characters of their own, vowel signs of Indian scripts: part of a word, but not in \w.
_MARKS = "".join(char for char in map(chr, range(0x10000)) if unicodedata.category(char).startswith("M"))
_WORD = rf"[\w{_MARKS}]+"
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)\S*[\w/]
  | -[lr][crs]b-                                          # a bracket in its Penn Treebank spelling
  | [@\#][a-z]\w*                                         # @user #tag
  | [a-z](?:\.[a-z])+(?![a-z])\.?                         # u.s. p.m. t.v
  | (?:mrs?|ms|dr|prof|st|mt|ave|blvd|rd|jr|sr|inc|co|corp|ltd|vs|etc|gen|sen|rep|gov|lt|col|capt|sgt|rev
      |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.(?!\w)
  | [a-z]\.(?=\s+\S)                                      # an initial, but not the last word
  | (?:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))(?!\w+-)
  | [a-z]+?(?=n't(?!\w)) | n't(?!\w)                      # do n't
  | '(?:(?:s|m|d|ll|re|ve|em)(?!\w)|n'|[2-9]0s)           # dog 's, rock 'n' roll, the '70s
  | [a-hj-xz]'[a-z][a-z]+                                 # o'clock
  | [-+]?(?:\d+(?:[.,:]\d+)+|\.\d+)                       # 1,000 10:30 .5
  | (?<![-\w])[-+]\d+(?!\w)                               # -5
  | (?-i:[A-Z]+(?:&[A-Z]+)+)                              # AT&T
  | {_WORD}(?:(?:[-/]|(?<=[^\W\d_])\.(?=[^\W\d_])){_WORD})*   # wi-fi and/or end.Start
  | [!?]+
  | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Upper case in coco-caption, and so never the lower-case tokens that its tokenizer writes: brackets stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset(".,:;?!-'`\"")
_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos|nbsp);")
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")  # two characters in Java, neither of which is a letter
_CLEAN: dict[int, str | None] = {
    **{code: " " for code in range(0x10000) if unicodedata.category(chr(code)) in ("Cc", "Cf")},
    **dict.fromkeys(b"\t\n\r", " "),
    0xAD: None,  # a soft hyphen
    **dict.fromkeys((0x2018, 0x2019, 0x201B), "'"),
    **dict.fromkeys((0x201C, 0x201D, 0x201E, 0xAB, 0xBB), '"'),
    0x2011: "-",  # a hyphen without a line break
    **dict.fromkeys((0x2013, 0x2014, 0x2026), " "),  # dashes and the ellipsis, which would be dropped
}


def tokenize(text: str) -> Words:
    """A caption's words in lower case, without punctuation: coco-caption's PTBTokenizer in Python.

    That is Stanford's Penn Treebank tokenizer (CoreNLP 3.4.1, -lowerCase), then a list of punctuation that is
    dropped. This one gave the same words for each of 32,000 captions: people's of Abstract Scenes and
    Flickr8k, machines' for COCO, PASCAL and Abstract Scenes, some alt texts. It is known to differ on
    smileys, HTML tags, e-mail addresses, telephone numbers, `_`, runs of `*` or `#`, rare abbreviations and
    clipped words (`no. 5`, `'twas`), and on signs that the original renames (a pound sign to `#`, one half to
    `1/2`).
    """
    text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
    tokens = _TOKEN.findall(_ASTRAL.sub(" ", text).translate(_CLEAN))
    return [_BRACKETS.get(token, token.lower()) for token in tokens if token not in _DROPPED]


# ---- the corpus ----------------------------------------------------------------------------------


def check_ids(hypotheses: Collection[Id], references: Mapping[Id, Sequence[str]]) -> None:
    """Errors: ValueError that lists the ids which lack a hypothesis or a reference; also for no ids at all.

    To score what happens to be there is the classic error: a corpus of easier images, no sign of it.
    """
    if not hypotheses and not references:
        raise ValueError("hypotheses and references are empty; there must be at least one id in both")
    for key, texts in references.items():
        if isinstance(texts, str):  # would be taken for references of one letter each
            raise ValueError(f"references[{key!r}] is a text, expected a list of texts; put it into a list")
    lacking = {
        "no hypothesis": [key for key in references if key not in hypotheses],
        "no references": [key for key in hypotheses if key not in references],
        "an empty list of references": [key for key, texts in references.items() if not texts],
    }
    found = [f"{len(keys)} with {what} ({_shown(keys)})" for what, keys in lacking.items() if keys]
    if found:
        raise ValueError(
            f"among the ids of hypotheses and references are {', '.join(found)}; "
            "every id needs one hypothesis and at least one reference: add them, or drop the id from both"
        )


def _shown(keys: Sequence[Id]) -> str:
    shown = ", ".join(map(repr, keys[:SHOWN_IDS]))
    return shown if len(keys) <= SHOWN_IDS else f"{shown} and {len(keys) - SHOWN_IDS} more"


def _corpus(
    hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> dict[Id, tuple[Words, list[Words]]]:
    check_ids(hypotheses, references)
    return {key: (tokenize(text), list(map(tokenize, references[key]))) for key, text in hypotheses.items()}


def _grams(words: Words, n: int) -> Counter[Gram]:
    """The n-grams of a caption with how often each occurs."""
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _with_mean(scores: dict[Id, float]) -> tuple[float, dict[Id, float]]:
    return math.fsum(scores.values()) / len(scores), scores


# ---- BLEU ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matches:
    """What BLEU counts in one caption, or summed over many."""

    length: int  # words
    closest: int  # words of the reference that is closest in length; of two, the shorter
    guessed: tuple[int, ...]  # n-grams, for n = 1..4
    correct: tuple[int, ...]  # those in a reference, each at most as often as in one reference


def bleu(hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> tuple[Bleu, dict[Id, Bleu]]:
    """(BLEU-1..4 of the corpus, {id: BLEU-1..4}), each four numbers in [0, 1].

    p_n = correct n-grams / guessed n-grams
    BLEU-N = min(1, exp(1 - |closest r| / |h|)) * (p_1 * ... * p_N) ** (1 / N)

    For the corpus, counts and lengths are summed first: it is no mean of the captions' scores.
    Source: Papineni et al. 2002; pycocoevalcap/bleu/bleu_scorer.py with option "closest".
    """
    matches = {key: _matches(words, refs) for key, (words, refs) in _corpus(hypotheses, references).items()}
    return _bleu(_summed(matches.values())), {key: _bleu(found) for key, found in matches.items()}


def _matches(words: Words, refs: Sequence[Words]) -> _Matches:
    guessed, correct = [], []
    for n in range(1, MAX_GRAM + 1):
        allowed: Counter[Gram] = Counter()
        for ref in refs:
            allowed |= _grams(ref, n)  # the larger count
        grams = _grams(words, n)
        guessed.append(grams.total())
        correct.append((grams & allowed).total())
    closest = min(map(len, refs), key=lambda length: (abs(length - len(words)), length))
    return _Matches(len(words), closest, tuple(guessed), tuple(correct))


def _summed(matches: Collection[_Matches]) -> _Matches:
    return _Matches(
        length=sum(found.length for found in matches),
        closest=sum(found.closest for found in matches),
        guessed=tuple(map(sum, zip(*(found.guessed for found in matches), strict=True))),
        correct=tuple(map(sum, zip(*(found.correct for found in matches), strict=True))),
    )


def _bleu(found: _Matches) -> Bleu:
    # The original's guards against 0 / 0. They show: four words of five are 0.7999999998, and a caption
    # without any correct 4-gram has a tiny BLEU-4 instead of none.
    tiny, small = 1e-15, 1e-9
    ratio = (found.length + tiny) / (found.closest + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n, (guessed, correct) in enumerate(zip(found.guessed, found.correct, strict=True), start=1):
        product *= (correct + tiny) / (guessed + small)
        scores.append(penalty * product ** (1 / n))
    first, second, third, fourth = scores
    return first, second, third, fourth


# ---- ROUGE-L -------------------------------------------------------------------------------------


def rouge_l(
    hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> tuple[float, dict[Id, float]]:
    """(mean, {id: ROUGE-L}), in [0, 1].

    P = max_r lcs(h, r) / |h|, R = max_r lcs(h, r) / |r|, F = (1 + beta^2) P R / (R + beta^2 P), beta = 1.2

    lcs is the length of the longest common subsequence. The two maxima may be those of different references.
    Source: Lin 2004; pycocoevalcap/rouge/rouge.py.
    """
    return _with_mean({key: _rouge_l(*texts) for key, texts in _corpus(hypotheses, references).items()})


def _rouge_l(words: Words, refs: Sequence[Words]) -> float:
    # The original splits "" into one empty word, so that an empty caption fits an empty reference.
    words, refs = words or [""], [ref or [""] for ref in refs]
    common = [_longest_common(words, ref) for ref in refs]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / len(ref) for length, ref in zip(common, refs, strict=True))
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(a: Words, b: Words) -> int:
    """The length of the longest common subsequence. Row i of the table holds those of a[:i] and b[:j]."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


# ---- CIDEr-D -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vector:
    """A caption as CIDEr-D sees it."""

    weights: list[dict[Gram, float]]  # for n = 1..4: n-gram -> tf-idf
    norms: list[float]
    length: int


def cider_d(
    hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> tuple[float, dict[Id, float]]:
    """(mean, {id: CIDEr-D}), in [0, 10]; papers print it times 100.

    g_n(s)[w] = how often the n-gram w is in s * (log(number of ids) - log(max(1, df(w))))
    df(w) = number of ids with w in any of their references
    CIDEr-D = 10 / (4 R) sum_{n, r} exp(-(|h| - |r|)^2 / (2 sigma^2)) min(g_n(h), g_n(r)) . g_n(r)
                                    / (|g_n(h)| |g_n(r)|),  sigma = 6

    As df comes from the references given, the score of a subset is not comparable to that of the whole, and
    of a single id it is 0. (The original counts bigrams for |s|. Only for an empty caption is the difference
    of lengths another one, and there is nothing to penalise.)
    Source: Vedantam et al. 2015; pycocoevalcap/cider/cider_scorer.py.
    """
    corpus = _corpus(hypotheses, references)
    counts: Counter[Gram] = Counter()
    for _, refs in corpus.values():
        counts.update({gram for ref in refs for n in range(1, MAX_GRAM + 1) for gram in _grams(ref, n)})
    idf = {gram: math.log(len(corpus)) - math.log(count) for gram, count in counts.items()}
    unseen = math.log(len(corpus))

    def vector(words: Words) -> _Vector:
        weights = [
            {gram: count * idf.get(gram, unseen) for gram, count in _grams(words, n).items()}
            for n in range(1, MAX_GRAM + 1)
        ]
        norms = [math.hypot(*values.values()) for values in weights]
        return _Vector(weights, norms, len(words))

    return _with_mean(
        {key: _cider_d(vector(words), map(vector, refs)) for key, (words, refs) in corpus.items()}
    )


def _cider_d(caption: _Vector, refs: Iterable[_Vector]) -> float:
    similarities = [_similarity(caption, ref) for ref in refs]
    return 10 * math.fsum(similarities) / len(similarities)


def _similarity(caption: _Vector, ref: _Vector) -> float:
    """The clipped cosine, its mean over n, times the penalty for another length."""
    cosines = 0.0
    for ours, theirs, norm, norm_ref in zip(
        caption.weights, ref.weights, caption.norms, ref.norms, strict=True
    ):
        if norm and norm_ref:
            shared = ours.keys() & theirs.keys()
            products = (min(ours[gram], theirs[gram]) * theirs[gram] for gram in shared)
            cosines += math.fsum(products) / (norm * norm_ref)
    penalty = math.exp(-((caption.length - ref.length) ** 2) / (2 * CIDER_SIGMA**2))
    return cosines / MAX_GRAM * penalty


# ---- variety -------------------------------------------------------------------------------------


def distinct_n(captions: Sequence[str], n: int) -> float:
    """Different n-grams / n-grams in all captions, in [0, 1]; 0 where no caption has n words. n >= 1.

    Falls with the number of captions: compare equal numbers only. Source: Li et al. 2016 (distinct-n, there
    over words). Errors: ValueError for no captions.
    """
    _check_any(captions)
    grams = [gram for text in captions for gram in _grams(tokenize(text), n).elements()]
    return len(set(grams)) / len(grams) if grams else 0.0


def unique_share(captions: Sequence[str]) -> float:
    """Different captions / captions, in (0, 1], where case and punctuation make no difference.

    Errors: ValueError for no captions.
    """
    _check_any(captions)
    return len({tuple(tokenize(text)) for text in captions}) / len(captions)


def _check_any(captions: Sequence[str]) -> None:
    if not captions:
        raise ValueError("captions is empty; the variety of captions needs at least one")
