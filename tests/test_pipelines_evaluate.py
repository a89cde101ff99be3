"""Evaluation of whole models on clean shards, against scoring every pair and every image one by one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_run import save_models
from tiny_language import opt_folder
from tiny_qformer import CONFIG, save_tower, tiny_stage1

from blip import Blip, load_blip
from blip.generate import Decoding
from blip.image import decode, image_transform
from blip.tokenizer import Tokenizer, clean_caption
from capfilt.schema import CLEAN
from pipelines import eval_captions, eval_retrieval
from pipelines.config import run_main
from pipelines.metrics import cider_d
from pipelines.testset import TestImage, batches_of_pixels, read_testset, server_id
from pipelines.world import WorldConfig, write_world
from qformer import Stage1, Stage2, load_stage1, load_stage2
from qformer.language import load_language
from qformer.stage2 import start_stage2

WORLD = WorldConfig(
    seed=5, noisy_rows=0, clean_rows=0, test_rows=9, shard_rows=4, captions_per_image=2, side=48
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/{captioner,filter,stage1,stage2} of random weights, and test shards in world/test."""
    found = tmp_path_factory.mktemp("evaluate")
    save_models(found / "models")
    save_stages(found / "models")
    write_world(WORLD, found / "world")
    return found


def save_stages(folder: Path) -> None:
    """Both stages of BLIP-2, beside a ViT of their own."""
    tokenizer = Tokenizer(folder / "words")
    words = replace(CONFIG.qformer, vocab_size=tokenizer.dec + 1)
    shape = replace(CONFIG, qformer=words, dec_id=tokenizer.dec, vision_source=str(folder / "vit.pth"))
    first = tiny_stage1(config=shape, tokenizer=tokenizer)
    save_tower(first, folder / "vit.pth")
    first.save_pretrained(folder / "stage1")
    lm = opt_folder(folder / "opt")
    second = start_stage2(first, load_language(lm, torch.float32), str(lm))
    second.projection.weight.data.mul_(20)  # or what is written hardly depends on the image
    second.save_pretrained(folder / "stage2")


def config(folder: Path, model: str, out: str, **more: object) -> list[str]:
    path = folder / f"{out}.yaml"
    tree = {
        "out": str(folder / out),
        "model": str(folder / "models" / model),
        "shards": [str(folder / "world/test")],
        "device": "cpu",
        "batch_size": 4,
    }
    path.write_text(json.dumps(tree | more))  # JSON is YAML
    return [str(path)]


def hits(scores: torch.Tensor, right: list[set[int]]) -> float:
    """Share of rows whose best candidate is a right one, and better than every wrong one."""
    found = 0
    for row, truth in zip(scores.tolist(), right, strict=True):
        wrong = max(value for place, value in enumerate(row) if place not in truth)
        found += max(row[place] for place in truth) > wrong
    return found / len(right)


