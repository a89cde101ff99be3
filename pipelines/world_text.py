"""The language of the generated world: what people, the web and a careful judge say about a scene.

A caption is a `Sentence`: an opening, the objects it names, the links between them, and a closing. People's
captions are sentences made from the scene, wrong captions are edited sentences, and the judge parses any text
back into a sentence and checks every claim it makes.

Coordinates: x and y of an object's centre are fractions of the side of the picture, y grows downwards.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations

from numpy.random import Generator

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
TEXTURES = ("plain", "striped", "dotted")
TONES = ("dark", "light")
SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
NUMBERS = {"two": 2, "three": 3}

# Direction -> the phrases that state it.
PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
FLIPPED = {"left": "right", "right": "left", "above": "below", "below": "above"}
DIRECTIONS = {phrase: direction for direction, phrases in PHRASES.items() for phrase in phrases}
BESIDE = ("next to", "beside")  # like "and", they state nothing beyond both objects being there
PAIR_LINKS = {"and", *BESIDE, *DIRECTIONS, *(f"is {phrase}" for phrase in (*BESIDE, *DIRECTIONS))}

SIMPLE_OPENINGS = ("", "there is", "a photo of", "an image of", "this is")
TONE_OPENINGS = tuple(f"a {tone} background with" for tone in TONES)
COUNT_OPENINGS = tuple(
    f"{start}{number} shapes" for start in ("", "there are ", "a photo of ") for number in NUMBERS
)
# "a picture of" is the captioner's prompt: accepted, but no person writes it.
OPENINGS = {*SIMPLE_OPENINGS, *TONE_OPENINGS, *COUNT_OPENINGS, "a picture of"}
CLOSINGS = {"", *(f"on a {tone} background" for tone in TONES)}

JUDGE_MARGIN = 0.05  # a relation holds from this difference on
CLEAR_DISTANCE = 0.2  # people only state a relation from this difference on ...
CLEAR_RATIO = 1.5  # ... and when it beats the other axis by this factor
MENTION_SHARE = 0.35  # how often a size, and how often a texture, is mentioned
DIRECTION_SHARE = 0.6  # how often a direction is stated where it is clear

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


@dataclass(frozen=True)
class SceneObject:
    """One shape; `size` is "small" or "large"."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows; no two objects share both colour and shape."""

    objects: tuple[SceneObject, ...]
    background: str
    tone: str


@dataclass(frozen=True)
class Palette:
    """The colours, shapes and textures a world uses."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    textures: tuple[str, ...]


@dataclass(frozen=True)
class Mention:
    """An object as a sentence names it; None where the sentence says nothing."""

    shape: str
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    definite: bool = False


@dataclass(frozen=True)
class Sentence:
    """`links[i]` stands between `mentions[i]` and `mentions[i + 1]`; "" is a list's comma."""

    opening: str
    mentions: tuple[Mention, ...]
    links: tuple[str, ...]
    closing: str


@dataclass(frozen=True)
class Verdict:
    """`true` implies `parsed`; `reason` says what is wrong, "" when nothing is."""

    parsed: bool
    true: bool
    objects_named: int
    reason: str


def scene_to_json(scene: Scene) -> str:
    """The scene as one line of JSON."""
    return json.dumps(asdict(scene))


def scene_from_json(text: str) -> Scene:
    """The inverse of `scene_to_json`."""
    fields = json.loads(text)
    objects = tuple(SceneObject(**item) for item in fields.pop("objects"))
    return Scene(objects=objects, **fields)


def _pick(items: Sequence[str], rng: Generator) -> str:
    return items[int(rng.integers(len(items)))]


def _phrase(mention: Mention) -> str:
    words = [w for w in (mention.size, mention.texture, mention.colour, mention.shape) if w is not None]
    article = "the" if mention.definite else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def render(sentence: Sentence) -> str:
    """The sentence as text."""
    text = sentence.opening + ("," if sentence.opening.endswith("shapes") else "")
    for link, mention in zip(("", *sentence.links), sentence.mentions, strict=True):
        comma = "," if mention is not sentence.mentions[0] and link == "" else ""
        text = f"{text}{comma} {link} {_phrase(mention)}"
    return " ".join(f"{text} {sentence.closing}".split())


_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_OBJECT = re.compile(
    rf"\b(a|an|the) (?:({'|'.join(_SIZE_OF)}) )?(?:({'|'.join(TEXTURES)}) )?"
    rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b"
)


