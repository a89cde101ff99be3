"""Whether captions are about their images: objects that they name and nobody sees, and what a captioner's
words owe to the image.

Hallucinated objects are those of CHAIR (Rohrbach et al. 2018). An image has a list of its objects, a JSON
file {key: [object, ...]}; other words for an object stand in a text file, a line for each object with its
name and the words, parted by commas, as in LisaAnne/Hallucination data/synonyms.txt.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blip.model import Batch, Blip
from blip.tokenizer import clean_caption
from capfilt.schema import short_reason
from pipelines.alarms import of_neighbours
from pipelines.metrics import tokenize
from pipelines.testset import TestImage, batches_of_pixels, some
from pipelines.turns import all_turns

Phrase = tuple[str, ...]

MAX_LENGTH = 40  # tokens of a reference, as in training
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
}
ENDINGS = {"s": ("",), "es": ("",), "ies": ("y",), "ves": ("f", "fe")}  # of plurals -> of singulars

# ---- objects that are not there ------------------------------------------------------------------


def hallucination(
    captions: Mapping[str, str], objects: Mapping[str, Sequence[str]], synonyms: Mapping[str, str]
) -> dict[str, float]:
    """{"hallucinated_captions", "hallucinated_objects"}, CHAIR_s and CHAIR_i of the paper.

    The share of captions that name an object which is not in the list of their image, and the share of such
    among all names of objects in captions, 0 where there is none. A name is an object of any list, or one of
    `synonyms` {words: object}; of several that fit the longest counts ("hot dog" is no dog), in the singular
    or the plural. Errors: ValueError that lists the keys without a list of objects.
    """
    if absent := [key for key in captions if key not in objects]:
        raise ValueError(f"no list of objects for the images {some(absent)}; give each one, or an empty list")
    listed = {name for names in objects.values() for name in names}
    names = {_phrase(name): name for name in listed} | {_phrase(word): of for word, of in synonyms.items()}
    named = wrong = captions_with_wrong = 0
    for key, text in captions.items():
        there = {names[_phrase(name)] for name in objects[key]}
        found = list(mentions(tokenize(text), names))
        strange = sum(name not in there for name in found)
        named, wrong = named + len(found), wrong + strange
        captions_with_wrong += strange > 0
    return {
        "hallucinated_captions": captions_with_wrong / len(captions),
        "hallucinated_objects": wrong / max(1, named),
    }


def mentions(words: Sequence[str], names: Mapping[Phrase, str]) -> Iterator[str]:
    """The objects that words name, from left to right; no word is part of two names."""
    longest = max(map(len, names), default=0)
    start = 0
    while start < len(words):
        ends = range(min(start + longest, len(words)), start, -1)
        found = next(((end, name) for end in ends if (name := _named(words[start:end], names))), None)
        if found:
            yield found[1]
        start = found[0] if found else start + 1


def _named(words: Sequence[str], names: Mapping[Phrase, str]) -> str | None:
    *first, last = words
    forms = [last, *([IRREGULAR[last]] if last in IRREGULAR else [])]
    for ending, singulars in ENDINGS.items():
        if last.endswith(ending):
            forms += [last.removesuffix(ending) + singular for singular in singulars]
    return next((names[phrase] for form in forms if (phrase := (*first, form)) in names), None)


def _phrase(name: str) -> Phrase:
    return tuple(tokenize(name))


def read_objects(file: str) -> dict[str, list[str]]:
    """Errors: ValueError for a file that is no JSON object of lists of names."""
    try:
        found = json.loads(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({short_reason(error)})") from error
    lists = list(found.values()) if isinstance(found, dict) else [None]
    wrong = [
        one
        for one in lists
        if not isinstance(one, list) or any(not isinstance(name, str) or not _phrase(name) for name in one)
    ]
    if wrong:
        raise ValueError(
            f"{file}: must hold {{key: [object, ...]}}, but found {short_reason(json.dumps(wrong[0]))}"
        )
    return found


def read_synonyms(file: str) -> dict[str, str]:
    """Words -> object; a word of two objects is the later one's, as in CHAIR's code."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as text ({short_reason(error)})") from error
    rows = [[word.strip() for word in line.split(",") if _phrase(word)] for line in lines]
    return {word: row[0] for row in rows for word in row}


# ---- what words owe to the image -----------------------------------------------------------------


def grounding_gap(model: Blip, images: Iterable[TestImage], prompt: str, batch_size: int) -> float | None:
    """LM loss of references with another's image minus that with the own, in nats a word.

    The alarm of training (pipelines.alarms), over a whole test set: the first reference of each image, the
    other image that before it in its batch. Near 0, the captioner does not look. None where there is no
    reference, or no batch with two images that have one. Several processes share the batches.
    """
    device = next(model.parameters()).device
    own: list[tuple[float, int]] = []
    described = (image for image in images if image.texts)
    for chosen, pixels in batches_of_pixels(described, model.config.vision.image_size, batch_size, device):
        texts = [image.texts[0] for image in chosen]
        own.append(_gap(model, pixels, texts, prompt) if len(chosen) > 1 else (0.0, 0))
    gaps = all_turns(own)
    words = sum(count for _, count in gaps)
    return sum(gap * count for gap, count in gaps) / words if words else None


def _gap(model: Blip, pixels: Tensor, texts: Sequence[str], prompt: str) -> tuple[float, int]:
    """Of a batch, in nats a word; and how many words it has."""
    assert model.tokenizer is not None, "a model that has written captions has a vocabulary"
    begun = [f"{prompt} {clean_caption(text)}" for text in texts]
    ids, mask = (tensor.to(pixels.device) for tensor in model.tokenizer(begun, MAX_LENGTH))
    numbers = torch.arange(len(texts), device=pixels.device)
    batch = Batch(pixels, ids, mask, numbers, len(model.tokenizer.prompt(prompt)) - 1)
    image = model.med.project_image(model.image_tokens(pixels))
    loss, words = model.lm_loss(batch, image)
    return float(model.lm_loss(batch, of_neighbours(image))[0] - loss), words
