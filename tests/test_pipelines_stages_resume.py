"""Both stages of BLIP-2 killed in the middle: they go on as if nothing had happened, bit for bit on a CPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_pipelines_stages import CONSTANT, folder, metrics, stage1, stage2
from test_pipelines_trainer import wait
from torch import Tensor, nn

from blip.checkpoint import load_state
from pipelines import train_stage1, train_stage2
from pipelines.trainer import STATE_FILE
from qformer.frozen import Frozen

ROOT = Path(__file__).resolve().parent.parent
__all__ = ["folder"]  # the fixture: a world, language models, a stage 1 of 12 steps

STEPS, SAVE_EVERY = 12, 3
SETTINGS = (f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", *CONSTANT)


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage 1 that nothing disturbed; with dropout, so that random numbers matter."""
    out = tmp_path_factory.mktemp("first") / "stage1"
    stage1(folder, out, *SETTINGS, "model.qformer.dropout=0.1")
    return out


def kill_in_the_middle(entry: ModuleType, config: Path, out: Path) -> None:
    """A real process, killed with SIGKILL between its fifth step and its last."""
    command = [sys.executable, "-m", entry.__name__, str(config), f"out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as run:
        log = out / "metrics.jsonl"
        wait(lambda: run.poll() is not None or (log.exists() and len(metrics(out)) >= 5), 600)
        run.send_signal(signal.SIGKILL)
        _, errors = run.communicate()
    assert run.returncode == -signal.SIGKILL, errors
    assert SAVE_EVERY <= load_state(out / STATE_FILE)["step"] < STEPS
    assert not (out / "model").exists()


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{place}.{name}": weight.clone()
        for place, part in model.named_modules()
        if isinstance(part, Frozen)
        for name, weight in part.module.state_dict().items()
    }


def check(
    entry: ModuleType, whole: Path, out: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`whole` nothing disturbed; in `out` it is run again, killed, and goes on to the same end."""
    config = whole / "config.yaml"
    kill_in_the_middle(entry, config, out)
    built: list[tuple[nn.Module, dict[str, Tensor]]] = []
    build: Callable[[Any], nn.Module] = entry.build

    def remember(run: Any) -> nn.Module:
        model = build(run)
        built.append((model, frozen_weights(model)))
        return model

    monkeypatch.setattr(entry, "build", remember)
    assert entry.main([str(config), f"out={out}"]) == 0

    states = [load_state(place / STATE_FILE) for place in (whole, out)]
    assert states[0]["step"] == STEPS
    for part in ("model", "step", "rng"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    averages = [state["optimizer"]["state"] for state in states]
    torch.testing.assert_close(*averages, rtol=0, atol=0)
    saved = [(place / "model/model.safetensors").read_bytes() for place in (whole, out)]
    assert saved[0] == saved[1]
    told = [[{name: line[name] for name in names} for line in metrics(place)] for place in (whole, out)]
    assert told[0] == told[1] and [line["step"] for line in told[0]] == list(range(1, STEPS + 1))

    ((model, before),) = built
    after = frozen_weights(model)
    assert len(before) > 20 and before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


def test_a_killed_stage1_goes_on(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("step", "itc", "itm", "itg", "lr", "grad_norm", "temperature", "grounding_gap")
    check(train_stage1, first, tmp_path / "killed", names, monkeypatch)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_killed_stage2_goes_on(
    folder: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stage2(folder, kind, tmp_path / "whole", *SETTINGS, f"stage1.weights={first}/model")
    names = ("step", "lm", "lr", "grad_norm", "grounding_gap", "unique_captions")
    check(train_stage2, tmp_path / "whole", tmp_path / "killed", names, monkeypatch)
