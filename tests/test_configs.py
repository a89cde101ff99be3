"""Every config file parses into the dataclass of the entry that its header names, and the tiny runs run."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blip.model import BlipConfig
from blip.tokenizer import write_vocabulary
from pipelines import run_capfilt, select, train_blip
from pipelines.config import load_config
from pipelines.train_blip import TrainRun
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml"))
COMMAND = re.compile(r"python -m (pipelines\.\w+) (\S+\.yaml)")
MAKE = re.compile(r"\bmake((?: [a-z0-9]+(?:-[a-z0-9]+)*)(?: [A-Z]+=\S+)*)")


def header(path: str) -> str:
    """The comment that opens a config file; lines that end in a backslash are joined."""
    lines = []
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return "\n".join(lines).replace("\\\n", " ").replace("  ", " ")


def entry(path: str) -> str:
    """The module that the header's command starts."""
    found = COMMAND.search(header(path))
    assert found is not None, f"{path}: the header has no line `python -m pipelines.<entry> {path}`"
    return found[1]


def config_class(module: str) -> type[Any]:
    """The dataclass that an entry parses its arguments into: the second argument of its `parse_args`."""
    loaded = importlib.import_module(module)
    calls = [
        node
        for node in ast.walk(ast.parse(Path(str(loaded.__file__)).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_args"
    ]
    assert len(calls) == 1, f"{module} calls parse_args {len(calls)} times"
    found: type[Any] = getattr(loaded, ast.unparse(calls[0].args[1]))
    return found


def dry_run(words: str) -> str:
    environment = {"PATH": os.environ["PATH"]}
    command = ["make", "-n", *shlex.split(words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_there_are_configs() -> None:
    assert {"configs/capfilt.yaml", "configs/select.yaml", "configs/tiny/world.yaml"} <= set(CONFIGS)


@pytest.mark.parametrize("path", CONFIGS)
def test_config_is_what_its_entry_reads(path: str) -> None:
    load_config(config_class(entry(path)), ROOT / path)


@pytest.mark.parametrize("path", CONFIGS)
def test_header_says_how_to_run_it(path: str) -> None:
    assert all(named == path for _, named in COMMAND.findall(header(path)))
    shown = [dry_run(words) for words in MAKE.findall(header(path))]
    assert any(f"{entry(path)} {path}" in output for output in shown), f"no make line of {path} runs it"


# BLIP's values: 20 epochs of 14M rows by 2880 (B) and 2400 (L), warm-up 3000, decay 0.85 (paper, table of
# hyper-parameters); fine-tuning on 566,747 captions by 32 a GPU on 8 GPUs, 5 and 6 epochs
# (configs/caption_coco.yaml and configs/retrieval_coco.yaml of salesforce/BLIP).
RECIPES = [  # file, rows, batch, epochs, rate
    ("configs/pretrain_14m_base.yaml", 14_000_000, 2880, 20, 3e-4),
    ("configs/pretrain_14m_large.yaml", 14_000_000, 2400, 20, 2e-4),
    ("configs/captioner_coco.yaml", 566_747, 256, 5, 1e-5),
    ("configs/filter_coco.yaml", 566_747, 256, 6, 1e-5),
]


@pytest.mark.parametrize(("path", "rows", "batch", "epochs", "rate"), RECIPES)
def test_recipe_is_that_of_the_paper(path: str, rows: int, batch: int, epochs: int, rate: float) -> None:
    run = load_config(TrainRun, ROOT / path)
    assert run.data.batch_size * run.train.accumulate == batch
    assert abs(run.train.steps - epochs * rows / batch) < 1
    assert (run.optim.lr, run.optim.weight_decay, run.optim.betas) == (rate, 0.05, (0.9, 0.999))
    if run.momentum is not None:
        ramp = 2 if run.start is None else 1  # epochs
        assert abs(run.momentum.alpha_steps - ramp * rows / batch) < 1
        assert (run.momentum.queue_size, run.momentum.decay, run.momentum.alpha) == (57600, 0.995, 0.4)


@pytest.mark.parametrize("size", ["base", "large"])
def test_pretraining_has_the_paper_s_model(size: str) -> None:
    run = load_config(TrainRun, ROOT / f"configs/pretrain_14m_{size}.yaml")
    assert run.model == BlipConfig.of(size)
    assert (run.optim.schedule, run.optim.decay_rate, run.optim.warmup_steps) == ("step_decay", 0.85, 3000)


# ---- the tiny runs, two steps each, one after the other as a person would run them ---------------

SMALL = ("train.steps=2", "data.batch_size=8", "data.workers=0")
EVERY = {"itc", "itm", "lm"}
OBJECTIVES = {
    "pretrain": EVERY,
    "ablation_pretrain": EVERY,
    "captioner": {"lm"},
    "filter": {"itc", "itm"},
    "retrieval": {"itc", "itm"},
    "shared": EVERY,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny world and two steps of pre-training on it."""
    folder = tmp_path_factory.mktemp("runs")
    small = WorldConfig(noisy_rows=48, clean_rows=32, test_rows=8, shard_rows=24, side=32)
    write_world(small, folder / "world")
    write_world(replace(small, brief=True), folder / "brief")
    write_vocabulary(VOCABULARY, folder / "world" / "vocabulary")
    train_two_steps("pretrain", folder)
    return folder


def train_two_steps(name: str, runs: Path) -> None:
    """configs/tiny/<name>.yaml with everything it reads and writes moved from runs/ to `runs`."""
    path = ROOT / f"configs/tiny/{name}.yaml"
    run = load_config(TrainRun, path)
    shards = ", ".join(moved(place, runs) for place in run.data.shards)
    overrides = [
        f"out={moved(run.out, runs)}",
        f"data.shards=[{shards}]",
        "data.batch_size=8",
        "data.workers=0",
    ]
    if run.start is None:
        overrides.append(f"init.tokenizer={moved(run.init.tokenizer, runs)}")
    else:
        overrides.append(f"start.weights={moved(run.start.weights, runs)}")
    assert train_blip.main([str(path), *overrides, *SMALL]) == 0


def moved(place: str, runs: Path) -> str:
    """runs/x -> the same under another folder; whatever else a config names is no part of the tiny runs."""
    assert place.startswith("runs/"), f"{place} is not made by `make world` or a tiny run"
    return str(runs / place.removeprefix("runs/"))


def test_every_tiny_training_config_is_run_here() -> None:
    tiny = {path for path in CONFIGS if path.startswith("configs/tiny/")}
    training = {Path(path).stem for path in tiny if entry(path) == "pipelines.train_blip"}
    assert training == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tiny_training_runs(name: str, runs: Path) -> None:
    if name != "pretrain":  # the fixture's
        train_two_steps(name, runs)
    out = runs / "tiny" / name
    (line,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 2
    assert OBJECTIVES[name] == EVERY & line.keys()
    assert (out / "model" / "model.safetensors").exists()


def test_tiny_capfilt_runs(runs: Path) -> None:
    """With two-step models, which write and score nonsense; `select` then keeps what nonsense scores best."""
    for name in ("captioner", "filter"):
        if not (runs / "tiny" / name / "model").exists():  # where only this test is run
            train_two_steps(name, runs)
    path = ROOT / "configs/tiny/capfilt.yaml"
    run = load_config(run_capfilt.CapFiltRun, path)
    models = [f"capfilt.{name}={runs}/tiny/{name}/model" for name in ("captioner", "filter")]
    out = f"out={moved(run.out, runs)}"
    assert run_capfilt.main([str(path), f"input={moved(run.input, runs)}", out, *models]) == 0
    assert select.main([str(ROOT / "configs/select.yaml"), out, "fraction=0.5"]) == 0
    summary = json.loads((Path(moved(run.out, runs)) / "clean" / "_select.json").read_text())
    assert summary["rows"] == 24 and summary["rows_kept"] > 0