def parse(text: str) -> Sentence | None:
    """The sentence `text` is, or None. Case, commas, extra spaces and a/an are not held against it."""
    text = " ".join(text.lower().replace(",", " ").split())
    found = list(_OBJECT.finditer(text))
    if not found:
        return None
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    opening, *gaps, closing = (text[a:b].strip() for a, b in zip(starts, ends, strict=True))
    links = tuple(gaps)
    if opening not in OPENINGS or closing not in CLOSINGS or not _links_are_grammatical(links, opening):
        return None
    mentions = tuple(
        Mention(shape, colour, size, texture, definite=article == "the")
        for article, size, texture, colour, shape in (match.groups() for match in found)
    )
    return Sentence(opening, mentions, links, closing)


def _links_are_grammatical(links: tuple[str, ...], opening: str) -> bool:
    if not links:
        return True
    if len(links) > 1:
        return links == ("",) * (len(links) - 1) + ("and",)
    (link,) = links
    # "there is the star is above the ring" has one verb too many.
    return link in PAIR_LINKS and (opening == "" or not link.startswith("is "))


def _direction(link: str) -> str | None:
    return DIRECTIONS.get(link.removeprefix("is "))


def holds(direction: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` lies in `direction` of `b`."""
    ahead = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return ahead[direction] > JUDGE_MARGIN


def _fits(mention: Mention, thing: SceneObject) -> bool:
    return (
        (mention.colour, mention.shape) == (thing.colour, thing.shape)
        and (mention.size is None or _SIZE_OF[mention.size] == thing.size)
        and mention.texture in (None, thing.texture)
    )


def _first_error(sentence: Sentence, scene: Scene) -> str:
    """What the sentence says that is not so; "" when all of it is."""
    for mention in sentence.mentions:
        if mention.colour is None:
            return f"{_phrase(mention)} is named without a colour"
        if not any(_fits(mention, thing) for thing in scene.objects):
            return f"there is no {_phrase(replace(mention, definite=True)).removeprefix('the ')}"
    said = {*sentence.opening.split(), *sentence.closing.split()}
    for tone in TONES:
        if tone in said and tone != scene.tone:
            return f"the background is not {tone}"
    for word, count in NUMBERS.items():
        if word in said and not count == len(sentence.mentions) == len(scene.objects):
            return f"there are not {word} shapes, or not {word} are named"
    # Each mention needs an object of its own: try every assignment.
    bindings = [
        chosen
        for chosen in permutations(scene.objects, len(sentence.mentions))
        if all(_fits(mention, thing) for mention, thing in zip(sentence.mentions, chosen, strict=True))
    ]
    if not bindings:
        return "one object is named more than once"
    direction = _direction(sentence.links[0]) if len(sentence.links) == 1 else None
    if direction is not None and not any(holds(direction, a, b) for a, b in bindings):
        return f"the first object is not {sentence.links[0].removeprefix('is ')} the second"
    return ""


def judge(text: str, scene: Scene) -> Verdict:
    """Whether everything `text` states is true of `scene`; a text outside the grammar is not true."""
    sentence = parse(text)
    if sentence is None:
        return Verdict(parsed=False, true=False, objects_named=0, reason="not a sentence about shapes")
    reason = _first_error(sentence, scene)
    return Verdict(parsed=True, true=reason == "", objects_named=len(sentence.mentions), reason=reason)


def clear_direction(a: SceneObject, b: SceneObject) -> str | None:
    """Where `a` lies as seen from `b`, when nobody would argue about it."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > CLEAR_DISTANCE and abs(dx) > CLEAR_RATIO * abs(dy):
        return "right" if dx > 0 else "left"
    if abs(dy) > CLEAR_DISTANCE and abs(dy) > CLEAR_RATIO * abs(dx):
        return "below" if dy > 0 else "above"
    return None


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
    direction = _direction(sentence.links[0])
    if direction is not None:
        verb = "is " if sentence.links[0].startswith("is ") else ""
        edits.append(replace(sentence, links=(verb + _pick(PHRASES[FLIPPED[direction]], rng),)))
    for spot, old in enumerate(sentence.mentions):
        if old.size is not None:
            other = "small" if _SIZE_OF[old.size] == "large" else "large"
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
        | {*COLOURS, *SHAPES, *TEXTURES, *TONES, *_SIZE_OF, "a", "an", "the", ",", *"0123456789"}
    )
)
