"""The bench compares what is equal, refuses what is not, and counts time rightly. No speed is asserted."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_blip, tiny_tokenizer
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip.generate import BEAM_SEARCH, NUCLEUS, Decoding
from capfilt.filter import Filter
from capfilt.local import run_local
from capfilt.worker import CapFiltConfig
from pipelines import bench
from pipelines.bench import BenchRun, Pair, Result
from pipelines.bench_sides import check_close
from pipelines.config import load_config
from pipelines.world import WorldConfig, write_world

CONFIG = Path(__file__).resolve().parent.parent / "configs/tiny/bench.yaml"
TEXTS = [["w1 w2 w3", "w4 w5"], ["w6 w7", "w8"], ["w9", "w10 w11 w12"]]
EQUAL_LENGTH = {"min_length": 12, "max_length": 12}


@pytest.fixture(scope="module")
def run() -> BenchRun:
    return load_config(BenchRun, CONFIG)


@pytest.fixture(scope="module")
def captioners(run: BenchRun, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("captioners")
    return bench.make_pair(run, folder, BlipForConditionalGeneration, reads=False, writes=True)


@pytest.fixture(scope="module")
def filters(run: BenchRun, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("filters")
    return bench.make_pair(run, folder, BlipForImageTextRetrieval, reads=True, writes=False)


# ---- both sides do the same work -----------------------------------------------------------------


@pytest.mark.parametrize(
    "decoding", [Decoding(**EQUAL_LENGTH), replace(BEAM_SEARCH, **EQUAL_LENGTH)], ids=str
)
def test_captions_are_those_of_transformers(captioners: Pair, decoding: Decoding) -> None:
    ours, theirs = bench.caption(captioners, decoding), bench.caption_there(captioners, decoding)
    bench.check_captions("captions", ours, theirs)
    written = ours[:, len(captioners.tokenizer.prompt(bench.PROMPT)) :]
    assert all(len(row.unique()) > 4 for row in written)  # not one word again and again


def test_sampled_captions_have_all_their_tokens(captioners: Pair) -> None:
    decoding = replace(NUCLEUS, **EQUAL_LENGTH)
    for ids in (bench.caption(captioners, decoding), bench.caption_there(captioners, decoding)):
        assert ids.shape == (len(captioners.pixels), 12)
        assert not (ids == captioners.tokenizer.sep).any()


def test_scores_are_those_of_transformers(filters: Pair) -> None:
    judge = Filter(filters.ours, max_words=30, max_length=35)
    check_close(
        "P(match)", bench.score(judge, filters, TEXTS), bench.score_there(judge, filters, TEXTS), 1e-4
    )


# ---- what is not equal is refused ----------------------------------------------------------------


def test_other_weights_are_refused(captioners: Pair) -> None:
    other = replace(captioners, ours=bench.draw_weights(captioners.ours, seed=1))
    try:
        with pytest.raises(ValueError, match="differ, so nothing is timed"):
            found = [write(other, Decoding(**EQUAL_LENGTH)) for write in (bench.caption, bench.caption_there)]
            bench.check_captions("captions", *found)
    finally:
        bench.draw_weights(captioners.ours, seed=0)


def test_captions_of_other_length_are_refused() -> None:
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match="differ, so nothing is timed"):
        bench.check_captions("captions", ids, ids[:, :2])


def test_captions_that_prove_nothing_are_refused() -> None:
    same = torch.ones(3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="proves little"):
        bench.check_captions("captions", same, same)


def test_scores_with_cls_are_refused(filters: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers computes when its callers leave the first id as it is."""
    judge = Filter(filters.ours, max_words=30, max_length=35)
    monkeypatch.setattr(filters.tokenizer, "enc", filters.tokenizer.cls)
    with pytest.raises(ValueError, match="differ by"):
        check_close(
            "P(match)", bench.score(judge, filters, TEXTS), bench.score_there(judge, filters, TEXTS), 1e-4
        )


@pytest.mark.parametrize(
    ("theirs", "message"),
    [([0.1, 0.9002], "differ by 0.0002"), ([0.1, float("nan")], "differ by nan")],
)
def test_other_scores_are_refused(theirs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_close("P(match)", torch.tensor([0.1, 0.9]), torch.tensor(theirs), 1e-4)


def test_scores_that_prove_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="proves little"):
        check_close("P(match)", torch.full((4,), 0.5), torch.full((4,), 0.5), 1e-4)


