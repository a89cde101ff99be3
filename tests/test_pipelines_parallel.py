"""Several real processes (gloo): the gradients of one, sharded optimisers, a killed run of two."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from test_blip_vqa_training import batch as vqa_batch
from test_pipelines_trainer import disable_dropout, logged, wait, world, write_config
from tiny import tiny_batch, tiny_blip, tiny_vqa
from torch import Tensor, nn

from blip.checkpoint import load_state
from blip.distributed import Rows, share
from blip.model import Batch, Blip
from blip.momentum import MomentumConfig
from blip.vqa import VqaBatch
from pipelines import train_blip
from pipelines.config import load_config
from pipelines.launch import make_cheaper
from pipelines.optim import OptimConfig, make_optimizer
from pipelines.parallel import (
    checkpoint_activations,
    data_parallel,
    gather_objects,
    mean_over_ranks,
    optimizer_class,
    optimizer_state,
)
from pipelines.trainer import STATE_FILE, TrainConfig, resume

ROOT = Path(__file__).resolve().parent.parent
__all__ = ["world"]  # the fixture

# Rows 0-2 are rank 0's, 3-4 are rank 1's: fewer, shorter or longer, and with siblings on both sides.
IMAGE_IDS, CUT = (1, 2, 1, 3, 2), 3
OBJECTIVES = {
    "pretrain": lambda: tiny_blip(),
    "pretrain with teacher": lambda: tiny_blip().with_teacher(
        MomentumConfig(queue_size=7, alpha=0.4, alpha_steps=0, decay=0.9)
    ),
    "captioner": lambda: tiny_blip(reads=False),
    "filter": lambda: tiny_blip(writes=False),
}


def in_processes(work: Callable[..., None], folder: Path, count: int = 2) -> list[dict[str, Tensor]]:
    """What `work(folder)` saved as `<rank>.pt` in each of `count` processes."""
    mp.spawn(_start, (work, folder, count), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _start(rank: int, work: Callable[..., None], folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save(work(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def double(name: str) -> Blip:
    """Of float64, without dropout, with negatives of all processes, the likeliest of them."""
    torch.manual_seed(0)
    model = OBJECTIVES[name]().double().train()
    model.config = replace(model.config, negative_all_rank=True)
    disable_dropout(model)
    return model


def whole_batch() -> Batch:
    batch = tiny_batch(IMAGE_IDS, prompt_length=1, seed=3)
    return replace(batch, pixels=batch.pixels.double())


def part(batch: Batch, rows: slice) -> Batch:
    """As a data worker makes it: padded to its own longest text."""
    longest = int(batch.mask[rows].sum(1).max())
    ids, mask = batch.ids[rows, :longest], batch.mask[rows, :longest]
    return Batch(batch.pixels[rows], ids, mask, batch.image_ids[rows], batch.prompt_length)


def steps(name: str, batch: Batch, count: int = 2) -> dict[str, Tensor]:
    """Losses, gradients, weights and buffers of `count` steps of plain descent."""
    likeliest, torch.multinomial = torch.multinomial, lambda weights, n: weights.argmax(1, keepdim=True)
    model = double(name)
    parallel, found = data_parallel(model), {}
    for step in range(count):
        losses = parallel(batch)
        sum(losses.values()).backward()
        found |= {f"{step} {k}": mean_over_ranks(torch.stack([v.detach()])) for k, v in losses.items()}
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                found[f"{step} {key}"] = weight.grad.clone()
                weight.data -= 0.1 * weight.grad
                weight.grad = None
        model.after_step()
    torch.multinomial = likeliest
    return found | model.state_dict()


def steps_of_this_rank() -> dict[str, Tensor]:
    rows = (slice(0, CUT), slice(CUT, None))[dist.get_rank()]
    return {
        f"{name}/{key}": value
        for name in OBJECTIVES
        for key, value in steps(name, part(whole_batch(), rows)).items()
    }


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """In float64, for each objective, with fewer rows on one of them, queue and teacher included."""
    ranks = in_processes(steps_of_this_rank, tmp_path)
    for name in OBJECTIVES:
        for key, value in steps(name, whole_batch()).items():
            for rank, found in enumerate(ranks):
                torch.testing.assert_close(
                    found[f"{name}/{key}"], value, atol=1e-6, rtol=1e-6, msg=lambda m, k=key, r=rank, n=name:
                    f"{n}, rank {r}, {k}: {m}"
                )  # fmt: skip


def vqa_gradients(batch: VqaBatch) -> dict[str, Tensor]:
    """Of a step on questions, in float64; the loss as the log shows it."""
    model = tiny_vqa(seed=3).double().eval()  # without dropout
    parallel = data_parallel(model)  # must outlive the backward pass
    loss = parallel(batch)["lm"]
    loss.backward()
    mean = mean_over_ranks(torch.stack([loss.detach()]))
    return {name: w.grad for name, w in model.named_parameters() if w.grad is not None} | {"lm": mean}


def vqa_gradients_of_this_rank() -> dict[str, Tensor]:
    """Question 0 is rank 0's, with one answer; questions 1 and 2 are rank 1's, with five."""
    whole, first, end = vqa_batch(), *((0, 1), (1, 3))[dist.get_rank()]
    owned = (whole.owner >= first) & (whole.owner < end)
    questions = (field[first:end] for field in (whole.pixels, whole.ids, whole.mask))
    answers = (field[owned] for field in (whole.answer_ids, whole.answer_mask, whole.weights))
    return vqa_gradients(VqaBatch(*questions, *answers, whole.owner[owned] - first))


def test_two_processes_answer_questions_with_the_gradients_of_one(tmp_path: Path) -> None:
    """Though they have unlike numbers of questions, of answers, and of words."""
    ranks = in_processes(vqa_gradients_of_this_rank, tmp_path)
    one = vqa_gradients(vqa_batch())
    assert len(one) > 20
    for found in ranks:
        assert found.keys() == one.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(
                found[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def own_negatives() -> dict[str, Tensor]:
    """ITM of this rank's rows, and for the rank of two rows all of its six pairs, one by one."""
    model = double("filter")
    model.config = replace(model.config, negative_all_rank=False)
    batch = part(whole_batch(), (slice(0, CUT), slice(CUT, None))[dist.get_rank()])
    found = {"itm": model(batch)["itm"].detach()}
    if dist.get_rank() == 1:
        tokens = model.image_tokens(batch.pixels).detach()
        total = torch.zeros((), dtype=torch.float64)
        for text, image, label in ((0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 0), (1, 0, 0)):
            logits = model.match(batch.ids[[text]], batch.mask[[text]], tokens[[image]])
            total += nn.functional.cross_entropy(logits, torch.tensor([label])).detach()
        found["expected"] = total / 6 * (2 * 2 / 5)  # two of the five rows, a mean over two processes
    return found


