"""Zero-shot classes and the linear probe: against loops over single images and texts."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from image_files import jpeg, put, put_json
from PIL import Image
from small_run import save_models
from test_blip_clip import clip_folder, hf_config, write_tokenizer

from blip import load_blip
from blip.image import crop_transform, decode, image_transform
from pipelines import eval_zeroshot
from pipelines.config import ConfigError, load_config, run_main
from pipelines.labelled import (
    Class,
    ImageSet,
    LabelColumns,
    class_numbers,
    fingerprint,
    read_classes,
    read_images,
    read_templates,
)
from pipelines.world_classes import ClassesRun, write_classes
from pipelines.zeroshot import (
    class_embeddings,
    class_results,
    fit_probe,
    places_of_truth,
    prompts,
    set_results,
    with_drops,
)

# ---- classes and their results -------------------------------------------------------------------


def test_a_class_is_the_mean_of_its_prompts() -> None:
    """openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb, class by class."""
    texts = prompts(["cat", "{dog"], ["a {}", "the {}.", "{} {"])
    assert texts[:2] == ["a cat", "the cat."] and texts[3:] == ["a {dog", "the {dog.", "{dog {"]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    features /= features.norm(dim=-1, keepdim=True)
    found = class_embeddings(features, 3)
    for number in range(2):
        expected = features[3 * number : 3 * number + 3].mean(dim=0)
        torch.testing.assert_close(found[number], expected / expected.norm())


def test_places_count_ties_against_the_truth() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (40, 7)).astype(float)
    labels = rng.integers(0, 7, 40)
    expected = [
        sum(row[c] >= row[label] for c in range(7) if c != label)
        for row, label in zip(scores, labels, strict=True)
    ]
    assert places_of_truth(torch.tensor(scores), torch.tensor(labels)).tolist() == expected


def test_results_by_class_and_by_set() -> None:
    labels, places = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 4, 5, 0])
    classes = class_results(places, labels, {0: "cat", 2: "dog"})
    assert classes == {
        "cat": {"images": 4, "top1": 0.75, "top5": 1.0},
        "dog": {"images": 2, "top1": 0.5, "top5": 0.5},
    }
    found = set_results(places, classes)
    assert found == {"images": 6, "top1": 4 / 6, "top5": 5 / 6, "mean_per_class": 0.625}


def test_drops_are_measured_from_the_first_set() -> None:
    found = with_drops({"v1": {"top1": 0.75}, "sketch": {"top1": 0.5}, "v2": {"top1": 1.0}})
    assert found == {
        "v1": {"top1": 0.75},
        "sketch": {"top1": 0.5, "drop": 0.25},
        "v2": {"top1": 1.0, "drop": -0.25},
    }


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and pictures of 48 classes."""
    found = tmp_path_factory.mktemp("zeroshot")
    save_models(found / "models")
    write_classes(ClassesRun(str(found / "world"), images_per_class=2, side=32))
    lines = (found / "world/classes.txt").read_text().splitlines()
    (found / "some.txt").write_text("\n".join(lines[10:16]))
    for name in ("test", "shifted"):
        for label in lines[10:16]:
            for image in (found / "world" / name / label).iterdir():
                put(found / "few" / name / label / image.name, image.read_bytes())
    return found


def config(folder: Path, out: str, **more: Any) -> list[str]:
    tree = {
        "out": str(folder / out),
        "model": str(folder / "models/filter"),
        "classes": str(folder / "some.txt"),
        "templates": str(folder / "world/templates.txt"),
        "sets": {name: {"images": str(folder / "few" / name)} for name in ("test", "shifted")},
        "device": "cpu",
        "batch_size": 5,
    }
    return [put_json(folder / f"{out}.yaml", tree | more)]


def metrics(folder: Path, out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / out / "metrics.json").read_text())
    return found


