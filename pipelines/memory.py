"""What a training step needs of its device's memory, told before it starts; what cannot fit is refused.

Weights, gradients and the optimiser's state are counted. What the forward pass keeps is estimated from
shapes, see `pipelines.activations`, for texts of the greatest length; so is the working space, what comes and
goes. Not in it: what the device's libraries take for themselves, and memory in pieces too small to be used.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip.model import Blip
from pipelines.activations import Model, Step, kept_by
from pipelines.trainer import TrainConfig
from qformer import Stage1, Stage2
from qformer.frozen import Frozen

GB = 1e9
ERROR = 1.25  # how much too high the estimate of activations may be: what may still fit is not refused
ALL = 1_000_000  # blocks
LENGTHS = ("max_length", "max_question", "max_answer")  # of texts, in tokens, in the config of the data


@dataclass(frozen=True)
class Part:
    """A part of the model; bytes are those that this device holds."""

    name: str
    trained: int  # parameters
    frozen: int
    weights: float


@dataclass(frozen=True)
class Plan:
    """Bytes that one process needs in a step."""

    images: int
    parts: tuple[Part, ...]
    gradients: float
    optimizer: float
    copies: float  # of trained weights, for the matrix products of autocast
    activations: Mapping[str, float]
    working: float
    there: float  # of the weights, what the device already holds

    @property
    def weights(self) -> float:
        return sum(part.weights for part in self.parts)

    @property
    def counted(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def total(self) -> float:
        return self.counted + sum(self.activations.values()) + self.working

    @property
    def least(self) -> float:
        """What it needs if activations were estimated too high."""
        return self.counted + (sum(self.activations.values()) + self.working) / ERROR


def plan_memory(
    model: Model,
    config: TrainConfig,
    step: Step,
    device: torch.device | None = None,
    processes: int = 1,
    on_node: int = 1,
) -> Plan:
    """Of a model on any device, meta too. `on_node` of the `processes` are on this node: they share what is
    frozen where `config.shard_frozen` says so."""
    spread = on_node if config.shard_frozen else 1
    split = (
        {weight for block in _frozen_blocks(model) for weight in block.parameters()} if spread > 1 else set()
    )
    parts, there = [], 0.0
    for name, module in model.named_children():
        tensors = list(_tensors(module))
        trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
        sizes = {tensor: _here(tensor) / (spread if tensor in split else 1) for tensor in tensors}
        there += sum(size for tensor, size in sizes.items() if device and tensor.device.type == device.type)
        rest = sum(tensor.numel() for tensor in tensors if not tensor.requires_grad)
        parts.append(Part(name, trained, rest, sum(sizes.values())))
    trained_bytes = sum(_here(weight) for weight in model.parameters() if weight.requires_grad)
    kept = kept_by(model, step)
    return Plan(
        images=step.images,
        parts=tuple(parts),
        gradients=trained_bytes,
        optimizer=2 * trained_bytes / (1 if config.optimizer_sharding == "none" else processes),
        copies=_copies(model) if step.bf16 else 0.0,
        activations={name: found.bytes for name, found in kept.items()},
        working=_working(model, step) + max(found.again for found in kept.values()),
        there=there,
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Weights and buffers, also of what is frozen, each once."""
    found: dict[Tensor, None] = {}
    for part in module.modules():
        inside = part.module if isinstance(part, Frozen) else part
        found |= dict.fromkeys([*inside.parameters(), *inside.buffers()])
    yield from found


def _here(tensor: Tensor) -> float:
    """Bytes of this process' part of a tensor that may be spread over several."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return float(local.numel() * local.element_size())


def _frozen_blocks(model: Model) -> list[nn.Module]:
    """What `train.shard_frozen` spreads, as long as it is still whole."""
    blocks = list(model.vision.module.vit.blocks) if isinstance(model.vision, Frozen) else []
    blocks += model.language.blocks if isinstance(model, Stage2) else []
    return [block for block in blocks if not any(hasattr(w, "to_local") for w in block.parameters())]


def _copies(model: Model) -> float:
    """Autocast keeps the weights of matrix products in two bytes for the backward pass; words of the LM head
    among them."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    numbers = sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.requires_grad)
    heads = [part.vocab_size * part.width for part in _writers(model)]
    return 2.0 * (numbers + sum(heads))


def _writers(model: Model) -> list[Any]:
    """The config of the stack that has an LM head, if one has."""
    if isinstance(model, Stage1 | Stage2):
        return [model.config.qformer] if model.config.qformer.text and model.config.qformer.writes else []
    return [model.config.text] if not isinstance(model, Blip) or model.config.text.writes else []


