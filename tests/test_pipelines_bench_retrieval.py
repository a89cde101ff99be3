"""Both sides of the bench of retrieval score the same pairs, what differs is refused, time is scaled."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForImageTextRetrieval

from pipelines import bench, bench_retrieval
from pipelines.bench import BenchRun, Pair
from pipelines.bench_retrieval import BenchRetrievalConfig, Ranked, Sample
from pipelines.bench_sides import check_close
from pipelines.config import load_config
from pipelines.testset import batches_of_pixels

CONFIG = Path(__file__).resolve().parent.parent / "configs/tiny/bench.yaml"
SMALL = BenchRetrievalConfig(images=5, texts=3, words=(2, 9), k=2, pairs=6, batch=2)
WAYS: dict[str, Callable[[Any, Sample], tuple[float, Tensor]]] = {
    "one": lambda theirs, sample: bench_retrieval.by_class(theirs, sample, 1),
    "some": lambda theirs, sample: bench_retrieval.by_class(theirs, sample, 4),
    "kept": lambda theirs, sample: bench_retrieval.by_modules(theirs, sample, 4),
}


@pytest.fixture(scope="module")
def filters(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    run, folder = load_config(BenchRun, CONFIG), tmp_path_factory.mktemp("filters")
    return bench.make_pair(run, folder, BlipForImageTextRetrieval, reads=True, writes=False)


@pytest.fixture(scope="module")
def found(filters: Pair) -> Ranked:
    return bench_retrieval.rank(filters.ours, bench_retrieval.draw(SMALL, seed=0), SMALL)


@pytest.fixture(scope="module")
def pixels(filters: Pair) -> Tensor:
    images, size = bench_retrieval.draw(SMALL, seed=0), filters.ours.config.vision.image_size
    return torch.cat([some for _, some in batches_of_pixels(images, size, 2, torch.device("cpu"))])


@pytest.fixture
def sample(filters: Pair, found: Ranked, pixels: Tensor) -> Sample:
    """All pairs."""
    return bench_retrieval.draw_sample(found, pixels, filters.tokenizer.enc, 1000, seed=0)


def logits(found: Ranked, sample: Sample) -> Tensor:
    return torch.stack([found.itm[image, text] for image, text in sample.pairs.tolist()])


# ---- both sides do the same work -----------------------------------------------------------------


def test_pairs_are_the_best_of_each_image_and_of_each_text(found: Ranked) -> None:
    """By sorting rows and columns of the cosines."""
    cosine = found.cosine.tolist()
    images, texts = range(SMALL.images), range(SMALL.images * SMALL.texts)
    expected = set()
    for image in images:
        expected |= {(image, text) for text in sorted(texts, key=lambda t: -cosine[image][t])[: SMALL.k]}
    for text in texts:
        expected |= {(image, text) for image in sorted(images, key=lambda i: -cosine[i][text])[: SMALL.k]}
    assert {tuple(pair) for pair in found.pairs.tolist()} == expected
    assert len(expected) < len(images) * len(texts)


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_of_transformers(filters: Pair, found: Ranked, sample: Sample, way: str) -> None:
    assert len(sample.pairs) == sample.total == len(found.pairs)
    _, theirs = WAYS[way](filters.theirs, sample)
    ours = logits(found, sample)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    check_close("logits", ours, theirs, bench_retrieval.CLOSE)


def test_cosines_are_those_of_transformers(filters: Pair, found: Ranked, sample: Sample) -> None:
    ours, theirs = bench_retrieval.cosines(filters.theirs, sample, found)
    assert ours.shape == (4, 4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    check_close("cosines", ours, theirs, bench_retrieval.CLOSE)


def test_texts_vary_in_length_and_samples_in_pairs(filters: Pair, found: Ranked, pixels: Tensor) -> None:
    drawn = bench_retrieval.draw(replace(SMALL, images=40), seed=1)
    lengths = [len(text.split()) for image in drawn for text in image.texts]
    assert len(lengths) == 120 and set(lengths) == set(range(2, 10))
    assert len({image.data for image in drawn}) == 40
    several = [bench_retrieval.draw_sample(found, pixels, 1, 6, seed).pairs for seed in (0, 0, 1)]
    assert len(several[0].unique(dim=0)) == 6
    assert torch.equal(several[0], several[1]) and not torch.equal(several[0], several[2])


# ---- what is not equal is refused ----------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_cls_in_place_of_enc_is_refused(filters: Pair, found: Ranked, sample: Sample, way: str) -> None:
    _, theirs = WAYS[way](filters.theirs, replace(sample, enc=filters.tokenizer.cls))
    with pytest.raises(ValueError, match="logits here and in transformers differ by"):
        check_close("logits", logits(found, sample), theirs, bench_retrieval.CLOSE)


def test_other_pairs_are_refused(filters: Pair, found: Ranked, sample: Sample) -> None:
    _, theirs = WAYS["some"](filters.theirs, replace(sample, pairs=sample.pairs.flip(0)))
    with pytest.raises(ValueError, match="so no time is told"):
        check_close("logits", logits(found, sample), theirs, bench_retrieval.CLOSE)


# ---- the arithmetic ------------------------------------------------------------------------------


def test_time_is_taken_in_proportion(filters: Pair, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of work takes 3 seconds: of 2 of 30 pairs, and, where images are kept, of 2 of 5 images."""
    monkeypatch.setattr(bench_retrieval, "clocked", lambda work: (3.0, work()))
    few = replace(sample, pairs=torch.tensor([[0, 3], [4, 1]]), total=30)
    assert WAYS["one"](filters.theirs, few)[0] == WAYS["some"](filters.theirs, few)[0] == 45
    assert WAYS["kept"](filters.theirs, few)[0] == pytest.approx(45 + 3 * 5 / 2)


def test_waiting_is_not_counted() -> None:
    seconds, found = bench_retrieval.clocked(lambda: time.sleep(0.2))
    assert found is None and seconds < 0.1
    begun = time.process_time()

    def busy() -> None:
        while time.process_time() < begun + 0.1:
            pass

    assert bench_retrieval.clocked(busy)[0] == pytest.approx(0.1, abs=0.05)


# ---- the part ------------------------------------------------------------------------------------


def test_the_part_ends_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "retrieval={images: 4, texts: 2, k: 2, pairs: 3, batch: 2}"
    assert bench.main([str(CONFIG), f"out={tmp_path}", "parts=[retrieval]", "repeats=2", small]) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.json").read_text().splitlines()]
    ways = ["a pair a call", "2 pairs a call", "images kept"]
    assert [row["name"] for row in rows] == [f"retrieval, {way}" for way in ways]
    for row in rows:
        more = row["more"]
        assert row["amount"] == more["pairs"] > more[bench_retrieval.TIMED] == 3
        assert row["ratio"] == pytest.approx(more["processor s there"] / more["processor s here"])
        assert [len(each) for each in row["seconds"].values()] == [2, 2]
        assert row["seconds"]["here"] == rows[0]["seconds"]["here"]
    assert "pairs/s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the exports are gone


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("images=1", "images is 1; it must be at least 2"),
        ("k=0", "k is 0; it must be at least 1"),
        ("words=[0, 9]", r"words is \[0, 9\]; they must rise, between 1 and 30"),
        ("words=[9, 8]", r"words is \[9, 8\]"),
        ("words=[9, 31]", r"words is \[9, 31\]"),
    ],
)
def test_impossible_runs(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(BenchRun, CONFIG, [f"retrieval.{wrong}"])
