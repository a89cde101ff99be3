"""The loop, whole, as real runs of every step; and what ends it."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from blip import load_blip
from blip.tokenizer import write_vocabulary
from capfilt.hold import InUse
from pipelines import bootstrap
from pipelines.bootstrap import Corpus, worse
from pipelines.config import ConfigError
from pipelines.steps import Entry, Step, StepFailed, read_manifest, run_step
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY

WORLD = WorldConfig(seed=9, noisy_rows=24, clean_rows=12, test_rows=6, shard_rows=12, captions_per_image=2)
STEPS = ["med", "eval_retrieval", "eval_captions"]
TUNED_ON = {"captioner": "test", "filter": "clean"}
CORPUS = ["captioner", "filter", "eval_filter", "corpus", "select"]


def recipes(folder: Path) -> dict[str, str]:
    """Config files of every step, so small that each ends in seconds."""
    data = {"shards": ["unset"], "batch_size": 6, "workers": 0, "max_length": 30}
    train = {"steps": 2, "device": "cpu"}
    text = {"width": 16, "depth": 1, "heads": 2, "hidden": 16, "max_positions": 40, "dropout": 0.0}
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "depth": 1, "heads": 2}
    model = {"vision": vision, "text": text, "embed": 8}
    decoding = {"beams": 1, "min_length": 3, "max_length": 8}
    evaluation = {"out": "unset", "model": "unset", "shards": ["unset"], "device": "cpu"}
    tuned = {"out": "unset", "data": data, "train": train}
    capfilt = {"captioner": "unset", "filter": "unset", "decoding": decoding, "device": "cpu", "prompt": ""}
    trees = {
        "pretrain": tuned | {"model": model, "init": {"tokenizer": str(folder / "words")}},
        "captioner": tuned | {"start": {"weights": "unset", "reads": False}},
        "filter": tuned | {"start": {"weights": "unset", "writes": False}},
        "capfilt": {"input": "unset", "out": "unset", "engine": "local", "capfilt": capfilt},
        "select": {"out": "unset"},
        "eval_retrieval": evaluation | {"protocol": {"k": 2}},
        "eval_captions": evaluation | {"protocol": {"decoding": decoding, "prompt": "unset"}},
        "eval_filter": evaluation,
    }
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return {name: str(folder / f"{name}.yaml") for name in trees}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of one round that has been run."""
    folder = tmp_path_factory.mktemp("bootstrap")
    write_world(WORLD, folder / "world")
    write_vocabulary(VOCABULARY, folder / "words")
    paths = recipes(folder)
    tree = {
        "out": str(folder / "out"),
        "web": str(folder / "world/noisy"),
        "clean": str(folder / "world/clean"),
        "captions": str(folder / "world/test"),
        "test": str(folder / "world/test"),
        "recipes": {name: path for name, path in paths.items() if name != "eval_filter"},
        "eval_filter": paths["eval_filter"],
        "threshold": 0.3,  # untrained models say about 0.5 of everything
    }
    path = folder / "bootstrap.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert bootstrap.main([str(path)]) == 0
    return path


def test_a_round_is_all_of_blips_steps_in_order(config: Path) -> None:
    out = config.parent / "out"
    manifest = read_manifest(out)
    assert list(manifest) == [f"0/{name}" for name in STEPS] + [f"1/{name}" for name in [*CORPUS, *STEPS]]
    assert all(step["exit_code"] == 0 for step in manifest.values())
    shards = f"data.shards=[{out}/1/corpus/clean,{config.parent}/world/clean]"
    assert shards in shlex.split(manifest["1/med"]["command"])
    of = {step: f"data.shards=[{config.parent}/world/{name}]" for step, name in TUNED_ON.items()}
    assert all(shards in shlex.split(manifest[f"1/{step}"]["command"]) for step, shards in of.items())
    assert "start" not in manifest["1/med"]["command"]  # a new model, not the old one trained on
    new, old = (load_blip(out / f"{number}/med/model") for number in (1, 0))
    assert new.config.text == old.config.text and new.config.text.reads and new.config.text.writes
    assert not load_blip(out / "1/captioner/model").config.text.reads
    assert not load_blip(out / "1/filter/model").config.text.writes


