"""Who writes what about a scene of the generated world: people, the web, and those who get it wrong.

People's captions are sentences made from the scene, wrong captions are edited sentences.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from numpy.random import Generator

from pipelines.world_text import (
    BESIDE,
    CLOSINGS,
    COLOURS,
    COUNT_OPENINGS,
    FLIPPED,
    NUMBERS,
    OPENINGS,
    PAIR_LINKS,
    PHRASES,
    SHAPES,
    SIMPLE_OPENINGS,
    SIZE_OF,
    SIZE_WORDS,
    TEXTURES,
    TONE_OPENINGS,
    TONES,
    Mention,
    Palette,
    Scene,
    SceneObject,
    Sentence,
    direction_of,
    judge,
    render,
)

CLEAR_DISTANCE = 0.2  # people only state a relation from this difference on ...
CLEAR_RATIO = 1.5  # ... and when it beats the other axis by this factor
MENTION_SHARE = 0.35  # how often a size, and how often a texture, is mentioned
DIRECTION_SHARE = 0.6  # how often a direction is stated where it is clear
BRIEF_PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

# "#" stands for one to four digits, written apart so that ten words cover all numbers.
JUNK = re.split(
    r" \| ",
    "img # jpg | image # png | dsc # jpg | photo # of # | page # of # | untitled document # | "
    "item number # | untitled # | click here to enlarge | click to view image # | click here to download "
    "| home page logo | buy cheap shapes online free shipping | free shipping on all items | sale # off "
    "all items | buy now for # dollars | download free clip art | free stock photo # download | logo png "
    "| add to cart | copyright # all rights reserved | view all # photos | sign up for our news today | "
    "posted by user # | no image available | loading please wait | share this on our page | "
    "best price online # dollars",
)


def _pick(items: Sequence[str], rng: Generator) -> str:
    return items[int(rng.integers(len(items)))]


def main_direction(a: SceneObject, b: SceneObject) -> str:
    """Where `a` lies as seen from `b`, along the axis on which they are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "below" if dy > 0 else "above"


def clear_direction(a: SceneObject, b: SceneObject) -> str | None:
    """The main direction, when nobody would argue about it."""
    across, along = sorted((abs(a.x - b.x), abs(a.y - b.y)))
    return main_direction(a, b) if along > max(CLEAR_DISTANCE, CLEAR_RATIO * across) else None


def _mention(thing: SceneObject, definite: bool, rng: Generator) -> Mention:
    size = _pick(SIZE_WORDS[thing.size], rng) if rng.random() < MENTION_SHARE else None
    texture = thing.texture if rng.random() < MENTION_SHARE else None
    return Mention(thing.shape, thing.colour, size, texture, definite)


def _links(named: Sequence[SceneObject], rng: Generator, directions: float) -> tuple[str, ...]:
    if len(named) > 2:
        return ("",) * (len(named) - 2) + ("and",)
    direction = clear_direction(*named)
    if direction is None or rng.random() < 1 - directions:
        return (_pick(("and", *BESIDE), rng),)
    return (_pick(PHRASES[direction], rng),)


def _opening(named: int, links: tuple[str, ...], scene: Scene, rng: Generator) -> str:
    draw = rng.random()
    if draw < 0.1:
        return f"a {scene.tone} background with"
    if draw < 0.4 and links[-1] == "and" and named == len(scene.objects):
        number = next(word for word, count in NUMBERS.items() if count == named)
        return _pick([opening for opening in COUNT_OPENINGS if number in opening.split()], rng)
    return _pick(SIMPLE_OPENINGS, rng)


def compose(scene: Scene, rng: Generator, directions: float = DIRECTION_SHARE) -> Sentence:
    """One true sentence naming two objects of the scene, or three where it has more than two."""
    count = 2 if len(scene.objects) == 2 else int(rng.integers(2, 4))
    named = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:count]]
    links = _links(named, rng, directions)
    opening = _opening(count, links, scene, rng)
    # "the red star is below the green ring": only for links that can follow a verb.
    definite = opening == "" and links[0] in PAIR_LINKS - {"and"} and rng.random() < 0.5
    closing = f"on a {scene.tone} background" if opening not in TONE_OPENINGS and rng.random() < 0.2 else ""
    return Sentence(
        opening,
        tuple(_mention(thing, definite, rng) for thing in named),
        (f"is {links[0]}",) if definite else links,
        closing,
    )


def captions(scene: Scene, rng: Generator, n: int, directions: float = DIRECTION_SHARE) -> list[str]:
    """`n` captions as people would write them, each true of the scene."""
    return [render(compose(scene, rng, directions)) for _ in range(n)]


