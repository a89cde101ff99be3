"""The one training loop. Jobs differ by model, data and config, never by a copy of this file.

The model gives named losses for a batch and is told `after_step()`; the sum of the losses is minimised.
Everything the next step depends on is in the state file (weights, teacher, queues, optimiser, step, random
numbers; the data position follows from the step), so a killed run goes on as if it had never stopped: bit for
bit on a CPU. Several processes run this same loop; the first of them keeps the log and the state.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from blip.checkpoint import load_state, save_state
from blip.distributed import rank, world_size
from pipelines.alarms import Alarms
from pipelines.log import RunLog
from pipelines.optim import OptimConfig, lr_at
from pipelines.parallel import (
    Checkpointing,
    Precision,
    Sharding,
    agree_on_batch_norm,
    autocast,
    data_parallel,
    gather_objects,
    mean_over_ranks,
    optimizer_state,
    wait_for_all,
    without_sync,
)


class Batch(Protocol):
    """What the loop must know of a batch; the rest is between the data and the model."""

    @property
    def pixels(self) -> Tensor:
        """[B, 3, S, S]"""

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    accumulate: int = 1  # batches per optimiser step
    precision: Precision = "fp32"
    checkpoint_blocks: int = 0  # recompute activations: of the last n blocks of ViT, text, language model
    checkpoint_backend: Checkpointing = "torch"  # fairscale: of the vision blocks only, as BLIP does
    optimizer_sharding: Sharding = "none"  # over the processes
    shard_frozen: bool = False  # frozen weights over the processes of a node, where one device is too small
    compile: bool = False  # torch.compile every block: slow first steps, then faster ones
    log_every: int = 50  # steps
    save_every: int = 1000  # steps
    seed: int = 0
    device: str = "auto"
    sinks: tuple[str, ...] = ()  # besides metrics.jsonl: tensorboard, wandb, trackio

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "accumulate", "log_every", "save_every"), 1)
        for name, low in (least | {"seed": 0, "checkpoint_blocks": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.checkpoint_backend == "fairscale" and (self.precision == "bf16" or self.compile):
            reason = "cannot be compiled" if self.compile else "recomputes in fp32 what bf16 had computed"
            raise ValueError(
                f"checkpoint_backend fairscale {reason}, so gradients would be wrong or none; use torch"
            )


class NotFinite(ValueError):
    """A loss or the gradient is NaN or infinite; the message names the values."""


STATE_FILE = "state.pt"


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Restore everything from the folder's state file; the step to go on with, 0 when there is none.

    Raises ValueError when the file is damaged or holds the state of another model or number of processes.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return 0
    state = load_state(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the state of this model ({error}); choose another out or remove the file"
        ) from error
    if len(state["rng"]) != world_size():
        raise ValueError(
            f"{path} was written by {len(state['rng'])} processes, now there are {world_size()}, which would "
            "see other batches; start as many, or choose another out and start from its weights"
        )
    numbers = state["rng"][rank()]
    torch.set_rng_state(numbers["cpu"])
    if device.type == "cuda" and numbers["cuda"] is not None:
        torch.cuda.set_rng_state(numbers["cuda"])
    return int(state["step"])


def train(
    model: nn.Module,
    batches: Iterator[B],
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    config: TrainConfig,
    log: RunLog | None,
    folder: Path,
    first_step: int,
    steps_per_epoch: int,
    inspect: Callable[[B], dict[str, float]] | None = None,
) -> None:
    """Train from `first_step` to `config.steps`; `batches` must begin at `first_step * config.accumulate`.

    `log` is None on all processes but the first. `inspect` is asked at every log step for more to log, about
    a batch of that step; it may look at the model and must leave it, and the random numbers, as they are. It
    may wait for other processes only where all have one.
    The state is saved every `config.save_every` steps and at the end. Raises NotFinite, with the last state
    on disk as it was, when a loss or the gradient is NaN or infinite.
    """
    device = next(model.parameters()).device
    model.train()
    parallel, alarms = data_parallel(model), Alarms(optim.warmup_steps)
    rows = 0
    for step in range(first_step, config.steps):
        rate = lr_at(optim, step, config.steps, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        micro = [next(batches) for _ in range(config.accumulate)]
        losses = _backward(parallel, micro, config, device)
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or math.inf)
        _require_finite(losses | {"grad_norm": norm}, step + 1, folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step()  # type: ignore[operator]
        rows += sum(len(batch.pixels) for batch in micro)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            values = {name: float(value) for name, value in losses.items()}
            values |= {"lr": rate, "grad_norm": float(norm)}
            values |= inspect(micro[-1].to(device)) if inspect else {}
            if log:
                said = alarms(done, values)
                log.log(done, values | ({"alarms": "; ".join(said)} if said else {}), rows * world_size())
                for text in said:
                    log.say(f"ALARM at step {done}: {text}")
            rows = 0
        if done % config.save_every == 0 or done == config.steps:
            _save(folder, model, optimizer, device, done)


def _backward(
    model: nn.Module, micro: Sequence[Batch], config: TrainConfig, device: torch.device
) -> dict[str, Tensor]:
    """Gradients of the mean over micro-batches and processes; that of each named loss, on the device."""
    total = torch.zeros((), device=device)
    for number, batch in enumerate(micro, start=1):
        with without_sync(model, when=number < len(micro)):
            with autocast(device, config.precision):
                losses = model(batch.to(device))
                each = torch.stack(list(losses.values())) / len(micro)
            each.sum().backward()
        total = total + each.detach()
    return dict(zip(losses, mean_over_ranks(total), strict=True))


def _require_finite(values: dict[str, Tensor], step: int, folder: Path) -> None:
    if bool(torch.stack(list(values.values())).isfinite().all()):  # the one wait for the device in a step
        return
    found = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
    path = folder / STATE_FILE
    saved = f"the state of the last save is in {path}" if path.exists() else "no state was saved yet"
    raise NotFinite(
        f"step {step} is not finite: {found}; lower optim.lr, set optim.grad_clip or train in fp32; {saved}"
    )


def _save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, step: int
) -> None:
    agree_on_batch_norm(model)
    cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
    numbers = gather_objects({"cpu": torch.get_rng_state(), "cuda": cuda})
    whole = optimizer_state(optimizer)
    if rank() == 0:
        state = {"model": model.state_dict(), "optimizer": whole, "step": step, "rng": numbers}
        save_state(folder / STATE_FILE, state)
    wait_for_all()