def every_pair(model: Blip | Stage1, folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Cosines and ITM logits [I, T], each pair scored alone, and the image of each text."""
    assert model.tokenizer is not None
    images = list(read_testset([str(folder / "world/test")]))
    owners = [number for number, image in enumerate(images) for _ in image.texts]
    cosine, logit = torch.zeros(2, len(images), len(owners))
    with torch.no_grad():
        for i, image in enumerate(images):
            pixels = image_transform(decode(image.data), model.config.vision.image_size)[None]
            for t, text in enumerate(text for other in images for text in other.texts):
                ids, mask = model.tokenizer([clean_caption(text, 30)], 35)
                # of a stage 1 there is a feature for each query, the nearest of which counts
                cosine[i, t] = (model.encode_images(pixels) * model.encode_texts(ids, mask)).sum(-1).max()
                logit[i, t] = model.match(ids, mask, model.image_tokens(pixels))[0, 1]
    return cosine, logit, owners


@pytest.mark.parametrize(("name", "load"), [("filter", load_blip), ("stage1", load_stage1)])
def test_retrieval_is_what_scoring_every_pair_alone_gives(
    folder: Path, name: str, load: Callable[[Path], Blip | Stage1]
) -> None:
    k = 6
    assert eval_retrieval.main(config(folder, name, f"retrieval_{name}", protocol={"k": k})) == 0
    found = json.loads((folder / f"retrieval_{name}/metrics.json").read_text())
    cosine, logit, owners = every_pair(load(folder / "models" / name), folder)
    texts_of = [{t for t, owner in enumerate(owners) if owner == i} for i in range(9)]
    images_of = [{owner} for owner in owners]
    assert (found["images"], found["texts"]) == (9, 18)
    assert found["itc"]["tr@1"] == pytest.approx(hits(cosine, texts_of))
    assert found["itc"]["ir@1"] == pytest.approx(hits(cosine.T, images_of))
    for name, scores, itm, right in (
        ("tr@1", cosine, logit, texts_of),
        ("ir@1", cosine.T, logit.T, images_of),
    ):
        ranked = scores - 1000
        for row, best in enumerate(scores.topk(k, 1).indices):
            ranked[row, best] = scores[row, best] + itm[row, best]
        assert found["itm"][name] == pytest.approx(hits(ranked, right))
    assert found["protocol"] | {"k": k, "image_size": 32} == found["protocol"]
    assert len(found["weights"]["sha256"]) == len(found["data"]["fingerprint"]) == 64


def load_in_float32(folder: Path) -> Stage2:
    return load_stage2(folder, dtype=torch.float32)


@pytest.mark.parametrize(("name", "load"), [("captioner", load_blip), ("stage2", load_in_float32)])
def test_captions_are_those_of_each_image_alone_and_scored_against_its_references(
    folder: Path, name: str, load: Callable[[Path], Blip | Stage2]
) -> None:
    protocol = {"prompt": "", "decoding": {"beams": 2, "min_length": 3, "max_length": 12}}
    assert eval_captions.main(config(folder, name, f"captions_{name}", protocol=protocol)) == 0
    written = json.loads((folder / f"captions_{name}/captions.json").read_text())
    model = load(folder / "models" / name)
    images = list(read_testset([str(folder / "world/test")]))
    decoding = Decoding(beams=2, min_length=3, max_length=12)
    alone = {}
    for image in images:
        pixels = image_transform(decode(image.data), model.config.vision.image_size)[None]
        alone[image.key] = model.caption(pixels, "", decoding)[0]
    assert [row["caption"] for row in written] == list(alone.values())
    found = json.loads((folder / f"captions_{name}/metrics.json").read_text())
    assert found["metrics"]["cider_d"] == cider_d(alone, {i.key: i.texts for i in images})[0]
    assert found["metrics"]["unique_captions"] == len(set(alone.values())) / 9
    assert found["protocol"]["decoding"]["beams"] == 2 and found["protocol"]["tokenizer"]


def test_ids_are_numbers_where_the_servers_want_them() -> None:
    assert [server_id(key) for key in ("42", "000000042", "a/7", "-3")] == [
        42,
        "000000042",
        "a/7",
        "-3",
    ]


def test_a_set_without_references_gets_captions_and_no_score() -> None:
    found = eval_captions.score_captions({"1": "a red dog", "2": "a red dog"}, {"1": (), "2": ()})
    assert found == {"unique_captions": 0.5, "distinct_1": 0.5, "distinct_2": 0.5}
    with pytest.raises(ValueError, match="an empty list of references"):
        eval_captions.score_captions({"1": "a dog", "2": "a cat"}, {"1": (), "2": ("a cat",)})


def test_pixels_come_in_order_whatever_the_batch(folder: Path) -> None:
    images = list(read_testset([str(folder / "world/test")]))
    for size in (1, 4, 9, 50):
        found = list(batches_of_pixels(images, 32, size, torch.device("cpu")))
        assert [image.key for chosen, _ in found for image in chosen] == [image.key for image in images]
        together = torch.cat([pixels for _, pixels in found])
        assert torch.equal(together[7], image_transform(decode(images[7].data), 32))
    assert len(list(read_testset([str(folder / "world/test")], limit=5))) == 5


def clean_shard(path: Path, keys: list[str], data: bytes | None) -> Path:
    rows = [{"key": key, "image": {"bytes": data, "path": None}, "captions": []} for key in keys]
    pq.write_table(pa.Table.from_pylist(rows, CLEAN), path)
    return path


def test_bad_test_sets_are_named(folder: Path, tmp_path: Path) -> None:
    twice = clean_shard(tmp_path / "twice.parquet", ["a", "a"], b"x")
    with pytest.raises(ValueError, match=r"twice.parquet: the key a came before"):
        list(read_testset([str(twice)]))
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "raw.parquet")
    with pytest.raises(ValueError, match=r"raw.parquet: is no clean shard"):
        list(read_testset([str(tmp_path / "raw.parquet")]))
    with pytest.raises(ValueError, match=r"nowhere: no such file"):
        list(read_testset([str(tmp_path / "nowhere")]))
    for data in (b"no picture", None):
        broken = [TestImage("7", data or b"", ("a",))]
        with pytest.raises(ValueError, match="test image 7 cannot be decoded"):
            list(batches_of_pixels(broken, 32, 4, torch.device("cpu")))
    model = load_blip(folder / "models/filter")
    protocol = eval_retrieval.RetrievalProtocol()
    image = next(read_testset([str(folder / "world/test")]))
    with pytest.raises(ValueError, match="has no image"):
        eval_retrieval.evaluate_retrieval(model, [], protocol, 4)
    with pytest.raises(ValueError, match=f"test image {image.key} has no caption"):
        eval_retrieval.evaluate_retrieval(model, [TestImage(image.key, image.data, ())], protocol, 4)


@pytest.mark.parametrize(("entry", "model"), [(eval_retrieval, "captioner"), (eval_captions, "filter")])
def test_the_wrong_kind_of_model_is_a_clear_error(
    folder: Path, entry, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(entry.main, config(folder, model, "wrong"))
    assert stop.value.code == 1
    assert ("reads texts" in (said := capsys.readouterr().err)) or "cannot write captions" in said
    assert not (folder / "wrong/metrics.json").exists()