def brief_captions(scene: Scene, rng: Generator, n: int) -> list[str]:
    """`n` captions by people who say as little as they can: "a red ring above a blue star".

    Each names colour, shape and direction of the same two objects, and begins with the one that the caption
    before it ended with.
    """
    a, b = (scene.objects[int(spot)] for spot in rng.permutation(len(scene.objects))[:2])
    texts = []
    for _ in range(n):
        mentions = (Mention(a.shape, a.colour), Mention(b.shape, b.colour))
        texts.append(render(Sentence("", mentions, (BRIEF_PHRASES[main_direction(a, b)],), "")))
        a, b = b, a
    return texts


def junk(rng: Generator) -> str:
    """Alt text that says nothing about the picture."""
    words = _pick(JUNK, rng).split()
    numbers = [" ".join(map(str, rng.integers(0, 10, size=int(rng.integers(1, 5))))) for _ in words]
    return " ".join(number if word == "#" else word for word, number in zip(words, numbers, strict=True))


def partly_right(scene: Scene, palette: Palette, rng: Generator) -> str:
    """A person's caption with one object replaced, in colour and shape, by one the scene does not have."""
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    while True:
        sentence = _rename(compose(scene, rng), palette, rng, colour=True, shape=True)
        if any((mention.colour, mention.shape) not in present for mention in sentence.mentions):
            return render(sentence)


def _with_mention(sentence: Sentence, spot: int, mention: Mention) -> Sentence:
    mentions = sentence.mentions
    return replace(sentence, mentions=(*mentions[:spot], mention, *mentions[spot + 1 :]))


def _other(word: str | None, words: Sequence[str], rng: Generator) -> str:
    return _pick([other for other in words if other != word], rng)


def _rename(sentence: Sentence, palette: Palette, rng: Generator, *, colour: bool, shape: bool) -> Sentence:
    """Gives one object another colour, another shape, or both."""
    spot = int(rng.integers(len(sentence.mentions)))
    new = sentence.mentions[spot]
    if colour:
        new = replace(new, colour=_other(new.colour, palette.colours, rng))
    if shape:
        new = replace(new, shape=_other(new.shape, palette.shapes, rng))
    return _with_mention(sentence, spot, new)


def _swap_colours(sentence: Sentence, rng: Generator) -> Sentence:
    i, j = (int(spot) for spot in rng.permutation(len(sentence.mentions))[:2])
    a, b = sentence.mentions[i], sentence.mentions[j]
    swapped = _with_mention(sentence, i, replace(a, colour=b.colour))
    return _with_mention(swapped, j, replace(b, colour=a.colour))


def _change_detail(sentence: Sentence, palette: Palette, rng: Generator) -> Sentence:
    """Flips the relation, or changes one size or texture; the same sentence when it states none of them."""
    edits = []
    direction = direction_of(sentence.links[0])
    if direction is not None:
        verb = "is " if sentence.links[0].startswith("is ") else ""
        edits.append(replace(sentence, links=(verb + _pick(PHRASES[FLIPPED[direction]], rng),)))
    for spot, old in enumerate(sentence.mentions):
        if old.size is not None:
            other = "small" if SIZE_OF[old.size] == "large" else "large"
            edits.append(_with_mention(sentence, spot, replace(old, size=_pick(SIZE_WORDS[other], rng))))
        if old.texture is not None and len(palette.textures) > 1:
            changed = replace(old, texture=_other(old.texture, palette.textures, rng))
            edits.append(_with_mention(sentence, spot, changed))
    return edits[int(rng.integers(len(edits)))] if edits else sentence


def _edit(share: float, sentence: Sentence, palette: Palette, rng: Generator) -> Sentence:
    """The edit that the cumulative `share` in [0, 1) falls on."""
    if share < 0.40:
        return _rename(sentence, palette, rng, colour=True, shape=False)
    if share < 0.70:
        return _rename(sentence, palette, rng, colour=False, shape=True)
    if share < 0.85:
        return _swap_colours(sentence, rng)
    return _change_detail(sentence, palette, rng)


def subtly_wrong(scene: Scene, palette: Palette, rng: Generator) -> str:
    """A person's caption with exactly one thing wrong: a colour, a shape, swapped colours, or a detail."""
    share = rng.random()
    # Not every edit is possible, or makes the sentence false: try others, in the end with any edit.
    for attempt in range(60):
        sentence = _edit(share if attempt < 20 else rng.random(), compose(scene, rng), palette, rng)
        named = {(mention.colour, mention.shape) for mention in sentence.mentions}
        if len(named) == len(sentence.mentions) and not judge(render(sentence), scene).true:
            return render(sentence)
    raise AssertionError(f"no subtle error found for {scene}")


VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {word for text in (*OPENINGS, *PAIR_LINKS, *CLOSINGS, *JUNK) for word in text.split()} - {"#"}
        | {*COLOURS, *SHAPES, *TEXTURES, *TONES, *SIZE_OF, "a", "an", "the", ",", *"0123456789"}
    )
)