def one_by_one(folder: Path, name: str) -> list[tuple[str, list[str]]]:
    """(class, classes from the nearest on) of every image, each image and text encoded alone."""
    model = load_blip(folder / "models/filter")
    assert model.tokenizer is not None
    names = (folder / "some.txt").read_text().splitlines()
    templates = (folder / "world/templates.txt").read_text().splitlines()
    embeddings = []
    with torch.no_grad():
        for label in names:
            texts = [line.replace("{}", label) for line in templates]
            features = [model.encode_texts(*model.tokenizer([text], 35))[0] for text in texts]
            mean = torch.stack(features).mean(0)
            embeddings.append(mean / mean.norm())
        found = []
        for label in names:
            for path in sorted((folder / "few" / name / label).iterdir()):
                image = model.encode_images(image_transform(decode(path.read_bytes()), 32)[None])[0]
                scores = {other: float(image @ one) for other, one in zip(names, embeddings, strict=True)}
                found.append((label, sorted(names, key=lambda other: -scores[other])))
    return found


def test_a_run_is_what_every_image_and_text_alone_give(folder: Path) -> None:
    assert eval_zeroshot.main(config(folder, "plain")) == 0
    found = metrics(folder, "plain")
    tops = {}
    for name in ("test", "shifted"):
        ranked = one_by_one(folder, name)
        tops[name] = np.mean([label == order[0] for label, order in ranked])
        result = found["zeroshot"]["sets"][name]
        assert result["top1"] == pytest.approx(tops[name]) and result["images"] == 12
        assert result["top5"] == pytest.approx(np.mean([label in order[:5] for label, order in ranked]))
        for label, scored in found["zeroshot"]["classes"][name].items():
            own = [order[0] == label for truth, order in ranked if truth == label]
            assert scored["top1"] == pytest.approx(np.mean(own)) and scored["images"] == 2
    assert found["zeroshot"]["sets"]["shifted"]["drop"] == pytest.approx(tops["test"] - tops["shifted"])
    assert found["protocol"]["templates"][0] == "a {}" and found["protocol"]["classes"] == 6
    assert len(found["weights"]["sha256"]) == len(found["data"]["sets"]["test"]["fingerprint"]) == 64


