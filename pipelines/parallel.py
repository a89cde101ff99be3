"""Where a model runs, in how many processes, and what it saves memory with: applied to a finished model.

Processes, device, autocast, activation checkpointing and sharding live here and nowhere in the models.
torchrun is the contract: it sets the environment that `processes` reads.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from blip.distributed import rank, world_size

Precision = Literal["fp32", "bf16"]
Checkpointing = Literal["torch", "fairscale"]
Sharding = Literal["none", "zero1", "fairscale_oss"]


DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of frozen weights


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda, cuda:<number> or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but torch finds no GPU here; use device=cpu or device=auto"
        )
    return device


@contextmanager
def processes(name: str) -> Iterator[torch.device]:
    """Join the processes that torchrun launched, if it did; gives this one's device.

    With GPUs each process takes the one of its number on its node.
    """
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """No process goes on before all are here."""
    if world_size() > 1:
        dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over processes of a tensor that each of them has."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def gather_objects(mine: Any) -> list[Any]:
    """What each process has, in the order of ranks; every process gets the list."""
    found = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, mine)
    return found


def from_first(mine: Any) -> Any:
    """What the first process has, its tensors on the CPU. Every process must call it."""
    found = [mine]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def data_parallel(model: nn.Module) -> nn.Module:
    """The model whose backward pass leaves the mean gradient of all processes; the model itself in one."""
    if world_size() == 1:
        return model
    # Queues and teacher are computed alike everywhere: nothing needs to be sent but gradients.
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_sync(model: nn.Module, when: bool) -> AbstractContextManager[object]:
    """While gradients only accumulate, processes need not exchange them."""
    return model.no_sync() if when and isinstance(model, DistributedDataParallel) else nullcontext()


def agree_on_batch_norm(model: nn.Module) -> None:
    """Running statistics of batch norms, the only state that differs between processes, become rank 0's."""
    if world_size() > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Weights stay fp32; in bf16 the matrix products are not."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def node_mesh(device: torch.device) -> DeviceMesh:
    """The processes of this node, for `shard`. Every process must call it.

    What is frozen has no gradient, so a node that holds all of it never has to hear from another.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if world_size() % per_node:
        raise ValueError(
            f"of {world_size()} processes {per_node} are on this node, so others have another number; "
            "train.shard_frozen needs as many on each, start all with the same NPROC"
        )
    shape = (world_size() // per_node, per_node)
    return init_device_mesh(device.type, shape, mesh_dim_names=("node", "process"))["process"]


@contextmanager
def in_turn() -> Iterator[None]:
    """One process of a node after the other: the host may not hold at once what each of them loads."""
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))):
        if turn == int(os.environ.get("LOCAL_RANK", rank())):
            yield
        wait_for_all()


def shard(module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the weights of the blocks of a frozen module over the processes of `mesh` (FSDP2).

    A block is gathered when it computes, forward or backward, and let go after it. What is in no block, such
    as word embeddings, stays whole and where it is. Blocks move to the device of the mesh one by one, so that
    no device has to hold all of them. From now on all processes must run the module, and equally often.
    """
    if not blocks:
        raise ValueError(
            f"a {type(module).__name__} says of no part that it is a block; set train.shard_frozen to false"
        )
    whole = set(module.parameters()) - {weight for block in blocks for weight in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, ignored_params=whole)  # so that one block is gathered while one computes
    module.register_forward_hook(_no_backward)


def _no_backward(module: nn.Module, _: Any, output: Any) -> None:
    """FSDP2 notes every forward pass until a backward pass comes. Through a frozen encoder none ever does."""
    forget = getattr(module, "reset_iter_state", None)  # older torch has none: 2 kB a step then stay behind
    if forget and isinstance(output, Tensor) and not output.requires_grad:
        forget()


def checkpoint_activations(blocks: Iterable[nn.Module], last: int, backend: Checkpointing = "torch") -> None:
    """Forget the activations of the `last` blocks, to compute them again in the backward pass.

    Only `forward` is replaced: wrapping the blocks would rename their parameters for whoever looks them up,
    such as the momentum teacher. fairscale, which BLIP and LAVIS use, takes blocks of one tensor: a ViT's.
    """
    for block in list(blocks)[-last:] if last else ():
        if backend == "torch":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            _fairscale("fairscale.nn.checkpoint").checkpoint_wrapper(block)


def optimizer_class(sharding: Sharding) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or one whose state is spread over the processes (ZeRO stage 1); in one process always AdamW."""
    if sharding == "none" or world_size() == 1:
        return torch.optim.AdamW
    if sharding == "zero1":
        return partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    return partial(_fairscale("fairscale.optim.oss").OSS, optim=torch.optim.AdamW)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The whole state, as AdamW's own; None on all but rank 0. Every process must call it."""
    if hasattr(optimizer, "consolidate_state_dict"):  # of a sharded one
        optimizer.consolidate_state_dict(0)
    return optimizer.state_dict() if rank() == 0 else None


def _fairscale(module: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ValueError(
            "this config asks for fairscale, which is not installed: pip install fairscale, or choose torch"
        ) from error
