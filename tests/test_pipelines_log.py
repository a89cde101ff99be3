"""pipelines.log: what stays on disk, what a person sees, and that data cannot forge it."""

import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.log import RunLog, peak_memory_gib, plain, told


class Terminal(io.StringIO):
    """A stream that says it is a terminal, so that the bar is drawn."""

    def isatty(self) -> bool:
        return True


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def quiet(folder: Path, **options: Any) -> RunLog:
    return RunLog(folder, total_steps=options.pop("total_steps", 10), stream=io.StringIO(), **options)


def test_one_json_line_per_call_readable_at_once(tmp_path: Path) -> None:
    with quiet(tmp_path / "new" / "run") as log:
        log.log(1, {"loss_itc": 2.5, "lr": 1e-4, "note": "caf\u00e9\x1b[31m\n"}, rows=64)
        (line,) = lines_of(tmp_path / "new" / "run")  # before close: a crash loses nothing
        log.log(2, {"loss_itc": math.nan, "grad_norm": math.inf})
    first, second = lines_of(tmp_path / "new" / "run")
    assert first == line
    assert (first["step"], first["loss_itc"], first["lr"], first["note"]) == (1, 2.5, 1e-4, "caf\u00e9")
    assert first["rows_per_s"] > 0 and first["seconds"] >= 0 and 0 < first["peak_memory_gib"] < 1000
    assert second["loss_itc"] is None and second["grad_norm"] is None  # JSON knows no nan
    assert "rows_per_s" not in second


def test_rows_per_second_is_rows_over_wall_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr("pipelines.log.time.monotonic", lambda: next(clock))
    with quiet(tmp_path) as log:
        log.log(1, {}, rows=8)
        log.log(2, {}, rows=8)
    assert [(line["rows_per_s"], line["seconds"]) for line in lines_of(tmp_path)] == [(2.0, 4.0), (8.0, 5.0)]


def test_a_tensor_is_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as log, pytest.raises(TypeError):
        log.log(1, {"loss": torch.tensor(1.0)})  # type: ignore[dict-item]


def test_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        for step in (2, 4, 6, 8):
            log.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'not json\n[]\n{"loss": 3}\n{"step": "x"}\n\xff\n{"step": 3, "lo')  # a crash amid a line
    with quiet(tmp_path, start_step=4) as log:
        log.log(6, {"loss": 60.0})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    quiet(tmp_path).close()  # a fresh start
    assert lines_of(tmp_path) == []


def test_lines_every_so_often_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(10.0 * step for step in range(1, 9))])  # ten seconds a step
    monkeypatch.setattr("pipelines.log.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=8, stream=stream, seconds_between_lines=30) as log:
        for step in range(1, 9):
            log.log(step, {"loss": 1 / step, "lr": 1e-4})
    shown = stream.getvalue()
    assert "\r" not in shown and "\x1b" not in shown
    lines = shown.splitlines()
    assert [line.split()[1] for line in lines] == [
        "1/8",
        "4/8",
        "7/8",
        "8/8",
    ]  # the first, each 30 s, the last
    assert lines[1].startswith("step 4/8 | loss 0.25 lr 0.0001 ")
    assert [line.split("| ")[-1] for line in lines] == [
        f"0:0{m} left" for m in ("1:10", "0:40", "0:10", "0:00")
    ]
    assert len(lines_of(tmp_path)) == 8


def test_remaining_time_of_a_resumed_run_counts_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 3600.0])
    monkeypatch.setattr("pipelines.log.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=130, start_step=100, stream=stream) as log:
        log.log(110, {})
    assert stream.getvalue().endswith("| 2:00:00 left\n")


@pytest.mark.parametrize(
    ("total", "lines"),
    [
        (6, ["4 of 6 rows, 0.33 a second, 0:00:06 left", "6 of 6 rows, 0.33 a second, 0:00:00 left"]),
        (None, ["4 rows, 0.33 a second", "6 rows, 0.33 a second"]),
    ],
)
def test_what_takes_long_tells_how_far_it_is(
    total: int | None, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of two rows, six seconds each: the second ends after twelve, the third ten seconds later."""
    clock = iter([0.0, 6.0, 12.0, 22.0])
    monkeypatch.setattr("pipelines.log.time.monotonic", lambda: next(clock))
    batches = ["ab", "cd", "ef"]
    assert list(told(batches, "rows", total, size=len)) == batches
    expected = lines[:1] + [line.replace("0.33", "0.27") for line in lines[1:]]
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in expected))


def test_what_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(told(range(3), "rows")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    with RunLog(tmp_path, total_steps=10, start_step=4, stream=stream) as log:
        log.log(6, {"loss": 0.25})
        log.say("saved \x1b[2Jcheckpoint")
    shown = stream.getvalue()
    assert "4/10" in shown  # a resumed run starts where it stopped
    assert "6/10" in shown and "loss=0.25" in shown and "60%" in shown
    assert "saved checkpoint\n" in shown and "\x1b[2J" not in shown


def test_say_is_one_harmless_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, total_steps=1, stream=stream) as log:
        log.say("bad shard \x1b]0;title\x07a\r\nstep 1/1 | loss 0")
    assert stream.getvalue() == "bad shard a step 1/1 | loss 0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "a dog"),
        ("  a\tdog\r\non \x0b grass\n", "a dog on grass"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x9b31mred", "red"),  # the one-byte form of the same
        ("\x1b]0;title\x07a", "a"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never closed", ""),
        ("\x1bMup", "up"),
        ("a\x00b\x7fc\x85d\x08e", "a b c d e"),
        (
            "a\u2028b\u202ec\u200bd\ud800e",
            "a b c d e",
        ),  # line separator, right-to-left, zero width, half a pair
        ("caf\u00e9 \u4e2d\u6587 \U0001f415", "caf\u00e9 \u4e2d\u6587 \U0001f415"),
        ("", ""),
    ],
)
def test_plain(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_plain_cuts_and_never_lets_a_control_through() -> None:
    assert plain("x" * 200) == "x" * 200
    assert plain("x" * 201) == "x" * 197 + "..."
    assert plain("word " * 9, limit=10) == "word wo..."
    everything = plain("".join(chr(code) for code in range(0x3000)), limit=10**6)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", everything)
    assert "abc" in everything


def test_plain_is_linear_in_a_hostile_text() -> None:
    assert plain("\x1b]" * 500_000) == ""  # seconds if it were quadratic: 10^11 steps


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown log sink 'tensorbord'; choose from tensorboard, wandb, trackio"
    ):
        quiet(tmp_path, sinks=["tensorbord"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_sink_that_is_not_installed_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say: not importable
    with pytest.raises(ValueError, match=f"log sink '{name}' needs a package: run `pip install {name}`"):
        quiet(tmp_path, sinks=[name])
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path, sinks=["tensorboard"], config={"lr": 1e-4}) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": step / 2, "note": "text stays out"})
    with quiet(tmp_path, sinks=["tensorboard"], start_step=1) as log:
        log.log(2, {"loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 9.0)]
    assert "note" not in events.Tags()["scalars"]


def test_peak_memory_sees_an_allocation() -> None:
    if torch.cuda.is_available():
        pytest.skip("reads the GPU where there is one")
    before = peak_memory_gib()
    held = torch.ones(2**26)  # a quarter of a GiB
    assert peak_memory_gib() <= before + 0.5
    assert peak_memory_gib() >= held.numel() * 4 / 2**30