def test_classes_that_read_alike_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To this vocabulary "gnu" and "emu" are unknown words, and " Red   ring!" is a red ring."""
    labels = (folder / "some.txt").read_text().splitlines()
    names = ["gnu", "emu", labels[2], f" {labels[2].upper()} !", *labels[4:]]
    lines = [f"{label}\t{name}" for label, name in zip(labels, names, strict=True)]
    classes = put(folder / "alike.txt", "\n".join(lines).encode())
    assert eval_zeroshot.main(config(folder, "alike", classes=str(classes))) == 0
    told = f"the model reads 4 classes like another one: gnu, emu, {labels[2]}, {labels[2].upper()} !"
    assert capsys.readouterr().out.splitlines()[0] == told
    assert eval_zeroshot.main(config(folder, "unlike")) == 0
    assert "like another" not in capsys.readouterr().out


def test_a_set_of_some_classes_is_judged_among_them(folder: Path) -> None:
    sets = {
        "some": {"images": str(folder / "few/test"), "labels": str(folder / "some.txt")},
        "all": {"images": str(folder / "world/test")},
    }
    classes = str(folder / "world/classes.txt")
    assert eval_zeroshot.main(config(folder, "subset", sets=sets, classes=classes)) == 0
    assert eval_zeroshot.main(config(folder, "six")) == 0
    found, six = metrics(folder, "subset")["zeroshot"]["sets"], metrics(folder, "six")["zeroshot"]["sets"]
    assert found["some"] == six["test"] and found["all"]["images"] == 96


def test_a_probe_is_fitted_to_the_class_token_of_its_own_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"images": str(folder / "few/test")}
    assert eval_zeroshot.main(config(folder, "probed", probe={"train": train, "strength": 1e4})) == 0
    found = metrics(folder, "probed")["probe"]
    model = load_blip(folder / "models/filter")
    names = (folder / "some.txt").read_text().splitlines()
    paths = [path for label in names for path in sorted((folder / "few/test" / label).iterdir())]
    pixels = torch.stack([image_transform(decode(path.read_bytes()), 32) for path in paths])
    with torch.no_grad():
        tokens = model.image_tokens(pixels)[:, 0]
    labels = torch.arange(12) // 2
    expected = (fit_probe(tokens, labels, 6, 1e4)(tokens).argmax(1) == labels).double().mean()
    assert found["sets"]["test"]["top1"] == pytest.approx(float(expected))
    assert found["strength"] == 1e4 and expected > 0.9
    assert "probe" in capsys.readouterr().out
    assert eval_zeroshot.main(config(folder, "searched", probe={"train": train, "iterations": 20})) == 0
    assert 1e-6 <= metrics(folder, "searched")["probe"]["strength"] <= 1e6


def test_clip_is_asked_as_transformers_is(folder: Path) -> None:
    """Its own words, not cleaned up, and images cropped in the middle."""
    theirs = clip_folder(folder / "clip", hf_config())
    write_tokenizer(folder / "clip")
    names = ("red cat", "old hat")
    for label, shape in zip(names, ((40, 60), (70, 40)), strict=True):
        for i in range(3):
            put(folder / "wide" / label / f"{i}.jpg", wide(shape, i))
    (given,) = config(
        folder,
        "clip_run",
        model=str(folder / "clip"),
        classes=str(put(folder / "words.txt", "\n".join(names).encode())),
        sets={"x": {"images": str(folder / "wide")}},
        max_length=20,
    )
    assert eval_zeroshot.main([given]) == 0
    found = metrics(folder, "clip_run")
    assert found["zeroshot"]["sets"]["x"]["images"] == 6 and found["protocol"]["image_size"] == 32
    run = load_config(eval_zeroshot.ZeroshotRun, given)
    model = eval_zeroshot.load_encoder(run.model, None)
    texts = ["a red cat", "An OLD hat!", "the end"]
    written = transformers.CLIPTokenizer.from_pretrained(str(folder / "clip"))(texts)["input_ids"]
    paths = sorted((folder / "wide").rglob("*.jpg"))
    with torch.no_grad():
        words = [theirs.get_text_features(torch.tensor([ids])).pooler_output[0] for ids in written]
        cropped = torch.stack([crop_transform(decode(path.read_bytes()), 32) for path in paths])
        images = theirs.get_image_features(cropped).pooler_output
    expected = torch.stack(words) / torch.stack(words).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(eval_zeroshot.encode_texts(model, run, texts), expected, atol=1e-4, rtol=1e-4)
    own = eval_zeroshot.encode_images(model.encode_images, model, run, run.sets["x"])
    torch.testing.assert_close(own, images / images.norm(dim=-1, keepdim=True), atol=1e-4, rtol=1e-4)


def wide(shape: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


# ---- the same images in other forms --------------------------------------------------------------


def parquet(path: Path, labels: list[Any], image: str = "image", wrapped: bool = True) -> ImageSet:
    data = [jpeg(i) for i in range(len(labels))]
    images = [{"bytes": one, "path": None} for one in data] if wrapped else data
    pq.write_table(pa.table({image: images, "label": labels}), path)
    return ImageSet(str(path))


CLASSES = [Class("n01", "cat"), Class("n02", "dog"), Class("n03", "owl")]
COLUMNS = LabelColumns()


def test_labels_are_folders_texts_or_lines(tmp_path: Path) -> None:
    """A folder by wordnet's id, as ImageNet; numbers, as Hugging Face datasets; texts."""
    for i, label in enumerate(["n01", "n01", "n02", "n03"]):
        put(tmp_path / "folders" / label / f"{i}.jpg", jpeg(i))
    folders = ImageSet(str(tmp_path / "folders"))
    numbers = parquet(tmp_path / "numbers.parquet", [0, 0, 1, 2])
    texts = parquet(tmp_path / "texts.parquet", ["n01", "n01", "n02", "n03"], "img", wrapped=False)
    other = LabelColumns(image="img")
    for given, columns in ((folders, COLUMNS), (numbers, COLUMNS), (texts, other)):
        assert class_numbers("x", given, CLASSES, columns) == [0, 0, 1, 2]
        assert [image.data for image in read_images(given, columns)] == [jpeg(i) for i in range(4)]
    before = fingerprint(folders), fingerprint(numbers)
    assert before == (fingerprint(folders), fingerprint(numbers))
    put(tmp_path / "folders/n03/3.jpg", jpeg(3) + b"\0")
    parquet(tmp_path / "numbers.parquet", [0, 0, 1, 1])
    assert not set(before) & {fingerprint(folders), fingerprint(numbers)}


