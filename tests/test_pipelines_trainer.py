"""The training loop: killed and resumed, accumulated, in bf16, with less memory, and stopped by a NaN."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import pixels, tiny_batch, tiny_blip
from torch import nn

from blip import load_blip
from blip.checkpoint import load_state
from blip.model import Batch, Blip
from blip.momentum import NO_IMAGE, MomentumConfig
from blip.tokenizer import write_vocabulary
from pipelines import train_blip
from pipelines.log import RunLog
from pipelines.optim import OptimConfig, lr_at
from pipelines.parallel import checkpoint_activations, pick_device
from pipelines.trainer import STATE_FILE, NotFinite, TrainConfig, resume, train
from pipelines.world import WorldConfig, write_world
from pipelines.world_captions import VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
STEPS, SAVE_EVERY = 18, 3
OPTIM = OptimConfig(lr=1e-3, warmup_steps=3, grad_clip=1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(noisy_rows=23, clean_rows=7, test_rows=1, shard_rows=8, side=32), folder)
    write_vocabulary(VOCABULARY, folder / "vocabulary")
    return folder


def write_config(world: Path, out: Path, **sections: Any) -> Path:
    """A pre-training run with everything that has a state: teacher, queue, dropout, drop path, warm-up."""
    tree = {
        "out": str(out),
        "data": {"shards": [str(world / "noisy")], "batch_size": 4, "window": 2, "workers": 0},
        "train": {"steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "device": "cpu"},
        "model": {
            "vision": {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3,
                       "drop_path": 0.1, "stem": [4, 6, 8]},
            "text": {"width": 32, "depth": 2, "heads": 4, "hidden": 64, "max_positions": 40},
            "embed": 16,
        },
        "init": {"tokenizer": str(world / "vocabulary")},
        "optim": {"lr": 1e-3, "warmup_steps": 5},
        "momentum": {"queue_size": 10, "alpha_steps": 12},
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_goes_on_as_if_nothing_had_happened(world: Path, tmp_path: Path) -> None:
    """Undisturbed against: SIGKILL in the middle, with a data worker, then the same command again, without.

    Weights, teacher, queues, optimiser and random numbers are equal bit for bit, and so is what was logged.
    """
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert train_blip.main([str(write_config(world, undisturbed))]) == 0

    config = write_config(world, killed)
    command = [sys.executable, "-m", "pipelines.train_blip", str(config), "data.workers=1"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    metrics, errors = killed / "metrics.jsonl", tmp_path / "errors.txt"
    with errors.open("wb") as file, subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file) as run:
        started = wait(
            lambda: run.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 7),
            600,
        )
        workers = children(run.pid)
        run.send_signal(signal.SIGKILL)
    assert started and run.returncode == -signal.SIGKILL, errors.read_text()
    step = load_state(killed / STATE_FILE)["step"]
    assert SAVE_EVERY < step < STEPS
    assert not (killed / "model").exists()
    assert workers or sys.platform != "linux"
    assert wait(lambda: not any(map(is_alive, workers)), 60), "a data worker outlives its killed run"

    assert train_blip.main([str(config)]) == 0
    states = [load_state(folder / STATE_FILE) for folder in (undisturbed, killed)]
    assert states[0].keys() == {"model", "optimizer", "step", "rng"}
    for part in (
        lambda state: state["optimizer"]["state"],
        lambda s: (s["model"], s["step"], s["rng"][0]["cpu"]),
    ):
        torch.testing.assert_close(*map(part, states), rtol=0, atol=0)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (undisturbed, killed)]
    assert weights[0] == weights[1]
    lines = [
        [{k: line[k] for k in ("step", "itc", "itm", "lm", "lr", "grad_norm")} for line in logged(folder)]
        for folder in (undisturbed, killed)
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))

    assert (states[0]["model"]["teacher.id_queue"] != NO_IMAGE).all()
    assert int(states[0]["model"]["teacher.steps"]) == STEPS


def test_a_finished_run_is_left_as_it_is(world: Path, tmp_path: Path) -> None:
    """And more steps are a matter of asking for them."""
    config = str(write_config(world, tmp_path / "run"))
    assert train_blip.main([config, "train.steps=3"]) == 0
    state = (tmp_path / "run" / STATE_FILE).read_bytes()
    assert train_blip.main([config, "train.steps=3"]) == 0
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == state
    assert train_blip.main([config, "train.steps=5"]) == 0
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_captioner_is_made_of_a_pretrained_med_and_trains_one_image_at_a_time(
    world: Path, tmp_path: Path
) -> None:
    assert train_blip.main([str(write_config(world, tmp_path / "med")), "train.steps=2"]) == 0
    config = {
        "out": str(tmp_path / "captioner"),
        "data": {
            "shards": [str(world / "clean")],
            "batch_size": 1,
            "prompt": "a picture of",
            "workers": 0,
        },
        "train": {"steps": 3, "log_every": 1, "device": "cpu"},
        "start": {"weights": str(tmp_path / "med" / "model"), "reads": False},
    }
    (tmp_path / "captioner.yaml").write_text(yaml.safe_dump(config))
    assert train_blip.main([str(tmp_path / "captioner.yaml")]) == 0
    losses = logged(tmp_path / "captioner")
    assert all(line["lm"] > 0 and "itc" not in line for line in losses)
    captioner, before = load_blip(tmp_path / "captioner" / "model"), load_blip(tmp_path / "med" / "model")
    assert (captioner.config.text.reads, captioner.config.text.writes) == (False, True)
    assert not torch.equal(captioner.med.embeddings.word.weight, before.med.embeddings.word.weight)
    assert len(captioner.caption(pixels(2))) == 2


# The loop itself


def run_steps(
    folder: Path,
    model: Blip,
    batches: Iterator[Batch],
    config: TrainConfig,
    optimizer: torch.optim.Optimizer | None = None,
    optim: OptimConfig = OPTIM,
) -> None:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=optim.lr)
    with RunLog(folder, total_steps=config.steps) as log:
        train(model, batches, optimizer, optim, config, log, folder, 0, steps_per_epoch=10)


def endless(seed: int = 0) -> Iterator[Batch]:
    for i in itertools.count():
        yield tiny_batch((1, 2, 3, 4), seed=seed + i)


def test_metrics_say_what_was_done_and_when(tmp_path: Path) -> None:
    config = TrainConfig(steps=7, log_every=3, accumulate=2, device="cpu")
    run_steps(tmp_path, tiny_blip(), endless(), config)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines:
        assert {"itc", "itm", "lm", "lr", "grad_norm", "rows_per_s", "seconds"} <= line.keys()
        assert all(line[name] > 0 for name in ("itc", "itm", "lm", "grad_norm", "rows_per_s"))
        assert line["lr"] == pytest.approx(lr_at(OPTIM, line["step"] - 1, 7, 10))


def test_the_first_step_is_that_of_the_optimiser_by_hand(tmp_path: Path) -> None:
    model = tiny_blip(reads=False)
    by_hand, batch = copy.deepcopy(model), tiny_batch((1, 2, 3))
    disable_dropout(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.9)
    optim = OptimConfig(lr=0.5, schedule="constant", grad_clip=0.1)
    run_steps(tmp_path, model, iter([batch]), TrainConfig(steps=1, device="cpu"), optimizer, optim)

    loss = by_hand(batch)["lm"]
    gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    assert norm > 0.1
    for mine, before, gradient in zip(model.parameters(), by_hand.parameters(), gradients, strict=True):
        torch.testing.assert_close(mine, before - 0.5 * 0.1 / norm * gradient, atol=1e-6, rtol=1e-5)
    (line,) = logged(tmp_path)
    assert line["lm"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["lr"] == 0.5


def disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_two_half_batches_are_one_whole(tmp_path: Path) -> None:
    """Of a captioner, with as many words in both halves; ITC and ITM need the whole batch at once."""
    halves = [tiny_batch((1, 2), seed=0), tiny_batch((3, 4), seed=0)]
    assert halves[0].mask.sum() == halves[1].mask.sum()
    whole = Batch(
        *(torch.cat([getattr(half, name) for half in halves]) for name in list(vars(halves[0]))[:4])
    )
    models = []
    for accumulate, batches in ((2, halves), (1, [whole])):
        model = tiny_blip(reads=False)
        disable_dropout(model)
        config = TrainConfig(steps=1, accumulate=accumulate, device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        optim = OptimConfig(lr=1.0, schedule="constant")
        run_steps(tmp_path / str(accumulate), model, iter(batches), config, optimizer, optim)
        models.append(model)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    assert logged(tmp_path / "1")[0]["lm"] == pytest.approx(logged(tmp_path / "2")[0]["lm"], abs=1e-6)
    assert not torch.equal(models[0].med.lm_head.bias, tiny_blip(reads=False).med.lm_head.bias)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_number_that_is_none_stops_the_run_and_leaves_the_last_state(
    tmp_path: Path, accumulate: int
) -> None:
    good = endless()
    bad = replace(tiny_batch((1, 2, 3)), pixels=torch.full((3, 3, 32, 32), torch.nan))
    batches = itertools.chain(itertools.islice(good, 5 * accumulate - 1), [bad], good)
    model = tiny_blip().with_teacher(MomentumConfig(queue_size=5))
    config = TrainConfig(steps=9, accumulate=accumulate, save_every=2, log_every=1, device="cpu")
    with pytest.raises(
        NotFinite, match=r"step 5 is not finite: itc nan, itm nan, lm nan.*grad_norm nan"
    ) as error:
        run_steps(tmp_path, model, batches, config)
    assert str(tmp_path / STATE_FILE) in str(error.value)
    assert isinstance(error.value, ValueError)  # one line for the user, no traceback
    state = load_state(tmp_path / STATE_FILE)
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]


def test_a_loss_without_a_word_is_not_a_success(tmp_path: Path) -> None:
    """The mean over no tokens is NaN, though no gradient shows it."""
    batch = replace(tiny_batch((1, 2)), prompt_length=100)
    with pytest.raises(NotFinite, match=r"step 1 is not finite: lm nan.*no state was saved yet"):
        run_steps(tmp_path, tiny_blip(reads=False), iter([batch]), TrainConfig(steps=1, device="cpu"))


def test_bf16_trains_and_keeps_weights_in_fp32(tmp_path: Path) -> None:
    model = tiny_blip().with_teacher(MomentumConfig(queue_size=5))
    disable_dropout(model)
    exact = copy.deepcopy(model)  # the queue's features are drawn, too
    config = TrainConfig(steps=2, precision="bf16", log_every=1, device="cpu")
    run_steps(tmp_path, model, endless(), config)
    run_steps(tmp_path / "fp32", exact, endless(), replace(config, precision="fp32"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for line, other in zip(logged(tmp_path), logged(tmp_path / "fp32"), strict=True):
        for name in ("itc", "lm"):
            assert line[name] == pytest.approx(other[name], rel=0.15)
            assert line[name] != other[name]


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    """With dropout, whose draws must be the same when a block is computed again, and with a teacher."""
    batch, gradients, losses, calls = tiny_batch((1, 2, 3)), [], [], []
    for last in (0, 1, 5):
        torch.manual_seed(0)
        model = tiny_blip().with_teacher(MomentumConfig(queue_size=5)).train()
        names = [name for name, _ in model.named_parameters()]
        for blocks in (model.vision.vit.blocks, model.med.blocks):
            checkpoint_activations(blocks, last)
        assert [name for name, _ in model.named_parameters()] == names
        counts = {"first": 0, "last": 0}
        for place, block in (("first", model.med.blocks[0]), ("last", model.med.blocks[1])):
            block.mlp.register_forward_pre_hook(lambda *_, c=counts, p=place: c.update({p: c[p] + 1}))
        found = model(batch)
        sum(found.values()).backward()
        model.after_step()
        assert model.state_dict().keys() == tiny_blip().with_teacher(MomentumConfig(5)).state_dict().keys()
        losses.append({name: value.item() for name, value in found.items()})
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append((counts["first"], counts["last"]))
    uses = calls[0][0]
    assert calls == [(uses, uses), (uses, 2 * uses), (2 * uses, 2 * uses)]
    for i in (1, 2):
        assert losses[i] == losses[0]
        for one, other in zip(gradients[i], gradients[0], strict=True):
            torch.testing.assert_close(one, other)


def test_checkpointing_is_a_matter_of_the_config(world: Path, tmp_path: Path) -> None:
    """The same run with and without it ends in the same weights, and saves them under the same names."""
    states = []
    for count in (0, 1):
        out = tmp_path / str(count)
        settings = ["train.steps=3", f"train.checkpoint_blocks={count}"]
        assert train_blip.main([str(write_config(world, out)), *settings]) == 0
        states.append(load_state(out / STATE_FILE)["model"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name, atol=1e-5, rtol=1e-4)


# Resuming


def test_without_a_state_a_run_begins_at_step_0(tmp_path: Path) -> None:
    model = tiny_blip()
    assert resume(tmp_path, model, torch.optim.AdamW(model.parameters()), CPU) == 0


def test_the_state_of_another_model_is_an_error(tmp_path: Path) -> None:
    run_steps(tmp_path, tiny_blip(), endless(), TrainConfig(steps=1, device="cpu"))
    other = tiny_blip(reads=False)
    with pytest.raises(ValueError, match="is not the state of this model") as error:
        resume(tmp_path, other, torch.optim.AdamW(other.parameters()), CPU)
    assert str(tmp_path / STATE_FILE) in str(error.value)


def test_training_after_a_resume_leaves_the_file_alone(tmp_path: Path) -> None:
    """The state is mapped from the file, not read; the optimiser must not write into it."""
    run_steps(tmp_path, tiny_blip(), endless(), TrainConfig(steps=1, device="cpu"))
    before = (tmp_path / STATE_FILE).read_bytes()
    model = tiny_blip().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert resume(tmp_path, model, optimizer, CPU) == 1
    sum(model(tiny_batch((1, 2, 3))).values()).backward()
    optimizer.step()
    assert (tmp_path / STATE_FILE).read_bytes() == before


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("accumulate", 0),
        ("log_every", 0),
        ("save_every", 0),
        ("seed", -1),
        ("checkpoint_blocks", -1),
    ],
)
def test_a_config_out_of_range_is_an_error(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
        TrainConfig(**({"steps": 1} | {name: value}))


def test_a_device_that_is_not_there_is_an_error() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device 'gpu' is unknown; use cpu, cuda"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            pick_device("cuda")