def test_the_summary_tells_what_the_files_hold(config: Path) -> None:
    out = config.parent / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stopped"] is None and [found["round"] for found in summary["rounds"]] == [0, 1]
    written = [
        row["caption_synthetic"]
        for path in (out / "1/corpus/scored").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    clean = [
        caption["source"]
        for path in (out / "1/corpus/clean").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
        for caption in row["captions"]
    ]
    last = summary["rounds"][1]
    assert last["unique_captions"] == pytest.approx(len(set(written)) / len(written))
    assert {source: last["texts"][source].get("kept", 0) for source in ("web", "synthetic")} == {
        source: clean.count(source) for source in ("web", "synthetic")
    }
    for number in (0, 1):
        metrics = json.loads((out / f"{number}/eval_retrieval/metrics.json").read_text())
        assert summary["rounds"][number]["retrieval"] == metrics["itm"]
    assert len(bootstrap.describe(summary).splitlines()) == 3


def test_what_is_done_is_not_done_again_and_another_plan_is_refused(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = read_manifest(config.parent / "out")
    assert bootstrap.main([str(config)]) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 11 and "python -m" not in said
    assert read_manifest(config.parent / "out") == before
    with pytest.raises(ValueError, match=r"1/eval_filter was done with another command"):
        bootstrap.main([str(config), "threshold=0.4"])


def test_a_fault_in_the_last_step_is_told_before_the_first(config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(Path(recipes(tmp_path)["eval_captions"]).read_text().replace("prompt", "promt"))
    with pytest.raises(ConfigError, match="promt"):
        bootstrap.main([str(config), f"recipes.eval_captions={bad}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_step_that_fails_is_named_and_not_called_done(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("out: nowhere\n")
    step = Step("1/select", Entry("pipelines.select", dict), str(config), ())
    with pytest.raises(StepFailed, match=r"step 1/select ended with exit code 1"):
        run_step(tmp_path, step)
    assert read_manifest(tmp_path) == {}
    run_step(tmp_path, Step("1/select", Entry("pipelines.select", dict, (0, 1)), str(config), ()))
    assert read_manifest(tmp_path)["1/select"]["exit_code"] == 1


def test_a_step_that_outlives_a_killed_loop_is_told_of_and_not_done_beside_it(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.yaml"
    recipe = yaml.safe_load((config.parent / "pretrain.yaml").read_text())
    long.write_text(yaml.safe_dump(recipe | {"train": {"steps": 10**6, "device": "cpu"}}))
    words = [str(config), f"out={tmp_path / 'out'}", f"recipes.pretrain={long}"]
    loop = subprocess.Popen([sys.executable, "-m", "pipelines.bootstrap", *words], stdout=subprocess.DEVNULL)
    log = tmp_path / "out/0/med/metrics.jsonl"
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text()):  # it trains
        assert loop.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    (step,) = psutil.Process(loop.pid).children()
    with pytest.raises(InUse, match=rf"in use by process {loop.pid} "):
        bootstrap.main(words)
    loop.kill()
    loop.wait()
    with pytest.raises(StepFailed, match="step 0/med ended with exit code 1"):
        bootstrap.main(words)
    assert f"in use by process {step.pid} " in capfd.readouterr().err
    step.kill()


@pytest.mark.parametrize(
    ("first", "second", "fallen"),
    [
        ((0.9, 0.9), (0.9, 0.9), []),
        ((0.9, 0.9), (0.895, 0.895), []),  # within the tolerance
        ((0.9, 0.9), (0.8, 0.95), ["precision"]),
        ((0.9, 0.9), (0.95, 0.5), ["unique_captions"]),
        ((0.9, 0.9), (0.5, 0.5), ["precision", "unique_captions"]),
    ],
)
def test_the_loop_ends_when_precision_or_diversity_falls(first, second, fallen: list[str]) -> None:
    assert worse([Corpus(*second)], 0.01) is None  # there is nothing to fall from
    said = worse([Corpus(0.1, 0.1), Corpus(*first), Corpus(*second)], 0.01)
    assert (said is not None) == bool(fallen)
    assert all(name in (said or "") for name in fallen)
