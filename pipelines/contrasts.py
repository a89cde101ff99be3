"""Texts made wrong by one word: hard negatives that no other image of a batch provides.

A filter that only meets texts of other images learns which things are there, not which belongs to which: it
passes swapped colours and turned relations. Rules repair that (Yuksekgonul et al. 2023, "When and why
vision-language models behave like bags-of-words"; Doveh et al. 2023, "Teaching structured vision & language
concepts"). Given are sets of words, e.g. ["red", "blue"] or ["small little", "large"]: the entries of a set
exclude each other, the words of an entry mean the same.
"""

from random import Random

Contrasts = tuple[tuple[str, ...], ...]


def contrast(text: str, sets: Contrasts, rng: Random) -> str | None:
    """`text` with one word of a set exchanged, or with two of the same set swapped; None where it has none.

    The swap, where possible, is taken in half of the cases. a and an follow the word behind them.
    """
    words = text.split()
    places = [(i, *found) for i, word in enumerate(words) if (found := _find(word, sets))]
    if not places:
        return None
    spot, chosen, entry = rng.choice(places)
    partners = [i for i, other, one in places if other == chosen and one != entry]
    if partners and rng.random() < 0.5:
        other = rng.choice(partners)
        words[spot], words[other] = words[other], words[spot]
    else:
        entries = [one for i, one in enumerate(sets[chosen]) if i != entry]
        words[spot] = rng.choice(rng.choice(entries).split())
    return " ".join(_article(word, after) for word, after in zip(words, [*words[1:], ""], strict=True))


def _find(word: str, sets: Contrasts) -> tuple[int, int] | None:
    """(number of the set, number of the entry) of a word."""
    for number, entries in enumerate(sets):
        for entry, words in enumerate(entries):
            if word in words.split():
                return number, entry
    return None


def _article(word: str, after: str) -> str:
    return ("an" if after[:1] in "aeiou" else "a") if word in ("a", "an") and after else word


def check(sets: Contrasts) -> None:
    """Raises ValueError for a set of fewer than two entries, an empty entry, or a word that comes twice."""
    words = [word for entries in sets for entry in entries for word in entry.split()]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ValueError(f"contrasts name {', '.join(twice)} twice; a word belongs to one entry of one set")
    for entries in sets:
        if len(entries) < 2 or not all(entry.split() for entry in entries):
            raise ValueError(
                f"contrasts hold the set {list(entries)}; a set needs two entries of at least one word each"
            )