def _working(model: Model, step: Step) -> float:
    """The larger of two: a block of an encoder without gradient, and the gradient of next-word logits."""
    vision, size = model.config.vision, 0
    if isinstance(model.vision, Frozen):
        size = model.vision.dtype.itemsize
    elif isinstance(model, Blip) and model.teacher is not None:
        size = step.matrix
    hidden = vision.hidden or 4 * vision.width
    encoder = step.images * vision.tokens * (2 * vision.width + 2 * hidden) * size
    words = max([part.vocab_size * step.words for part in _writers(model)], default=0) * (4 + step.matrix)
    if isinstance(model, Stage2):
        lm = model.language.lm
        words = step.images * step.length * lm.module.config.vocab_size * (4 + lm.dtype.itemsize)
    return float(max(encoder, words))


# ---- the device --------------------------------------------------------------------------------------


def room_of(device: torch.device) -> float | None:
    """Bytes that a run may take: of a GPU what is free now, of a CPU all memory, as other programs may make
    room. None where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return memory_of_machine() if device.type == "cpu" else None


def memory_of_machine(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Bytes of memory that the machine has and the container may use, None where there is no such file."""
    found = []
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(float(lines["MemTotal"].split()[0]) * 1024)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2, of version 1
        if (cgroup / name).exists() and (limit := (cgroup / name).read_text().strip()) != "max":
            found.append(float(limit))
    return min(found, default=None)


# ---- telling, and refusing ---------------------------------------------------------------------------


def check_memory(
    model: Model, data: Any, config: TrainConfig, device: torch.device, processes: int = 1, on_node: int = 1
) -> list[str]:
    """Lines that say what a step needs. `data` is the run's, with batch_size and the lengths of its texts.

    Raises ValueError where it cannot fit on the device, with what to change.
    """

    def plan(images: int, blocks: int = config.checkpoint_blocks) -> Plan:
        return plan_memory(model, config, step_of(data, config, images, blocks), device, processes, on_node)

    wanted, room = plan(data.batch_size), room_of(device)
    if room is not None and device.type == "cuda":
        room += wanted.there  # of what it needs, this is taken already
    if room is not None and wanted.least > room:
        what = _advice(plan, data.batch_size, config.accumulate, room)
        raise ValueError(f"{_sum(wanted)}, and {device} has {room / GB:.2f} GB for it; {what}")
    return describe(wanted, device, room)


def step_of(data: Any, config: TrainConfig, images: int, blocks: int) -> Step:
    length = max((getattr(data, name) for name in LENGTHS if hasattr(data, name)), default=0)
    texts = images * getattr(data, "texts_per_image", 1)
    words, wrong = texts * max(length - 1, 0), bool(getattr(data, "contrasts", ()))
    return Step(images, length, words, config.precision == "bf16", blocks, wrong)


def _sum(plan: Plan) -> str:
    found = {
        "weights": plan.weights,
        "gradients": plan.gradients,
        "optimiser": plan.optimizer,
        "copies in bf16": plan.copies,
        "activations": sum(plan.activations.values()),
        "working space": plan.working,
    }
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in found.items() if size)
    return f"a step of {plan.images} images needs about {plan.total / GB:.2f} GB ({parts})"


def _advice(plan: Callable[..., Plan], images: int, accumulate: int, room: float) -> str:
    """What would fit: fewer images at once, or activations that are computed again."""
    fits, fails = 0, images
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if plan(middle).total <= room else (fits, middle)
    advice = []
    if fits:
        times = accumulate * ceil(images / fits)
        advice.append(f"set data.batch_size to {fits} and train.accumulate to {times}")
    again = plan(images, ALL).total
    if again <= room:
        advice.append(f"raise train.checkpoint_blocks: with all blocks it needs {again / GB:.2f} GB")
    if not advice:
        least = plan(1, ALL).total / GB
        advice.append(
            f"with data.batch_size 1 and train.checkpoint_blocks of all blocks it needs {least:.2f} GB: take "
            "a larger device, or several with train.optimizer_sharding zero1 and train.shard_frozen true"
        )
    return "; or ".join(advice)


def describe(plan: Plan, device: torch.device, room: float | None) -> list[str]:
    """A plan for a person, in GB."""
    lines = [f"memory of a step of {plan.images} images on {device}, in GB; activations are an estimate"]
    for part in plan.parts:
        numbers = ", ".join(
            f"{count / 1e6:.1f}M {what}"
            for count, what in ((part.trained, "trained"), (part.frozen, "frozen"))
            if count
        )
        lines.append(f"  {'weights: ' + part.name:<24}{part.weights / GB:>8.2f}  {numbers}")
    rest = {"gradients": plan.gradients, "optimiser": plan.optimizer, "copies in bf16": plan.copies}
    rest |= {f"activations: {name}": size for name, size in plan.activations.items()}
    rest |= {"working space": plan.working}
    lines += [f"  {name:<24}{size / GB:>8.2f}" for name, size in rest.items() if size]
    share = f"  of {room / GB:.2f}" if room is not None else ""
    tight = ", which may be too little" if room is not None and plan.total > room else ""
    return [*lines, f"  {'together':<24}{plan.total / GB:>8.2f}{share}{tight}"]
