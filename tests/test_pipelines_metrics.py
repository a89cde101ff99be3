"""pipelines.metrics against published numbers, the definitions in loops, and pycocoevalcap if installed."""

import math
import random
import shutil
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.metrics import bleu, check_ids, cider_d, distinct_n, rouge_l, tokenize, unique_share

Corpus = tuple[dict[Any, str], dict[Any, list[str]]]

# ---- the tokenizer -------------------------------------------------------------------------------

# What PTBTokenizer of pycocoevalcap 1.2 makes of them: words with one space between them.
TOKENIZED = {
    "A man's dog isn't on the table.": "a man 's dog is n't on the table",
    "They can't, won't and cannot go; I'm sure we're gonna wanna play.": (
        "they ca n't wo n't and can not go i 'm sure we 're gon na wan na play"
    ),
    "DON'T I'll she'd we've IT'S": "do n't i 'll she 'd we 've it 's",
    "wannabe cannot-do can not": "wannabe cannot-do can not",
    "Two (2) men [one old] {x}": "two -lrb- 2 -rrb- men -lsb- one old -rsb- -lcb- x -rcb-",
    "beer (-LRB- Harp Lager )-RRB- here": "beer -lrb- -lrb- harp lager -rrb- -rrb- here",
    "A \"stop\" sign says ''hi'' and ``yo``": "a stop sign says hi and yo",
    "black-and-white photo of a t-shirt": "black-and-white photo of a t-shirt",
    "a man - woman -- child --- dog, mid- and post-war": "a man woman child dog mid and post-war",
    "Mr. Smith and Mrs. Jones on Main St.": "mr. smith and mrs. jones on main st.",
    "it is 5 p.m. now in the U.S.": "it is 5 p.m. now in the u.s.",
    "J. K. Rowling of plan b. is": "j. k. rowling of plan b. is",
    "1,000 people at 10:30 for $5.50 or 50% off #1 & more": (
        "1,000 people at 10:30 for $ 5.50 or 50 % off # 1 & more"
    ),
    "1/2 of a pizza, and/or brown/white dog a/c w/ 24/7": (
        "1/2 of a pizza and/or brown/white dog a/c w / 24/7"
    ),
    "wi-fi 3-d 2nd 20ft 100m 5:30pm .5 -5": "wi-fi 3-d 2nd 20ft 100m 5:30 pm .5 -5",
    "rock 'n' roll in the '90s, 1970's o'clock O'Brien": "rock 'n' roll in the '90s 1970 's o'clock o'brien",
    "the dogs' bowl 'quoted' 'two words'": "the dogs bowl quoted two words",
    "mother-in-law's what's-his-name": "mother-in-law 's what 's his-name",
    "he's/she's man/woman's": "he 's / she 's man/woman 's",
    "on the groun.d playing lunch.Mike runs.": "on the groun.d playing lunch.mike runs",
    "no space,after comma;semi:colon": "no space after comma semi colon",
    "AT&T r&b R&B M&M's": "at&t r & b r&b m&m 's",
    "a dog runs! what? really?! yes!!!": "a dog runs what really ?! yes !!!",
    "wait... what.. The end .": "wait what the end",
    "see (http://a.com/b?c=d&e), www.foo.com now @user #tag": (
        "see -lrb- http://a.com/b?c=d&e -rrb- www.foo.com now @user #tag"
    ),
    "a&amp;b &lt; &gt; &quot;c&quot;": "a & b < > c",
    "a man * star = eq + plus": "a man * star = eq + plus",
    "colour grey theatre": "colour grey theatre",
    "tab\tand   spaces ": "tab and spaces",
    "": "",
    " . ": "",
    # curly quotes, dashes, an ellipsis
    "it\u2019s a \u201cSTOP\u201d \u2014 \u2018go\u2019 red \u2013 ok\u2026": "it 's a stop go red ok",
    "don\u2019t she\u2014he women\u2019s": "do n't she he women 's",
    # accents, one as a character of its own; Cyrillic; Chinese with its comma; Devanagari vowel signs
    "a Caf\xe9 with na\xefve cr\xe8me": "a caf\xe9 with na\xefve cr\xe8me",
    "cafe\u0301 dog": "cafe\u0301 dog",
    "\u041a\u043e\u0442's": "\u043a\u043e\u0442 's",
    "\u4e2d\u6587\uff0c\u6d4b\u8bd5\u3002": "\u4e2d\u6587 \uff0c \u6d4b\u8bd5 \u3002",
    "\u0915\u0941\u0924\u094d\u0924\u093e\u0964": "\u0915\u0941\u0924\u094d\u0924\u093e \u0964",
    # an emoji, a zero-width space, a soft hyphen, a wide space
    "a dog \U0001f436 runs": "a dog runs",
    "zero\u200bwidth soft\xadhyphen a\u3000b\xa0c": "zero width softhyphen a b c",
}