def test_classes_have_labels_and_names(tmp_path: Path) -> None:
    lines = "n01\ttench\n\n  golden retriever \nn03\tcr\u00eape\n"
    path = put(tmp_path / "classes.txt", lines.encode())
    assert read_classes(str(path)) == [
        Class("n01", "tench"),
        Class("golden retriever", "golden retriever"),
        Class("n03", "cr\u00eape"),
    ]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("cat\ndog\ncat\nowl\ndog\ndog", r"lists 'cat' 2 times, 'dog' 3 times; each must be there once"),
        ("n01\tcrane\nn02\tcrane", "lists 'crane' 2 times"),
        ("n01\tcrane\nn01\tdog", "lists 'n01' 2 times"),
        ("n01\tcrane\n\t dog\nn03\t", "dog, n03 lacks a name or a label"),
        ("\n \n", "is empty; it must hold"),
    ],
)
def test_bad_lists_of_classes(tmp_path: Path, lines: str, complaint: str) -> None:
    path = put(tmp_path / "classes.txt", lines.encode())
    with pytest.raises(ValueError, match=rf"classes\.txt:? {complaint}"):
        read_classes(str(path))


def test_bad_templates(tmp_path: Path) -> None:
    path = put(tmp_path / "templates.txt", b"a {}\na photo\n{} or {}\n")
    with pytest.raises(ValueError, match=r"templates\.txt: 'a photo', '\{\} or \{\}' must hold \{\} once"):
        read_templates(str(path))
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_templates(str(tmp_path / "nowhere.txt"))


def test_images_without_a_class_and_classes_without_an_image_are_listed(tmp_path: Path) -> None:
    put(tmp_path / "set/n01/a.jpg", jpeg(0))
    put(tmp_path / "set/n9/b.jpg", jpeg(1))
    put(tmp_path / "set/c.jpg", jpeg(2))
    wanted = (
        r"set mine, .*set: images without a class of the list: c\.jpg, n9/b\.jpg \(n9\); "
        r"classes without an image: n02, n03\. Mend"
    )
    with pytest.raises(ValueError, match=wanted):
        class_numbers("mine", ImageSet(str(tmp_path / "set")), CLASSES, COLUMNS)
    given = parquet(tmp_path / "x.parquet", [0, 3, None, -1, 1, 2])
    with pytest.raises(ValueError, match=r"x\.parquet row 1 \(3\), \S+ row 2, \S+ row 3 \(-1\)"):
        class_numbers("mine", given, CLASSES, COLUMNS)
    with pytest.raises(ValueError, match=r"no column 'label', only 'image', 'class'"):
        pq.write_table(pa.table({"image": [b"x"], "class": [1]}), tmp_path / "y.parquet")
        class_numbers("mine", ImageSet(str(tmp_path / "y.parquet")), CLASSES, COLUMNS)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        class_numbers("mine", ImageSet(str(tmp_path / "nowhere")), CLASSES, COLUMNS)
    labels = put(tmp_path / "labels.txt", b"n01\nn44\n")
    with pytest.raises(ValueError, match="n44 are not among the classes"):
        class_numbers("mine", ImageSet(str(tmp_path / "set"), str(labels)), CLASSES, COLUMNS)


def test_bad_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="sets must name a set or more"):
        eval_zeroshot.main(config(folder, "none", sets={}))
    with pytest.raises(SystemExit) as stop:
        run_main(eval_zeroshot.main, config(folder, "wrong", model=str(folder / "models/captioner")))
    assert stop.value.code == 1 and "reads texts" in capsys.readouterr().err
    for label in (folder / "some.txt").read_text().splitlines():
        put(tmp_path / "single" / label / "a.jpg", jpeg(0))
    probe = {"train": {"images": str(tmp_path / "single")}}
    with pytest.raises(ValueError, match=r"no class has two images to choose probe\.strength by"):
        eval_zeroshot.main(config(folder, "single", probe=probe))
    put(tmp_path / "single" / label / "a.jpg", b"no image")
    with pytest.raises(ValueError, match=r"test image .*a\.jpg cannot be decoded"):
        eval_zeroshot.main(config(folder, "broken", sets={"x": {"images": str(tmp_path / "single")}}))