def test_other_files_are_refused() -> None:
    bench.check_files([{"a": "1", "b": "2"}, {"b": "2", "a": "1"}])
    for other in ({"a": "1"}, {"a": "1", "b": "3"}):
        with pytest.raises(ValueError, match="not the same in every run"):
            bench.check_files([{"a": "1", "b": "2"}, other])


# ---- the arithmetic ------------------------------------------------------------------------------


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> Callable[[], int]:
        def work() -> int:
            calls.append(name)
            return len(calls)

        return work

    assert bench.in_turns({"a": side("a"), "b": side("b")}, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert calls == ["a", "b", "b", "a", "a", "b"]


def test_rates_and_ratio_are_of_medians() -> None:
    result = Result("x", "rows", 10, {"a": [2.0, 1.0, 30.0], "b": [8.0, 8.0, 8.0]})
    assert result.rates == {"a": 5.0, "b": 1.25}
    assert result.ratio == 4.0
    assert Result("x", "rows", 10, {"a": [2.0]}).ratio is None


# ---- CapFilt -------------------------------------------------------------------------------------

WORLD = WorldConfig(noisy_rows=12, clean_rows=0, test_rows=0, shard_rows=4, side=32)


@pytest.fixture(scope="module")
def capfilt_config(tmp_path_factory: pytest.TempPathFactory) -> CapFiltConfig:
    """Of two tiny models on disk."""
    folder = tmp_path_factory.mktemp("models")
    for name, parts in {"captioner": {"reads": False}, "filter": {"writes": False}}.items():
        model = tiny_blip(**parts)
        model.tokenizer = tiny_tokenizer(folder / "words")
        model.save_pretrained(folder / name)
    decoding = Decoding(max_length=8)
    return CapFiltConfig(
        str(folder / "captioner"), str(folder / "filter"), decoding=decoding, batch_size=4, device="cpu"
    )


def test_a_clock_adds_up(capfilt_config: CapFiltConfig, tmp_path: Path) -> None:
    write_world(WORLD, tmp_path / "world")
    started = time.monotonic()
    found = bench.clock(partial(run_local, capfilt_config, tmp_path / "world" / "noisy"), tmp_path)
    whole = time.monotonic() - started
    assert found.files.keys() == {"00000", "00001", "00002"}
    assert len(set(found.files.values())) == 3
    assert min(found.start_up, found.rows, found.late, found.work) > 0
    tick = 0.02  # file times advance in steps of a few milliseconds
    assert found.start_up + found.rows + found.shut_down <= whole + tick
    assert found.late <= found.rows and found.work <= found.rows + tick  # one worker


def test_a_failed_shard_is_refused(capfilt_config: CapFiltConfig, tmp_path: Path) -> None:
    write_world(WORLD, tmp_path / "world")
    (tmp_path / "world" / "noisy" / "00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="shards failed"):
        bench.clock(partial(run_local, capfilt_config, tmp_path / "world" / "noisy"), tmp_path)


def test_one_worker_is_measured(run: BenchRun, capfilt_config: CapFiltConfig, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = bench.measure_capfilt(replace(run, capfilt=capfilt_config, world=WORLD, repeats=2), tmp_path)
    assert result.amount == WORLD.shard_rows and [len(each) for each in result.seconds.values()] == [2]
    assert result.more.keys() == {"decode ms", "caption ms", "score ms"}
    assert torch.get_num_threads() == threads


# ---- the entry -----------------------------------------------------------------------------------


def test_every_result_is_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert bench.main([str(CONFIG), f"out={tmp_path}", "parts=[scores]"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "bench.json").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["scores, 2 texts an image"] * 2
    assert lines[0]["ratio"] > 0 and lines[0]["machine"]["torch"] == torch.__version__
    assert lines[0]["run"]["batch"] == 3 and lines[0]["amount"] == 6
    assert "texts/s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the exports are gone


@pytest.mark.parametrize("wrong", ["batch=1", "repeats=0", "workers=1"])
def test_impossible_runs(wrong: str) -> None:
    with pytest.raises(ValueError, match="it must be at least"):
        load_config(BenchRun, CONFIG, [wrong])
