"""The language of the generated world, and its careful judge.

A caption is a `Sentence`: an opening, the objects it names, the links between them, and a closing. The judge
parses any text back into a sentence and checks every claim it makes; who writes what is in `world_captions`.

Coordinates: x and y of an object's centre are fractions of the side of the picture, y grows downwards.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from itertools import permutations

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


def phrase(mention: Mention) -> str:
    words = [w for w in (mention.size, mention.texture, mention.colour, mention.shape) if w is not None]
    article = "the" if mention.definite else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def render(sentence: Sentence) -> str:
    """The sentence as text."""
    text = sentence.opening + ("," if sentence.opening.endswith("shapes") else "")
    for link, mention in zip(("", *sentence.links), sentence.mentions, strict=True):
        comma = "," if mention is not sentence.mentions[0] and link == "" else ""
        text = f"{text}{comma} {link} {phrase(mention)}"
    return " ".join(f"{text} {sentence.closing}".split())


SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_OBJECT = re.compile(
    rf"\b(a|an|the) (?:({'|'.join(SIZE_OF)}) )?(?:({'|'.join(TEXTURES)}) )?"
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


def direction_of(link: str) -> str | None:
    return DIRECTIONS.get(link.removeprefix("is "))


def holds(direction: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` lies in `direction` of `b`."""
    ahead = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return ahead[direction] > JUDGE_MARGIN


def _fits(mention: Mention, thing: SceneObject) -> bool:
    return (
        (mention.colour, mention.shape) == (thing.colour, thing.shape)
        and (mention.size is None or SIZE_OF[mention.size] == thing.size)
        and mention.texture in (None, thing.texture)
    )


def _bindings(sentence: Sentence, scene: Scene) -> list[tuple[SceneObject, ...]]:
    """What the mentions can stand for, each for an object of its own: every assignment that fits."""
    return [
        chosen
        for chosen in permutations(scene.objects, len(sentence.mentions))
        if all(_fits(mention, thing) for mention, thing in zip(sentence.mentions, chosen, strict=True))
    ]


def _first_error(sentence: Sentence, scene: Scene) -> str:
    """What the sentence says that is not so; "" when all of it is."""
    for mention in sentence.mentions:
        if mention.colour is None:
            return f"{phrase(mention)} is named without a colour"
        if not any(_fits(mention, thing) for thing in scene.objects):
            return f"there is no {phrase(replace(mention, definite=True)).removeprefix('the ')}"
    said = {*sentence.opening.split(), *sentence.closing.split()}
    for tone in TONES:
        if tone in said and tone != scene.tone:
            return f"the background is not {tone}"
    for word, count in NUMBERS.items():
        if word in said and not count == len(sentence.mentions) == len(scene.objects):
            return f"there are not {word} shapes, or not {word} are named"
    bindings = _bindings(sentence, scene)
    if not bindings:
        return "one object is named more than once"
    direction = direction_of(sentence.links[0]) if len(sentence.links) == 1 else None
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


def names_things(text: str, scene: Scene) -> bool:
    """Whether the things that `text` names are there, wherever it says they lie."""
    sentence = parse(text)
    return sentence is not None and bool(_bindings(sentence, scene))