@pytest.mark.parametrize("text", TOKENIZED)
def test_words_are_those_of_the_penn_treebank_tokenizer(text: str) -> None:
    assert tokenize(text) == TOKENIZED[text].split()


def test_the_expected_words_are_those_of_the_java_program(monkeypatch: pytest.MonkeyPatch) -> None:
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        pytest.skip("no java")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    found = ptb.PTBTokenizer().tokenize({text: [{"caption": text}] for text in TOKENIZED})
    assert {text: line.split() for text, [line] in found.items()} == {
        text: line.split() for text, line in TOKENIZED.items()
    }


def test_a_line_break_is_a_space() -> None:
    assert tokenize("a dog\nruns\r\nfast") == ["a", "dog", "runs", "fast"]


# ---- published numbers ---------------------------------------------------------------------------

REFERENCES = {
    "image1": [
        "two cats are sleeping next to each other.",
        "a grey cat is cuddling with an orange cat on a blanket.",
        "the orange cat is happy that the black cat is close to it.",
    ],
    "image2": [
        "a dog is wearing ear muffs as it lies on a carpet.",
        "a black dog and an orange cat are looking at the photographer.",
        "headphones are placed on a dogs ears.",
    ],
}
GOOD = {
    "image1": "an orange cat and a grey cat are lying together.",
    "image2": "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
}
BAD = {
    "image1": "a calico cat and a white cat are lying together.",
    "image2": "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
}
NLG_EVAL = {
    0: "this is the model generated sentence1 which seems good enough",
    1: "this is sentence2 which has been generated by your model",
}
NLG_EVAL_REFERENCES = {
    0: ["this is one reference sentence for sentence1", "this is one more reference sentence for sentence1"],
    1: [
        "this is a reference sentence for sentence2 which was generated by your model",
        "this is the second reference sentence for sentence2",
    ],
}
TEST = {0: "this is a good test"}, {0: ["this is a test", "this is also a test"]}
FRENCH = {0: "Le test est en fran\xe7ais."}, {0: ["Test en fran\xe7ais.", "Le test en fran\xe7ais."]}
JAPANESE = {0: "\u30c6\u30b9\u30c8"}, {0: ["\u30c6\u30b9\u30c8"]}
# The sentences and numbers of jmhessel/clipscore (its README has four digits) and of Maluuba/nlg-eval's tests
# (five to seven); the further digits are pycocoevalcap 1.2's, with its own tokenizer.
GOLDEN = [
    (
        (GOOD, REFERENCES),
        (0.6666666666, 0.4898979485, 0.3468814950, 3.754749996e-5),
        0.4280104846,
        0.5637412592,
    ),
    (
        (BAD, REFERENCES),
        (0.4814814815, 0.2403700850, 0.1359390820, 1.859745112e-5),
        0.3121105473,
        0.2790165307,
    ),
    (
        (NLG_EVAL, NLG_EVAL_REFERENCES),
        (0.5500000000, 0.4281744193, 0.2840428201, 0.2011434306),
        0.5221037854,
        1.2421919557,
    ),
    (TEST, (0.7999999997, 0.6324555318, 0.5108729547, 9.036020031e-5), 0.9070631970, 0.0),
    (FRENCH, (0.7999999998, 0.6324555319, 5.108729548e-6, 1.606856837e-8), 0.9070631970, 0.0),
    (JAPANESE, (0.9999999980, 0.0009999999985, 9.999999987e-5, 3.162277656e-5), 1.0, 0.0),
]


