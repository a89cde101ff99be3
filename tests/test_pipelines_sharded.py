"""Frozen weights spread over processes, and language models that compute their activations again."""

import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_pipelines_parallel import in_processes, part
from test_pipelines_stages import CONSTANT, folder, metrics, stage2
from test_qformer_stage1 import likeliest
from test_qformer_stage2 import opt, t5, tiny_stage2
from tiny import pixels, tiny_batch, tiny_blip
from tiny_qformer import tiny_stage1
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from blip.checkpoint import load_state, read_safetensors
from pipelines import train_stage1
from pipelines.launch import agreed_step, make_cheaper, spread_frozen
from pipelines.parallel import data_parallel, from_first, in_turn, mean_over_ranks, node_mesh, shard
from pipelines.trainer import STATE_FILE, TrainConfig
from qformer import Stage1, Stage2
from qformer.frozen import Frozen
from qformer.stage2 import Stage2Batch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
__all__ = ["folder"]  # the fixture

MODELS = {
    "stage1": lambda: tiny_stage1().double(),
    "opt": lambda: tiny_stage2(opt).double(),
    "t5": lambda: tiny_stage2(t5).double(),
}
GIVEN = ["", "a photo of", "question: what is on the left? answer:", "", "a"]
WANTED = ["a red cat", "the dog on the right", "blue", "a small bird on the left of a big dog", "photo"]
ALL, ROWS = slice(0, 5), (slice(0, 3), slice(3, 5))  # rank 1 has fewer rows


def batch_of(model: Stage1 | Stage2, rows: slice) -> Any:
    if isinstance(model, Stage1):
        return part(tiny_batch((1, 2, 1, 3, 2), prompt_length=1, seed=3), rows)
    return Stage2Batch(pixels(5)[rows], model.language.tokenizer(GIVEN[rows], WANTED[rows]))


def gradients(model: Stage1 | Stage2, rows: slice) -> dict[str, Tensor]:
    """Losses and gradients, of the second time: what was gathered for the first is let go by then."""
    drawn, torch.multinomial = torch.multinomial, likeliest
    parallel, batch = data_parallel(model), batch_of(model, rows)
    for _ in range(2):
        model.zero_grad()
        losses = parallel(batch)
        sum(losses.values()).backward()
    torch.multinomial = drawn
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return found | {name: mean_over_ranks(loss.detach()[None]) for name, loss in losses.items()}


def frozen_parts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part.module for name, part in model.named_modules() if isinstance(part, Frozen)}


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def of_this_rank(folder: Path) -> dict[str, Tensor]:
    """What a process sees of three models whose frozen weights it shares with another."""
    found = {}
    for name, make in MODELS.items():
        model = make()
        spread_frozen(model, node_mesh(CPU))
        make_cheaper(model.to(CPU), TrainConfig(steps=1, checkpoint_blocks=1))
        found |= {f"{name} {key}": value for key, value in gradients(model, ROWS[dist.get_rank()]).items()}
        for place, module in frozen_parts(model).items():
            spread = [weight for weight in module.parameters() if isinstance(weight, DTensor)]
            found[f"{name} {place} held"] = torch.tensor(bytes_of(w.to_local() for w in spread))
            found[f"{name} {place} whole"] = torch.tensor(bytes_of(spread))
            for key, weight in module.named_parameters():
                full = weight.full_tensor() if isinstance(weight, DTensor) else weight
                found[f"{name} {place} weight {key}"] = full.detach()
        notes = model.vision.module._get_fsdp_state()._comm_ctx.post_forward_order
        found[f"{name} notes"] = torch.tensor(len(notes))
        if isinstance(model, Stage2):  # all of one batch, though each has its own
            same = from_first(batch_of(model, ROWS[dist.get_rank()]))
            texts = model.caption(same.pixels, "a photo of")
            found[f"{name} captions"] = torch.tensor([list(t.encode().ljust(200)) for t in texts])
        if dist.get_rank() == 0:  # alone: nothing has to be gathered for it
            model.save_pretrained(folder / name)
    with pytest.raises(ValueError, match=r"is at steps \[3, 4\], by the process that looks; choose a folder"):
        agreed_step(3 + dist.get_rank(), folder)
    assert agreed_step(3, folder) == 3
    with in_turn():
        began = time.monotonic()
        time.sleep(0.05)
        found["turn"] = torch.tensor([began, time.monotonic()], dtype=torch.float64)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Tensor]], Path]:
    """What two real processes found, and the folder that the first saved to."""
    folder = tmp_path_factory.mktemp("sharded")
    return in_processes(partial(of_this_rank, folder), folder), folder


