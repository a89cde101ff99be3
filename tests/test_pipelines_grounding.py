"""Objects that nobody sees, by hand and against CHAIR's rules; the grounding gap, image by image."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_files import put, put_json
from small_run import save_models
from test_pipelines_evaluate import WORLD, config

from blip import Blip, load_blip
from blip.image import decode, image_transform
from blip.tokenizer import clean_caption
from pipelines import eval_captions
from pipelines.grounding import grounding_gap, hallucination, mentions, read_objects, read_synonyms
from pipelines.testset import TestImage, read_testset
from pipelines.world import write_world

SYNONYMS = """person, girl, boy, firefighter
dog, puppy
hot dog
tie, bow tie
toilet, toilet seat
chair, seat
knife
bus
bicycle, bike
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("grounding")
    save_models(found / "models")
    write_world(WORLD, found / "world")
    return found


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two girls and a boy ride bikes.", ["person", "person", "bicycle"]),
        ("a hot dog and a dog", ["hot dog", "dog"]),  # the longest name counts
        ("three hot dogs beside puppies", ["hot dog", "dog"]),
        ("a man in a bow tie on a toilet seat", ["tie", "toilet"]),  # and no seat
        ("people with knives on buses", ["person", "knife", "bus"]),
        ("a bus, a seat", ["bus", "chair"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_words_name_objects(tmp_path: Path, caption: str, objects: list[str]) -> None:
    synonyms = read_synonyms(str(put(tmp_path / "synonyms.txt", SYNONYMS.encode())))
    names = {tuple(word.split()): name for word, name in synonyms.items()}
    words = caption.lower().replace(",", "").replace(".", "").split()
    assert list(mentions(words, names)) == objects


def test_hallucination_by_hand() -> None:
    objects = {"1": ["dog", "bike"], "2": ["person"], "3": [], "4": ["cat"]}
    synonyms = {"bicycle": "bicycle", "bike": "bicycle", "girl": "person", "person": "person"}
    captions = {
        "1": "a girl with a dog on a bicycle",  # of three, the girl
        "2": "the girl and another girl",  # none
        "3": "a cat and a cat chase dogs",  # all three; cat and dog are in lists of others
        "4": "green grass",
    }
    found = hallucination(captions, objects, synonyms)
    assert found == {"hallucinated_captions": 2 / 4, "hallucinated_objects": 4 / 8}
    assert hallucination({"4": "grass"}, objects, {}) == {
        "hallucinated_captions": 0,
        "hallucinated_objects": 0,
    }
    with pytest.raises(ValueError, match="no list of objects for the images 5, 6; give each one"):
        hallucination({"1": "x", "5": "x", "6": "x"}, objects, synonyms)


@pytest.mark.parametrize("data", [b"[]", b'{"1": "dog"}', b'{"1": [3]}', b'{"1": [" "]}', b"{"])
def test_bad_lists_of_objects(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"x\.json: (must hold .key|cannot be read as JSON)"):
        read_objects(str(put(tmp_path / "x.json", data)))
    with pytest.raises(ValueError, match=r"nowhere\.txt: cannot be read as text"):
        read_synonyms(str(tmp_path / "nowhere.txt"))


def test_a_run_counts_what_its_captions_name(folder: Path, tmp_path: Path) -> None:
    images = list(read_testset([str(folder / "world/test")]))
    objects = put_json(tmp_path / "objects.json", {image.key: ["star"] for image in images})
    synonyms = str(put(tmp_path / "synonyms.txt", b"star\nother, circle, square, ring, cross\n"))
    assert eval_captions.main(config(folder, "captioner", "named", objects=objects, synonyms=synonyms)) == 0
    found = json.loads((folder / "named/metrics.json").read_text())["metrics"]
    rows = json.loads((folder / "named/captions.json").read_text())
    words = [row["caption"].split() for row in rows]
    names = [
        [word for word in text if word in ("star", "circle", "square", "ring", "cross")] for text in words
    ]
    wrong = [[word for word in text if word != "star"] for text in names]
    assert found["hallucinated_captions"] == sum(map(bool, wrong)) / 9
    assert found["hallucinated_objects"] == sum(map(len, wrong)) / max(1, sum(map(len, names)))


# ---- the gap -------------------------------------------------------------------------------------


def loss_of(model: Blip, seen: TestImage, text: str, prompt: str) -> tuple[float, int]:
    """Summed over the words behind the prompt, labels smoothed by a tenth; and how many they are."""
    assert model.tokenizer is not None
    size = model.config.vision.image_size
    image = model.project_image(model.image_tokens(image_transform(decode(seen.data), size)[None]))
    ids, _ = model.tokenizer([f"{prompt} {clean_caption(text)}"], 40)
    ids[0, 0] = model.config.dec_id
    states, _ = model.med.write(ids[:, :-1], image)
    first = len(model.tokenizer.prompt(prompt)) - 1
    logits, wanted = model.med.logits(states)[0, first:], ids[0, 1 + first :]
    return float(F.cross_entropy(logits, wanted, label_smoothing=0.1, reduction="sum")), len(wanted)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "a"])
def test_the_gap_is_that_of_every_image_with_the_one_before_it(folder: Path, prompt: str) -> None:
    """Nine images in batches of four: the last batch has one, which has no other."""
    model = load_blip(folder / "models/captioner")
    images = list(read_testset([str(folder / "world/test")]))
    total, words = 0.0, 0
    for batch in (images[:4], images[4:8]):
        for i, image in enumerate(batch):
            own, count = loss_of(model, image, image.texts[0], prompt)
            total += loss_of(model, batch[i - 1], image.texts[0], prompt)[0] - own
            words += count
    found = grounding_gap(model, images, prompt, 4)
    assert found == pytest.approx(total / words, abs=1e-5)
    assert abs(total / words) > 1e-2  # or the test would show nothing


def test_no_gap_where_nothing_can_be_compared(folder: Path) -> None:
    model = load_blip(folder / "models/captioner")
    images = list(read_testset([str(folder / "world/test")]))
    assert grounding_gap(model, images, "", 1) is None
    assert grounding_gap(model, [TestImage(image.key, image.data, ()) for image in images], "", 4) is None
