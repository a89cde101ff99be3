"""CapFilt: caption web images, score web and synthetic texts, keep what matches. Imports `blip` alone.

`run_on_ray` lives in `capfilt.cluster`, so that everything else runs where Ray is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from capfilt.local import run_local
from capfilt.worker import CapFiltConfig, CapFiltWorker

if TYPE_CHECKING:
    from capfilt.cluster import run_on_ray

__all__ = ["CapFiltConfig", "CapFiltWorker", "run_local", "run_on_ray"]


def __getattr__(name: str) -> Any:
    if name == "run_on_ray":
        return import_module("capfilt.cluster").run_on_ray
    raise AttributeError(f"module 'capfilt' has no attribute {name!r}")
