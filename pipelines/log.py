"""Where a run tells what it does: `metrics.jsonl` always, a progress bar or plain lines, and optional sinks.

Only the main rank makes a `RunLog`. It takes Python numbers, never tensors: reading a tensor waits for the
device, so the trainer does it at log steps only.
"""

import importlib
import json
import math
import os
import re
import resource
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, TypeVar

import torch
from tqdm import tqdm

from blip.distributed import rank, world_size

T = TypeVar("T")
Value = float | int | str

# CSI (colours, cursor), OSC (titles, links), and the two-character escapes of a terminal.
ESCAPE = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\^_]")
# Control, invisible or direction-changing format, lone surrogate, line and paragraph separator.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def plain(text: str, limit: int = 200) -> str:
    """`text` from data as one harmless line of at most `limit` characters, for a terminal or a log.

    A caption may hold escape codes that move the cursor, set the title or fake another line.
    """
    text = ESCAPE.sub(" ", text)
    text = "".join(" " if unicodedata.category(char) in UNPRINTABLE else char for char in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: max(0, limit - 3)] + "..."


def peak_memory_gib() -> float:
    """The most memory this process has held, in GiB: of the GPU where there is one, of the host otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def told(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    size: Callable[[T], int] = lambda item: 1,
    seconds_between_lines: float = 10.0,
) -> Iterator[T]:
    """The same items, and every ten seconds a line on stderr: how many are done, and what is left.

    `total` of what `size` counts, None where nobody knows. Of several processes the first tells of its own.
    """
    if rank() > 0:
        yield from items
        return
    if world_size() > 1:
        what += " of the first process"
    begun = last = time.monotonic()
    done = 0
    for item in items:
        yield item  # whoever asks for the next one has done this one
        done += size(item)
        now = time.monotonic()
        if now - last >= seconds_between_lines:
            last = now
            of, rate = "" if total is None else f" of {total}", done / (now - begun)
            left = "" if total is None else f", {_clock((total - done) / rate)} left"
            print(f"{done}{of} {what}, {rate:.2g} a second{left}", file=sys.stderr, flush=True)


class Sink(Protocol):
    """What a further destination of the metrics must offer."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The log of one run; use as a context manager.

    `metrics.jsonl` holds one object per call of `log`. A run resumed at step k passes `start_step=k`: lines
    after k are dropped, they will be written again. `sinks` are names out of tensorboard, wandb, trackio;
    `config` is shown there. Raises ValueError for a name that is unknown or whose library is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int,
        start_step: int = 0,
        sinks: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        seconds_between_lines: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.seconds_between_lines = total_steps, seconds_between_lines
        self.stream = stream or sys.stderr
        self.sinks = [open_sink(name, self.path.parent, config or {}, start_step) for name in sinks]
        _drop_after(self.path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._start_step = start_step
        self._start = self._last_log = time.monotonic()
        self._last_line = -math.inf
        self._bar: tqdm[Any] | None = None
        if self.stream.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", file=self.stream)

    def log(self, step: int, metrics: Mapping[str, Value], rows: int = 0) -> None:
        """Record `metrics` after `step` updates. `rows` seen since the last call become `rows_per_s`."""
        now = time.monotonic()
        record: dict[str, Value] = dict(metrics)
        if rows:
            record["rows_per_s"] = rows / max(now - self._last_log, 1e-9)
        record["peak_memory_gib"] = peak_memory_gib()
        self._last_log = now
        line = {"step": step, "seconds": now - self._start, **record}
        self._file.write(json.dumps({name: _json_value(value) for name, value in line.items()}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in record.items() if not isinstance(value, str)}
        for sink in self.sinks:
            sink.write(step, numbers)
        self._show(step, record, now)

    def say(self, text: str) -> None:
        """One line for the person watching, beside the bar; control characters are taken out."""
        text = plain(text, limit=1000)
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.write(text, file=self.stream)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        if self._bar is not None:
            self._bar.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, step: int, record: Mapping[str, Value], now: float) -> None:
        shown = {name: _short(value) for name, value in record.items()}
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(shown)
            return
        is_due = now - self._last_line >= self.seconds_between_lines
        if is_due or step >= self.total_steps:
            self._last_line = now
            values = " ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {step}/{self.total_steps} | {values} | {self._remaining(step, now)} left")

    def _remaining(self, step: int, now: float) -> str:
        done = step - self._start_step
        if done <= 0:
            return "?"
        return _clock((now - self._start) / done * max(0, self.total_steps - step))


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class _Tensorboard:
    def __init__(self, folder: Path, config: Mapping[str, Any], start_step: int) -> None:
        _require("tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard")
        # What an interrupted run showed after the step it resumes from is hidden, as in metrics.jsonl.
        self.writer = writer.SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """wandb, and trackio which offers the same three calls. The run is named after its folder."""

    def __init__(self, library: str, folder: Path, config: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", "blip")
        name = folder.resolve().name
        place = {"dir": str(folder)} if library == "wandb" else {}  # trackio keeps all runs in TRACKIO_DIR
        self.run = _require(library).init(project=project, name=name, config=dict(config), **place)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


def open_sink(name: str, folder: Path, config: Mapping[str, Any], start_step: int) -> Sink:
    """The sink called `name`. Its library is imported here: none of them is needed to train."""
    if name == "tensorboard":
        return _Tensorboard(folder, config, start_step)
    if name in ("wandb", "trackio"):
        return _WandbLike(name, folder, config)
    raise ValueError(f"unknown log sink {name!r}; choose from tensorboard, wandb, trackio")


def _require(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"log sink {library!r} needs a package: run `pip install {library}`") from error


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`; a crash may have left half a line, a resume goes back."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_value(value: Value) -> Value | None:
    """JSON has no nan and no infinity: they become null. Text from data is made harmless."""
    if isinstance(value, str):
        return plain(value)
    return value if math.isfinite(value) else None


def _short(value: Value) -> str:
    return plain(value, limit=40) if isinstance(value, str) else f"{value:.4g}"
