"""What every training entry does around the loop: its processes, the state of a former run, log, final model.

OUT holds config.yaml, metrics.jsonl, state.pt (to go on after a stop) and, at the end, model/ (a checkpoint
folder).
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from blip.checkpoint import save_model
from blip.distributed import rank, world_size
from blip.med import MED
from blip.model import Blip
from blip.vision import VisionEncoder
from blip.vqa import BlipVQA
from capfilt.hold import hold
from pipelines.config import as_tree, config_hash, load_config, save_config
from pipelines.log import RunLog
from pipelines.memory import check_memory
from pipelines.optim import OptimConfig, make_optimizer
from pipelines.parallel import (
    DeviceMesh,
    checkpoint_activations,
    from_first,
    gather_objects,
    in_turn,
    node_mesh,
    optimizer_class,
    processes,
    shard,
    wait_for_all,
)
from pipelines.trainer import STATE_FILE, TrainConfig, resume, train
from qformer import Stage1, Stage2
from qformer.frozen import Frozen
from qformer.qformer import QFormer

# What may be another when a run goes on: how long it trains, and what computes the same.
FREE = {
    "out",
    "data.workers",
    *(f"train.{key}" for key in ("steps", "log_every", "save_every", "sinks")),
    *(f"train.{key}" for key in ("checkpoint_blocks", "checkpoint_backend")),
    *(f"train.{key}" for key in ("optimizer_sharding", "shard_frozen")),
}


class Data(Protocol):
    @property
    def batch_size(self) -> int:
        """Of one process."""


class Run(Protocol):
    """What the config of an entry has; it is a dataclass."""

    @property
    def out(self) -> str: ...

    @property
    def data(self) -> Data: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def optim(self) -> OptimConfig: ...


R = TypeVar("R", bound=Run)
M = TypeVar("M", Blip, BlipVQA, Stage1, Stage2)


def launch(
    run: R,
    build: Callable[[R], M],
    batches: Callable[..., tuple[Iterator[Any], int]],
    inspect: Callable[[M, Any], dict[str, float]] | None = None,
) -> int:
    """Train the model that `build` makes, from the first step or from where a run of this config stopped.

    `batches` takes (run.data, tokenizer, image size, seed, first batch, rank, world size) and gives the
    batches of this process and the rows of an epoch: `data.training_batches`. `inspect`: `trainer.train`.
    """
    with processes(run.train.device) as device, hold(run.out) if rank() == 0 else nullcontext():
        check_same_run(run, Path(run.out))
        wait_for_all()  # before the config is written again
        _train(run, device, build, batches, inspect)
    return 0


def check_same_run(run: Run, out: Path) -> None:
    """Refuse to go on with a state that another config made. How long and how fast to train may change."""
    if not (out / STATE_FILE).exists() or not (out / "config.yaml").exists():
        return
    before, now = (_decisive(config) for config in (load_config(type(run), out / "config.yaml"), run))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        found = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
        raise ValueError(
            f"{out} holds a run with another config: {found}. Choose another out, or delete {out}"
        )


def _decisive(run: Run) -> dict[str, Any]:
    """Dotted key -> value, of everything that decides what a step computes."""
    return {key: value for key, value in _flat(as_tree(run)).items() if key not in FREE}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, item in tree.items() for k, v in _flat(item, f"{prefix}.{name}".strip(".")).items()
    }


def make_cheaper(model: Blip | BlipVQA | Stage1 | Stage2, config: TrainConfig) -> None:
    """What makes a run cheaper, in memory or time, and computes the same."""
    # A frozen encoder keeps no activations.
    vision = model.vision.vit.blocks if isinstance(model.vision, VisionEncoder) else nn.ModuleList()
    texts: list[Iterable[nn.Module]]
    texts = [part.blocks for part in model.children() if isinstance(part, MED | QFormer)]
    checkpoint_activations(vision, config.checkpoint_blocks, config.checkpoint_backend)
    # A frozen language model does keep them: the gradient of the soft prompt comes through it.
    language = model.language.blocks if isinstance(model, Stage2) else []
    if config.checkpoint_backend == "torch":  # as BLIP: fairscale for the ViT only
        for blocks in (*texts, language):
            checkpoint_activations(blocks, config.checkpoint_blocks)
    if config.compile:
        for block in (*vision, *(block for blocks in texts for block in blocks)):
            block.compile(dynamic=True)  # texts differ in length


def spread_frozen(model: Blip | BlipVQA | Stage1 | Stage2, mesh: DeviceMesh) -> None:
    """Spread the weights of all that is frozen over the processes of `mesh`, see `parallel.shard`."""
    parts: list[tuple[Frozen[Any], list[nn.Module]]] = []
    if isinstance(model.vision, Frozen):
        parts.append((model.vision, list(model.vision.module.vit.blocks)))
    if isinstance(model, Stage2):
        parts.append((model.language.lm, model.language.blocks))
    if not parts:
        raise ValueError(
            f"train.shard_frozen is true, but nothing of a {type(model).__name__} is frozen; set it to false"
        )
    for frozen, blocks in parts:
        frozen.spread(partial(shard, blocks=blocks, mesh=mesh))


def _build(run: R, build: Callable[[R], M], device: torch.device) -> M:
    """The model on its device. Where what is frozen is spread, no device and no host ever holds it twice."""
    if not run.train.shard_frozen or world_size() == 1:
        return _moved(build(run), run, device)
    mesh = node_mesh(device)
    with in_turn():
        model = build(run)
        spread_frozen(model, mesh)  # before it moves: as a whole it may not fit
        return _moved(model, run, device)


def _moved(model: M, run: Run, device: torch.device) -> M:
    """The model on its device, after telling what a step will take there, and whether that fits."""
    told = check_memory(model, run.data, run.train, device, world_size())
    if rank() == 0:
        print("\n".join(told), flush=True)
    return model.to(device)


def agreed_step(step: int, out: Path) -> int:
    """The step to go on with, if all processes found the same."""
    found = sorted(set(gather_objects(step)))
    if len(found) > 1:
        raise ValueError(
            f"{out} is at steps {found}, by the process that looks; choose a folder that all nodes share"
        )
    return step


def _look(
    inspect: Callable[[M, Any], dict[str, float]], model: M, config: TrainConfig, device: torch.device
) -> Callable[[Any], dict[str, float]] | None:
    """What this process has to say at a log step."""
    if config.shard_frozen and world_size() > 1:
        # It takes all to compute, and of one batch: else one might be done while others wait for it for ever.
        return lambda batch: inspect(model, from_first(batch.to(torch.device("cpu"))).to(device))
    return partial(inspect, model) if rank() == 0 else None


def _train(
    run: R,
    device: torch.device,
    build: Callable[[R], M],
    batches: Callable[..., tuple[Iterator[Any], int]],
    inspect: Callable[[M, Any], dict[str, float]] | None,
) -> None:
    out = Path(run.out)
    random.seed(run.train.seed)
    torch.manual_seed(run.train.seed)
    model = _build(run, build, device)  # alike in all processes; what is drawn later is each one's own
    torch.manual_seed(run.train.seed + rank())
    make_cheaper(model, run.train)
    optimizer = make_optimizer(model, run.optim, optimizer_class(run.train.optimizer_sharding))
    step = agreed_step(resume(out, model, optimizer, device), out)
    size, first = model.config.vision.image_size, step * run.train.accumulate
    words = model.language.tokenizer if isinstance(model, Stage2) else model.tokenizer
    assert words is not None
    stream, rows = batches(run.data, words, size, run.train.seed, first, rank(), world_size())
    steps_per_epoch = max(1, rows // (run.data.batch_size * run.train.accumulate * world_size()))
    look = _look(inspect, model, run.train, device) if inspect else None
    with open_log(run, out, step) as log:
        if log:
            weights = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
            where = f"{device}, {world_size()} processes" if world_size() > 1 else str(device)
            what = f"{rows} rows, config {config_hash(run)}, from step {step}"
            log.say(f"{weights:.1f}M parameters on {where}, {what}")
        train(model, stream, optimizer, run.optim, run.train, log, out, step, steps_per_epoch, look)
    if rank() == 0:
        save_model(model, out / "model")
        print(f"saved {out / 'model'}")


@contextmanager
def open_log(run: Run, out: Path, step: int) -> Iterator[RunLog | None]:
    """The log of the first process, the config beside it; the others have none."""
    if rank() != 0:
        yield None
        return
    save_config(run, out)
    steps, sinks = run.train.steps, run.train.sinks
    with RunLog(out, total_steps=steps, start_step=step, sinks=sinks, config=as_tree(run)) as log:
        yield log
