"""The demo's judgement, against counting by hand, and the demo itself with the shipped weights."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config import as_tree, load_config
from pipelines.demo import DemoRun, Judgement, Pair, judged, main, read_pairs, table


def pair(web_right: bool, itm_web: float | None, synthetic_right: bool, itm_synthetic: float | None) -> Pair:
    kind = "right" if web_right else "junk"
    return Pair("w", "s", itm_web, itm_synthetic, kind, web_right, synthetic_right)


def test_judgement_counts_as_a_person_would():
    pairs = [
        pair(True, 0.9, True, 0.8),  # both kept, both right
        pair(True, 0.4, False, 0.5),  # a right text lost, a wrong one kept
        pair(False, 0.6, True, 0.1),  # a wrong text kept, a right one lost
        pair(False, None, False, 0.2),  # nothing kept
    ]
    assert judged(pairs, 0.5) == Judgement(
        rows=4,
        noise_before=0.5,
        noise_after=0.5,
        right_kept=0.5,
        synthetic_right_before=0.5,
        synthetic_right_after=0.5,
        synthetic_kept=0.5,
        images_kept=0.75,
    )
    assert judged(pairs, 0.85).noise_after == 0.0
    assert "50.0%" in table(judged(pairs, 0.5))


def test_demo_on_a_small_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The shipped captioner and filter clean a world that they never saw; a second run does nothing again."""
    tree = as_tree(load_config(DemoRun, "configs/tiny/demo.yaml"))
    tree |= {"out": str(tmp_path / "demo"), "ray": tree["ray"] | {"workers": 2}}
    tree["world"] |= {"noisy_rows": 120, "shard_rows": 40, "seed": 11}
    (tmp_path / "demo.yaml").write_text(json.dumps(tree))
    assert main([str(tmp_path / "demo.yaml")]) == 0
    printed = capsys.readouterr().out
    scored = tmp_path / "demo" / "out" / "scored"
    pairs = list(read_pairs(scored, tmp_path / "demo" / "world" / "noisy_truth.parquet"))
    found = judged(pairs, 0.5)
    assert table(found) in printed
    assert found.rows == 120 and found.noise_after < found.noise_before / 2
    assert (tmp_path / "demo" / "out" / "report.html").exists()
    clean = pq.read_table(tmp_path / "demo" / "out" / "clean").to_pylist()
    assert {c["source"] for row in clean for c in row["captions"]} == {"web", "synthetic"}
    times = {path: path.stat().st_mtime_ns for path in scored.iterdir()}
    assert main([str(tmp_path / "demo.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in scored.iterdir()} == times
