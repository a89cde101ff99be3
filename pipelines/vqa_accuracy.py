"""The accuracy of VQA: an answer counts by how many of ten people gave it, "Two." and "2" being one answer.

By the rules of the official evaluation, GT-Vision-Lab/VQA PythonEvaluationTools/vqaEvaluation/vqaEval.py
(commit a013f00), followed also where a rule is odd.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_A_NUMBER = re.compile(r"\d,\d")
# There the pattern is "(?!<=\d)(\.)(?!\d)", whose first part, meant to look behind, is always true; and the
# flag that is given as the number of replacements has the value 32.
PERIOD, MOST_PERIODS = re.compile(r"\.(?!\d)"), 32

# The right forms that the official table knows: it mends each where one apostrophe, and only one, is missing.
# What it says of "Im", "Ive" and "Id've" never applies, as words are in lower case by then.
_RIGHT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _RIGHT.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # an oddity of the table


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """min(n / 3, 1), averaged over all choices of all people but one, n of whom gave `answer`.

    Both sides are normalised, but not where all people agree to the letter: there the answer must as well.
    """
    answer, people = _plain(answer), [_plain(other) for other in people]
    if len(set(people)) > 1:
        answer, people = normalise(answer), [normalise(other) for other in people]
    n, total = people.count(answer), len(people)
    return (n * min((n - 1) / 3, 1) + (total - n) * min(n / 3, 1)) / total


@lru_cache(1 << 16)
def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, digits for number words, apostrophes in contractions."""
    words = _without_punctuation(_plain(answer)).lower().split()
    numbered = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, another becomes a space: "t-shirt" is two words. All go near 1,000."""
    has_number = COMMA_IN_A_NUMBER.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        goes = has_number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if goes else " ")
    return PERIOD.sub("", found, count=MOST_PERIODS)
