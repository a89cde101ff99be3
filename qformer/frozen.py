"""What frozen means: a module that is held and used, and that nothing which trains a model can reach.

It is no child of the model that holds it, so `train()`, `parameters()`, optimisers, data parallelism and
checkpoints pass it by; only moves reach it, to a device or a dtype. Of its weights a checkpoint keeps the
sha256 alone, and refuses to be loaded beside others.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from blip.checkpoint import check_fit

M = TypeVar("M", bound=nn.Module)

DIGEST = "digest"  # its name in a state dict
_BYTES = hashlib.sha256().digest_size


class Frozen(nn.Module, Generic[M]):
    """Holds `module`: in eval mode for ever, its weights without gradient, in and out in the dtype it has.

    A gradient passes through to what was given to it, if that asks for one.
    """

    def __init__(self, module: M):
        super().__init__()
        self._held = (module.eval().requires_grad_(False),)  # torch does not look for modules in a tuple
        self._digest: Tensor | None = None

    @property
    def module(self) -> M:
        return self._held[0]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; `frozen.to(torch.bfloat16)` changes it."""
        return next(self.module.parameters()).dtype

    def forward(self, x: Tensor) -> Any:
        """`module` of floating-point `x`, in the dtype of the module whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            return self.module(x.to(self.dtype))

    def fill(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take these weights. Raises ValueError where they are not exactly those of the module."""
        wanted = self.module.state_dict()
        check_fit(wanted, tensors, source)
        given = {name: tensors[name].to(weight.dtype) for name, weight in wanted.items()}
        self.module.load_state_dict(given, assign=True)
        self._digest = None

    def digest(self) -> Tensor:
        """sha256 of names, shapes and weights, these rounded to bfloat16, as 32 bytes.

        So a module has the same in float32 and bfloat16. On the meta device there is none: empty bytes.
        """
        weights = self.module.state_dict()
        if any(tensor.is_meta for tensor in weights.values()):
            return torch.empty(_BYTES, dtype=torch.uint8, device="meta")
        if self._digest is None:
            self._digest = torch.frombuffer(bytearray(_sha256(weights)), dtype=torch.uint8)
        return self._digest

    def spread(self, over: Callable[[M], None]) -> None:
        """Let `over` spread the weights over processes; the sha256, taken before, stays that of the whole."""
        self.digest()
        over(self.module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + DIGEST] = self.digest()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Raises ValueError where the weights of `state_dict` were trained beside another frozen module."""
        name, mine = prefix + DIGEST, self.digest()
        if name not in state_dict:
            missing_keys.append(name)
            return
        given = state_dict[name]
        if given.is_meta or mine.is_meta:
            raise ValueError(f"{name} cannot be checked without weights; fill the frozen module first")
        if not torch.equal(given.cpu(), mine):
            raise ValueError(
                f"these weights belong to a frozen {prefix.rstrip('.') or 'module'} whose sha256 begins with "
                f"{_hex(given)}, but here it is {_hex(mine)}; give the one they were trained with"
            )


def _sha256(weights: Mapping[str, Tensor]) -> bytes:
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {list(tensor.shape)}\n".encode())
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten()
        found.update(rounded.view(torch.uint8).numpy().data)
    return found.digest()


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()[:12]