@pytest.mark.parametrize(
    ("corpus", "bleus", "rouge", "cider"),
    GOLDEN,
    ids=["good", "bad", "nlg-eval", "test", "french", "japanese"],
)
def test_published_numbers(corpus: Corpus, bleus: tuple[float, ...], rouge: float, cider: float) -> None:
    assert bleu(*corpus)[0] == pytest.approx(bleus, rel=1e-8, abs=1e-12)
    assert rouge_l(*corpus)[0] == pytest.approx(rouge, abs=1e-9)
    assert cider_d(*corpus)[0] == pytest.approx(cider, abs=1e-9)


# ---- pycocoevalcap -------------------------------------------------------------------------------


def random_corpus(seed: int) -> Corpus:
    """Captions of 0 to 15 of 30 words, near one another, as references are."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(30)]

    def near(base: list[str]) -> str:
        changed = [rng.choice(words) if rng.random() < 0.3 else word for word in base]
        return " ".join(changed[: rng.randint(0, 15)])

    bases = {i: rng.choices(words, k=15) for i in range(rng.randint(1, 20))}
    hypotheses = {i: near(base) for i, base in bases.items()}
    references = {i: [near(base) for _ in range(rng.randint(1, 5))] for i, base in bases.items()}
    references[0].append("w0 w1")  # the original fails where all references are empty
    return hypotheses, references


def test_scores_are_those_of_pycocoevalcap() -> None:
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge_module = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider_module = pytest.importorskip("pycocoevalcap.cider.cider")
    for hypotheses, references in map(random_corpus, range(30)):
        lists = {key: [text] for key, text in hypotheses.items()}

        expected, each = bleu_module.Bleu(4).compute_score(references, lists, verbose=0)
        corpus, per_id = bleu(hypotheses, references)
        assert corpus == pytest.approx(expected, rel=0, abs=1e-9)
        assert np.array(list(per_id.values())) == pytest.approx(np.array(each).T, rel=0, abs=1e-9)

        for ours, theirs in ((rouge_l, rouge_module.Rouge()), (cider_d, cider_module.Cider())):
            mean, each = theirs.compute_score(references, lists)
            found, scores = ours(hypotheses, references)
            assert found == pytest.approx(mean, rel=0, abs=1e-9)
            assert list(scores.values()) == pytest.approx(each, rel=0, abs=1e-9)


# ---- the definitions, in loops -------------------------------------------------------------------

CAPTION = st.lists(st.sampled_from(["the", "cat", "dog", "sat", "red"]), max_size=7).map(" ".join)
CORPUS = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=3)), min_size=1, max_size=4).map(
    lambda rows: (dict(enumerate(row[0] for row in rows)), dict(enumerate(row[1] for row in rows)))
)


def grams_of(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]


def naive_bleu(captions: list[tuple[str, list[str]]]) -> list[float]:
    """From the definition, in fractions; 1e-15 and 1e-9 are part of coco-caption's."""
    tiny, small = Fraction(1, 10**15), Fraction(1, 10**9)
    length = wanted = 0
    for text, refs in captions:
        length += len(text.split())
        by_distance: dict[int, list[int]] = {}
        for ref in refs:
            by_distance.setdefault(abs(len(ref.split()) - len(text.split())), []).append(len(ref.split()))
        wanted += min(by_distance[min(by_distance)])
    ratio = (length + tiny) / (wanted + small)
    product, scores = Fraction(1), []
    for n in (1, 2, 3, 4):
        guessed = correct = 0
        for text, refs in captions:
            for gram in set(grams_of(text, n)):
                allowed = max(sum(other == gram for other in grams_of(ref, n)) for ref in refs)
                correct += min(allowed, sum(other == gram for other in grams_of(text, n)))
            guessed += len(grams_of(text, n))
        product *= (correct + tiny) / (guessed + small)
        scores.append(float(product) ** (1 / n) * min(1.0, math.exp(min(0.0, float(1 - 1 / ratio)))))
    return scores


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_bleu_is_its_definition(corpus: Corpus) -> None:
    hypotheses, references = corpus
    found, per_id = bleu(hypotheses, references)
    rows = [(hypotheses[key], references[key]) for key in hypotheses]
    assert found == pytest.approx(naive_bleu(rows), abs=1e-12)
    for key, row in zip(hypotheses, rows, strict=True):
        assert per_id[key] == pytest.approx(naive_bleu([row]), abs=1e-12)