def test_negatives_stay_on_their_rank_unless_asked(tmp_path: Path) -> None:
    found = in_processes(own_negatives, tmp_path)[1]
    torch.testing.assert_close(found["itm"], found["expected"], atol=1e-9, rtol=0)


def gathers() -> dict[str, Tensor]:
    rank = dist.get_rank()
    mine = torch.arange(2.0 * (rank + 1)).reshape(rank + 1, 2) + 10 * rank
    rows = Rows.of(len(mine), mine.device)
    texts = rows.gather_texts(torch.full((rank + 1, 3 - rank), rank + 1))
    return {
        "rows": rows.gather(mine),
        "texts": texts,
        "own": torch.tensor([rows.own.start, rows.own.stop]),
        "share": torch.as_tensor(share(rank + 1, mine.device)),
        "objects": torch.tensor(gather_objects(rank)),
    }


def test_rows_come_in_the_order_of_ranks_and_keep_their_number(tmp_path: Path) -> None:
    for rank, found in enumerate(in_processes(gathers, tmp_path)):
        assert found["rows"].tolist() == [[0, 1], [10, 11], [12, 13]]
        assert found["texts"].tolist() == [[1, 1, 1], [2, 2, 0], [2, 2, 0]]
        assert found["own"].tolist() == [[0, 1], [1, 3]][rank]
        assert float(found["share"]) == pytest.approx([2 / 3, 4 / 3][rank])
        assert found["objects"].tolist() == [0, 1]