Ranks = tuple[list[dict[str, Tensor]], Path]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_that_share_what_is_frozen_find_the_gradients_of_one(ranks: Ranks, name: str) -> None:
    """In float64, a block of each part computed again on top of it."""
    expected = gradients(MODELS[name](), ALL)
    assert len(expected) > 20
    for found in ranks[0]:
        for key, value in expected.items():
            torch.testing.assert_close(
                found[f"{name} {key}"], value, atol=1e-6, rtol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_each_holds_half_of_the_blocks_and_they_stay_as_they_were(ranks: Ranks, name: str) -> None:
    parts = frozen_parts(MODELS[name]())
    assert len(parts) == (1 if name == "stage1" else 2)
    for place, module in parts.items():
        held, whole = (
            [int(found[f"{name} {place} {kind}"]) for found in ranks[0]] for kind in ("held", "whole")
        )
        assert sum(held) == whole[0] and max(held) < 0.55 * whole[0]
        named = module.named_parameters()
        assert whole[0] == bytes_of(w for key, w in named if re.search(r"(blocks?|layers)\.\d", key))
        for found in ranks[0]:
            for key, weight in module.named_parameters():
                assert torch.equal(found[f"{name} {place} weight {key}"], weight), key


@pytest.mark.parametrize("name", MODELS)
def test_the_first_saves_alone_with_the_digest_of_the_whole(ranks: Ranks, name: str) -> None:
    saved = read_safetensors(ranks[1] / name / "model.safetensors")
    model = MODELS[name]()
    model.load_state_dict(saved)  # compares the sha256
    assert sum("digest" in key for key in saved) == len(frozen_parts(model))
    assert saved.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_shared_language_models_write_what_one_process_writes(ranks: Ranks, name: str) -> None:
    model = MODELS[name]()
    expected = model.caption(batch_of(model, ROWS[0]).pixels, "a photo of")
    for found in ranks[0]:
        assert [bytes(row.tolist()).decode().rstrip() for row in found[f"{name} captions"]] == expected


def test_nothing_piles_up_where_no_backward_pass_comes(ranks: Ranks) -> None:
    for found in ranks[0]:
        assert [int(found[f"{name} notes"]) for name in MODELS] == [0, 0, 0]


def test_processes_of_a_node_take_turns(ranks: Ranks) -> None:
    (_, end), (begin, _) = (found["turn"].tolist() for found in ranks[0])
    assert end <= begin


@pytest.fixture
def fifth_of_eight() -> Any:
    """This process believes to be the fifth of eight, which do not answer."""
    dist.init_process_group("fake", store=FakeStore(), rank=4, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fifth_of_eight")
def test_every_node_holds_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    mesh = node_mesh(CPU)
    assert mesh.mesh.tolist() == [4, 5, 6, 7]
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)).requires_grad_(False)
    first = model[0].weight[:4].clone()
    shard(model, [model[0]], mesh)
    assert torch.equal(model[0].weight.to_local(), first)
    assert not isinstance(model[1].weight, DTensor)  # no block

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="of 8 processes 3 are on this node"):
        node_mesh(CPU)


def test_there_must_be_something_to_share() -> None:
    with pytest.raises(ValueError, match=r"train\.shard_frozen is true, but nothing of a Blip is frozen"):
        spread_frozen(tiny_blip(), None)
    with pytest.raises(ValueError, match="a Linear says of no part that it is a block"):
        shard(nn.Linear(2, 2), [], None)


# Activations


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_a_frozen_language_model_can_compute_its_activations_again(name: str) -> None:
    """The same loss and gradients, bit for bit, from fewer bytes that are kept for the backward pass."""
    found = []
    for count in (0, 1, 9):
        model = MODELS[name]()
        make_cheaper(model, TrainConfig(steps=1, checkpoint_blocks=count))
        language, prompt = model.language, model.soft_prompt(pixels(5)).detach().requires_grad_()
        weights = {weight.untyped_storage().data_ptr() for weight in language.lm.module.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = language.loss(prompt, language.tokenizer(GIVEN, WANTED))
        loss.backward()
        found.append((loss.detach(), prompt.grad, sum(n for at, n in kept.items() if at not in weights)))
    for loss, gradient, _ in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])
    none, last, every = (size for *_, size in found)
    assert last < 0.9 * none and every < 0.5 * none, (none, last, every)


# The command


def torchrun(entry: str, *arguments: object) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", f"pipelines.{entry}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_run_that_shares_what_is_frozen_is_the_run_of_one(folder: Path, tmp_path: Path) -> None:
    """It looks at captions at every step, and goes on after a stop with fewer activations kept."""
    lines = stage2(folder, "t5", tmp_path / "one", "train.steps=4", *CONSTANT, "optim.lr=1e-4")
    shared = (f"out={tmp_path}/two", "data.batch_size=4", "train.shard_frozen=true")
    torchrun("train_stage2", tmp_path / "one/config.yaml", *shared, "train.steps=2")
    torchrun("train_stage2", tmp_path / "one/config.yaml", *shared, "train.checkpoint_blocks=9")
    found = metrics(tmp_path / "two")
    assert [line["lm"] for line in found] == pytest.approx([line["lm"] for line in lines], rel=1e-4)
    assert all({"grounding_gap", "unique_captions"} <= line.keys() for line in found)


def test_alone_there_is_nobody_to_share_with(folder: Path, tmp_path: Path) -> None:
    settings = (f"out={tmp_path}/out", "train.steps=1", "train.shard_frozen=true")
    assert train_stage1.main([str(folder / "stage1/config.yaml"), *settings]) == 0


def test_two_nodes_meet_by_the_line_of_the_makefile(folder: Path, tmp_path: Path) -> None:
    """Two launchers on one machine, each with a process; each node then holds all that is frozen."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        head = f"HEAD=localhost:{free.getsockname()[1]}"
    settings = f"out={tmp_path}/out data.batch_size=4 train.steps=2 train.shard_frozen=true"
    make = ["make", "-n", "--no-print-directory", "stage1", f"CONFIG={folder}/stage1/config.yaml"]
    make += ["NPROC=1", "NNODES=2", head]
    shown = subprocess.run([*make, f"ARGS={settings}"], cwd=ROOT, capture_output=True, text=True, check=True)
    line = shown.stdout.splitlines()[-1].split()
    assert {"--nnodes=2", "--nproc-per-node=1", "pipelines.train_stage1"} <= set(line)
    nodes = [
        subprocess.Popen([sys.executable, *line[1:]], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    state, before = (load_state(place / STATE_FILE) for place in (tmp_path / "out", folder / "stage1"))
    assert (state["step"], len(state["rng"])) == (2, 2)
    assert torch.equal(state["model"]["vision.digest"], before["model"]["vision.digest"])
    assert all("grounding_gap" in line for line in metrics(tmp_path / "out"))