def subsequences(text: str) -> set[tuple[str, ...]]:
    words = text.split(" ")  # the empty text has one word, the empty one
    return {kept for size in range(len(words) + 1) for kept in combinations(words, size)}


def naive_rouge_l(text: str, refs: list[str]) -> float:
    common = [max(map(len, subsequences(text) & subsequences(ref))) for ref in refs]
    precision = max(n / len(text.split(" ")) for n in common)
    recall = max(n / len(ref.split(" ")) for n, ref in zip(common, refs, strict=True))
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_rouge_l_is_its_definition(corpus: Corpus) -> None:
    hypotheses, references = corpus
    mean, per_id = rouge_l(hypotheses, references)
    expected = {key: naive_rouge_l(text, references[key]) for key, text in hypotheses.items()}
    assert per_id == pytest.approx(expected, abs=1e-12)
    assert mean == pytest.approx(np.mean(list(expected.values())), abs=1e-12)


def naive_cider_d(hypotheses: dict[Any, str], references: dict[Any, list[str]]) -> dict[Any, float]:
    """From the definition, with a dense vector over all n-grams that occur."""
    scores = dict.fromkeys(hypotheses, 0.0)
    for n in (1, 2, 3, 4):
        texts = [*hypotheses.values(), *(text for refs in references.values() for text in refs)]
        vocabulary = sorted({gram for text in texts for gram in grams_of(text, n)})
        document_counts = [
            sum(any(gram in grams_of(ref, n) for ref in refs) for refs in references.values())
            for gram in vocabulary
        ]
        idf = np.log(len(references) / np.maximum(1, document_counts))
        for key, text in hypotheses.items():
            hypothesis = np.array([grams_of(text, n).count(gram) for gram in vocabulary]) * idf
            for ref in references[key]:
                reference = np.array([grams_of(ref, n).count(gram) for gram in vocabulary]) * idf
                norms = np.linalg.norm(hypothesis) * np.linalg.norm(reference)
                if norms > 0:
                    delta = len(grams_of(text, 2)) - len(grams_of(ref, 2))
                    cosine = np.minimum(hypothesis, reference) @ reference / norms
                    scores[key] += 10 / 4 / len(references[key]) * cosine * np.exp(-(delta**2) / 72)
    return scores


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_cider_d_is_its_definition(corpus: Corpus) -> None:
    mean, per_id = cider_d(*corpus)
    expected = naive_cider_d(*corpus)
    assert per_id == pytest.approx(expected, abs=1e-9)
    assert mean == pytest.approx(np.mean(list(expected.values())), abs=1e-9)


# ---- by hand -------------------------------------------------------------------------------------