def sharded() -> dict[str, Tensor]:
    """Four steps of AdamW, of ZeRO 1 and of fairscale's OSS: the weights, and the state in one piece."""
    found = {}
    for sharding in ("none", "zero1", "fairscale_oss"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = make_optimizer(model, OptimConfig(lr=0.01), optimizer_class(sharding))
        parallel = data_parallel(model)
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            parallel(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found |= {f"{sharding} {name}": value for name, value in model.state_dict().items()}
        state = optimizer_state(optimizer)
        assert (state is None) == (dist.get_rank() > 0)
        if state is not None:
            averages = state["state"]
            found |= {f"{sharding} state {i}": averages[i]["exp_avg"] for i in sorted(averages)}
    return found


def test_a_sharded_optimiser_takes_the_same_steps(tmp_path: Path) -> None:
    ranks = in_processes(sharded, tmp_path)
    names = [name.partition(" ")[2] for name in ranks[0] if name.startswith("none")]
    assert len(names) == 8  # four tensors, four averages
    for name in names:
        for sharding in ("zero1", "fairscale_oss"):
            torch.testing.assert_close(
                ranks[0][f"{sharding} {name}"], ranks[0][f"none {name}"], rtol=0, atol=0
            )
    for name in ranks[1]:
        assert torch.equal(ranks[1][name], ranks[0][name])


def test_fairscale_and_torch_recompute_the_same_gradients() -> None:
    found = []
    for backend in (None, "torch", "fairscale"):
        torch.manual_seed(0)
        model = tiny_blip().train()
        before = list(model.state_dict())
        if backend:
            checkpoint_activations(model.vision.vit.blocks, 2, backend)
        assert list(model.state_dict()) == before
        torch.manual_seed(1)
        sum(model(tiny_batch((1, 2, 3))).values()).backward()
        found.append([weight.grad for weight in model.parameters()])
    for gradients in found[1:]:
        for mine, expected in zip(gradients, found[0], strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("setting", "reason"), [({"precision": "bf16"}, "recomputes in fp32"), ({"compile": True}, "compiled")]
)
def test_fairscale_is_refused_where_it_is_wrong(setting: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainConfig(steps=1, checkpoint_backend="fairscale", **setting)


def test_compiled_blocks_compute_the_same() -> None:
    """A captioner: few kinds of calls, as each has to be compiled."""
    model = tiny_blip(reads=False).train()
    disable_dropout(model)
    compiled, batch = copy.deepcopy(model), tiny_batch((1, 2, 3))
    make_cheaper(compiled, TrainConfig(steps=1, compile=True))
    torch.testing.assert_close(compiled(batch)["lm"], model(batch)["lm"], atol=1e-5, rtol=1e-4)


# The command


def torchrun(config: Path, *settings: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launch, "-m", "pipelines.train_blip", str(config), *settings]


def test_a_killed_run_of_two_processes_goes_on_as_if_nothing_had_happened(
    world: Path, tmp_path: Path
) -> None:
    """Teacher, queue, dropout, batch norm, a sharded optimiser; the whole group is killed in the middle."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    config = {name: write_config(world, tmp_path / name) for name in ("undisturbed", "killed")}
    for path in config.values():
        tree = yaml.safe_load(path.read_text())
        tree["train"]["optimizer_sharding"] = "zero1"
        tree["data"]["batch_size"] = 3
        path.write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        torchrun(config["undisturbed"]), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    metrics = tmp_path / "killed" / "metrics.jsonl"
    with subprocess.Popen(
        torchrun(config["killed"]),
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        started = wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= 7, 300)
        os.killpg(run.pid, signal.SIGKILL)
    assert started
    time.sleep(0.5)
    step = load_state(tmp_path / "killed" / STATE_FILE)["step"]
    assert 0 < step < 18
    done = subprocess.run(
        torchrun(config["killed"]), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    states = [load_state(tmp_path / name / STATE_FILE) for name in config]
    assert [len(state["rng"]) for state in states] == [2, 2]
    assert not torch.equal(states[0]["rng"][0]["cpu"], states[0]["rng"][1]["cpu"])
    for key in ("model", "step", "rng"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    torch.testing.assert_close(
        states[0]["optimizer"]["state"], states[1]["optimizer"]["state"], rtol=0, atol=0
    )
    losses = [
        [(line["step"], line["itc"], line["lm"]) for line in logged(tmp_path / name)] for name in config
    ]
    assert losses[0] == losses[1]

    model = train_blip.build(load_config(train_blip.TrainRun, config["killed"]))
    with pytest.raises(ValueError, match="written by 2 processes, now there are 1"):
        resume(tmp_path / "killed", model, make_optimizer(model, OptimConfig()), torch.device("cpu"))
