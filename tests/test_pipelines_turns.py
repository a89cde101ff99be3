"""Evaluation in two real processes (gloo): the files of one process, byte for byte."""

import os
import socket
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing as mp
from image_files import jpeg, put, put_json
from small_run import save_models
from test_pipelines_eval_vqa import make_asked
from test_pipelines_evaluate import WORLD, save_stages
from torch import Tensor

from pipelines.parallel import processes
from pipelines.turns import all_turns, batched, own_turns, rows_of_turns
from pipelines.world import write_world

WORDS = b"red circle\nblue square\ngreen star\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of random weights, nine pictures with two captions each, and ten with a class of three."""
    found = tmp_path_factory.mktemp("turns")
    save_models(found / "models")
    save_stages(found / "models")
    write_world(WORLD, found / "world")
    make_asked(found / "vqa")
    put(found / "classes.txt", WORDS)
    put(found / "templates.txt", b"a {}\na picture of a {}\n")
    table = pa.table({"image": [jpeg(i) for i in range(10)], "label": [i % 3 for i in range(10)]})
    pq.write_table(table, found / "classes.parquet")
    return found


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun gives its processes: sums of several threads may be rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runs(folder: Path, out: Path) -> list[tuple[str, str]]:
    """(entry, config) of every command, with batches for both processes and with but one batch."""
    shards = {"shards": [str(folder / "world/test")], "device": "cpu"}
    images = {"images": str(folder / "classes.parquet")}
    lists = {name: str(folder / f"{name}.txt") for name in ("classes", "templates")}
    decoding = {"beams": 2, "min_length": 3, "max_length": 12}
    captions = {"protocol": {"prompt": "a", "decoding": decoding}, "grounding_gap": True}
    plans: list[tuple[str, str, dict[str, Any]]] = []
    for size, model in ((4, "filter"), (16, "stage1")):
        plans += [
            ("eval_retrieval", model, shards | {"protocol": {"k": 3}, "batch_size": size}),
            ("eval_captions", "captioner", shards | captions | {"batch_size": size}),
        ]
    probe = {"train": images, "strength": 1.0, "iterations": 20}
    plans += [("eval_zeroshot", "stage1", lists | {"sets": {"x": images}, "batch_size": 4})]
    plans += [("eval_zeroshot", "filter", lists | {"sets": {"x": images}, "batch_size": 3, "probe": probe})]
    asked = {"shards": [str(folder / "vqa/asked/test")], "device": "cpu", "batch_size": 2}
    plans += [("eval_vqa", "../vqa/models/vqa", asked)]
    found = []
    for number, (entry, model, tree) in enumerate(plans):
        name = f"{number}_{entry}"
        places = {"out": str(out / name), "model": str(folder / "models" / model)}
        found.append((f"pipelines.{entry}", put_json(out / f"{name}.yaml", tree | places)))
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launch(rank: int, ports: list[int], commands: list[tuple[str, str]], out: Path) -> None:
    """All commands as torchrun starts them, and then `dealt`, into <rank>.pt."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    for port, (entry, config) in zip(ports, commands, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        assert import_module(entry).main([config]) == 0
    os.environ["MASTER_PORT"] = str(ports[-1])
    with processes("cpu"):
        torch.save(dealt(), out / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    out = tmp_path_factory.mktemp("two")
    commands = runs(folder, out)
    mp.spawn(launch, (free_ports(len(commands) + 1), commands, out), nprocs=2)
    return out


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_what_one_does(folder: Path, two: Path, tmp_path: Path) -> None:
    """Retrieval re-ranked, captions with their gap, classes and a probe, answers: five to ten images by 2, 3,
    4 and 16, where the second process has no image at all."""
    for entry, config in runs(folder, tmp_path):
        assert import_module(entry).main([config]) == 0
    files = sorted(tmp_path.glob("*/*.json"))
    assert len(files) == 7 + 2 + 2 + 1  # metrics; captions, ranks and answers
    for path in files:
        assert (two / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
    assert not list(two.glob("**/*.tmp"))


def dealt() -> dict[str, Tensor]:
    """Of ten rows in batches of three, and of two in one batch."""
    found: dict[str, Tensor] = {}
    for name, count in {"many": 10, "few": 2}.items():
        own = list(own_turns(batched(range(count), 3)))
        found[f"own {name}"] = torch.tensor([number for batch in own for number in batch])
        found[f"all {name}"] = torch.tensor([number for batch in all_turns(own) for number in batch])
        parts = [torch.tensor(batch).double()[:, None] * torch.ones(2, dtype=torch.float64) for batch in own]
        found[f"rows {name}"] = rows_of_turns(parts, torch.device("cpu"))
    return found


def test_batches_are_dealt_out_whole_and_come_back_in_order(two: Path) -> None:
    own = {"many": ([0, 1, 2, 6, 7, 8], [3, 4, 5, 9]), "few": ([0, 1], [])}
    for rank in range(2):
        found = torch.load(two / f"{rank}.pt", weights_only=True)
        for name, count in {"many": 10, "few": 2}.items():
            assert found[f"own {name}"].tolist() == own[name][rank]
            assert found[f"all {name}"].tolist() == list(range(count))
            assert found[f"rows {name}"].tolist() == [[i, i] for i in range(count)]
            assert found[f"rows {name}"].dtype == torch.float64


def test_one_process_has_every_turn() -> None:
    batches = list(batched("abcdefg", 3))
    assert batches == [["a", "b", "c"], ["d", "e", "f"], ["g"]] == list(own_turns(batches))
    assert all_turns(batches) == batches and list(batched([], 3)) == []
    parts = [torch.ones(2, 1), torch.zeros(1, 1)]
    assert rows_of_turns(parts, torch.device("cpu")).tolist() == [[1], [1], [0]]