def test_bleu_by_hand() -> None:
    def bleu_1(text: str, *refs: str) -> float:
        return bleu({0: text}, {0: list(refs)})[0][0]

    assert bleu_1("the red cat", "the cat", "the red cat sat") == pytest.approx(1)  # of 2 and 4 words, 2
    assert bleu_1("the", "the cat sat") == pytest.approx(math.exp(1 - 3))
    assert bleu_1("the the the the", "the cat the", "the dog") == pytest.approx(2 / 4)  # two in one reference
    # two corpora of one caption each would have 1 and 0; together they have 1 word of 4
    assert bleu({0: "cat", 1: "a red dog"}, {0: ["cat"], 1: ["the two mice"]})[0][0] == pytest.approx(1 / 4)


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    references = ["one two three four five six seven eight", "four"]  # P 4/4 and 1/4, R 4/8 and 1/1
    assert rouge_l({0: "one two three four"}, {0: references})[0] == pytest.approx(1)


def test_a_perfect_caption_of_k_words_has_k_quarters_of_cider_d() -> None:
    texts = {1: "cat", 2: "red dog", 3: "the old man", 4: "two mice eat cheese", 5: "boys play ball on grass"}
    scores = cider_d(texts, {key: [text] for key, text in texts.items()})[1]
    assert scores == pytest.approx({1: 2.5, 2: 5, 3: 7.5, 4: 10, 5: 10})


def test_an_empty_caption_has_no_score() -> None:
    hypotheses = {0: "", 1: "...", 2: "a cat sat"}
    references = {0: ["a dog"], 1: ["a red bus", ""], 2: ["a cat sat"]}
    assert bleu(hypotheses, references)[1][0] == (0, 0, 0, 0)
    assert [rouge_l(hypotheses, references)[1][key] for key in (0, 2)] == pytest.approx([0, 1])
    assert list(cider_d(hypotheses, references)[1].values()) == pytest.approx([0, 0, 7.5])


def test_scores_come_in_the_order_of_the_hypotheses() -> None:
    hypotheses, references = {"b": "a dog", "a": "a cat"}, {"a": ["a cat"], "b": ["a bus"]}
    for metric in (bleu, rouge_l, cider_d):
        assert list(metric(hypotheses, references)[1]) == ["b", "a"]
    assert rouge_l(hypotheses, references)[1] == pytest.approx({"a": 1, "b": 0.5})


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d, check_ids])
def test_ids_that_lack_something_are_listed(metric: Any) -> None:
    hypotheses = {"both": "x", "extra": "x", "none": "x"}
    references: dict[str, list[str]] = {"both": ["x"], "lost": ["x"], "none": []}
    message = (
        r"1 with no hypothesis \('lost'\), 1 with no references \('extra'\), "
        r"1 with an empty list of references \('none'\)"
    )
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references)


def test_of_many_ids_the_first_are_listed() -> None:
    with pytest.raises(ValueError, match=r"5000 with no hypothesis \(0, 1, .* 9 and 4990 more\);"):
        check_ids({}, {key: ["x"] for key in range(5000)})


def test_nothing_and_a_bare_text_are_refused() -> None:
    with pytest.raises(ValueError, match="hypotheses and references are empty"):
        cider_d({}, {})
    with pytest.raises(ValueError, match=r"references\['a'\] is a text, expected a list"):
        check_ids({"a": "a cat"}, {"a": "a cat"})


# ---- variety -------------------------------------------------------------------------------------


def test_distinct_n() -> None:
    captions = ["A cat sat.", "a cat ran"]
    assert [distinct_n(captions, n) for n in (1, 2, 3, 4)] == [4 / 6, 3 / 4, 1.0, 0.0]
    assert distinct_n(["the the the"], 1) == 1 / 3


def test_unique_share() -> None:
    assert unique_share(["A cat.", "a cat", "a dog", ""]) == 3 / 4


def test_no_captions_have_no_variety() -> None:
    for metric in (lambda: distinct_n([], 1), lambda: unique_share([])):
        with pytest.raises(ValueError, match="captions is empty"):
            metric()
