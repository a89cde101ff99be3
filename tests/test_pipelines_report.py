"""`make report` from its config to a page, and what it says on a terminal."""

import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from report_folder import Page, finish, make_folder

from capfilt.schema import Row, Scores
from pipelines import report
from pipelines.config import ConfigError, run_main

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/report.yaml")


def score(row: Row) -> Scores:
    return Scores("ok", None, (f"made {row.index}",), row.index % 100 / 100, 0.0, (0.7,), (0.0,))


def test_600_rows_are_a_page_below_4_mb_in_below_10_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_folder(tmp_path, score, rows=300)
    finish(out)
    started = time.process_time()
    assert report.main([CONFIG, f"out={out}"]) == 0
    assert time.process_time() - started < 10
    path = out / "report.html"
    printed = capsys.readouterr().out
    assert printed.startswith(f"600 rows, {path.stat().st_size / 1e6:.1f} MB: open {path}\n")
    assert path.stat().st_size < 4_000_000 and Page(path).classed("card") > 120
    assert sorted(p.name for p in out.iterdir()) == ["_done", "report.html", "scored", "summary.json"]


def test_overrides_reach_the_page(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score)
    assert report.main([CONFIG, f"out={out}", "threshold=0.25", "per_gallery=2", "to_judge=3"]) == 0
    page = Page(out / "report.html")
    kept = sum(itm >= 0.25 for itm in pq.read_table(out / "scored")["itm_web"].to_pylist())
    assert page.state["kept"]["web"][25] == kept
    assert len(page.state["keys"]) == 3 and page.classed("card") <= 3 + 7 * 2
    with pytest.raises(ConfigError, match="per_galery"):
        report.main([CONFIG, f"out={out}", "per_galery=2"])
    with pytest.raises(ValueError, match="to_judge is 5000"):
        report.main([CONFIG, f"out={out}", "to_judge=5000"])


def test_warnings_are_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_folder(tmp_path, score, shards=1)
    finish(out, failed={"a\x1b[31m": "cut\x07 off"})
    assert report.main([CONFIG, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^warning: The shard a \[31m failed: cut off$", printed, re.MULTILINE)
    assert printed.replace("\n", "").isprintable()


def test_a_wrong_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(report.main, [CONFIG, f"out={tmp_path / 'none'}"])
    assert stopped.value.code == 1
    assert "is no output folder of CapFilt; run `make capfilt` with this OUT first" in capsys.readouterr().err
