"""`make calibrate` from a scored folder and labels to a number that `make select` takes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile_files import shard
from scored_folder import score_shards

from capfilt.calibrate import Labels, share
from capfilt.schema import Row, Scores
from pipelines import calibrate, select
from pipelines.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs/calibrate.yaml")
ROWS = 400


def truth(seed: int, synthetic_sees: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(web right, web score, synthetic right, synthetic score): the filter sees web texts well."""
    rng = np.random.default_rng(seed)
    right = rng.random(ROWS) < 0.6, rng.random(ROWS) < 0.7
    sees = (4.0, synthetic_sees)
    logits = [rng.normal(np.where(r, s / 2, -s / 2)) for r, s in zip(right, sees, strict=True)]
    web, synthetic = (1 / (1 + np.exp(-logit)) for logit in logits)
    return right[0], web, right[1], synthetic + (synthetic_sees == 0) * (1 - synthetic) * 0.6


def make_folder(folder: Path, synthetic_sees: float, seed: int = 0) -> tuple[Path, list[dict[str, Any]]]:
    """A scored folder of 400 rows, and a true verdict about each of its 800 texts."""
    web_right, web, synthetic_right, synthetic = truth(seed, synthetic_sees)

    def score(row: Row) -> Scores:
        number = row.index
        return Scores("ok", None, (f"made {number}",), web[number], 0.0, (synthetic[number],), (0.0,))

    shard(folder / "in" / "a.parquet", ROWS, key=[f"k{i}" for i in range(ROWS)])
    score_shards(folder / "in", folder / "out", score)
    words = {True: "keep", False: "drop"}
    verdicts = [
        {"key": f"k{i}", "source": source, "text": text.format(i), "verdict": words[bool(right[i])]}
        for source, text, right in (
            ("web", "text {}", web_right),
            ("synthetic", "made {}", synthetic_right),
        )
        for i in range(ROWS)
    ]
    return folder / "out", verdicts


def run(out: Path, verdicts: list[dict[str, Any]], *overrides: str) -> dict[str, Any]:
    path = out.parent / "verdicts.json"
    path.write_text(json.dumps(verdicts))
    assert calibrate.main([CONFIG, f"out={out}", f"verdicts={path}", *overrides]) == 0
    result: dict[str, Any] = json.loads((out / "calibration" / "calibration.json").read_text())
    return result


def test_from_verdicts_to_clean_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, verdicts = make_folder(tmp_path, synthetic_sees=3.0)
    sample = [verdicts[i] for i in np.random.default_rng(1).permutation(2 * ROWS)[:500]]
    result = run(out, sample, "precision=0.9")
    printed = capsys.readouterr().out
    line = re.search(r"^make select OUT=(\S+) THRESHOLD=(\S+)$", printed, re.MULTILINE)
    assert line is not None and (line[1], float(line[2])) == (str(out), result["threshold"])
    assert (out / "calibration" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "ALARM" not in printed and "warning" not in printed and result["alarm"] is None
    assert result["threshold"] == max(r["own"]["threshold"] for r in result["sources"].values())

    assert select.main([str(ROOT / "configs/select.yaml"), f"out={out}", f"threshold={line[2]}"]) == 0
    right = {(v["source"], v["text"]): v["verdict"] == "keep" for v in verdicts}
    clean = pq.read_table(out / "clean")
    captions = [caption for row in clean["captions"].to_pylist() for caption in row]
    for source, report in result["sources"].items():
        kept = [right[source, c["text"]] for c in captions if c["source"] == source]
        assert len(kept) / ROWS == pytest.approx(report["kept_of_all"])
        precision = report["chosen"]["precision"]
        assert precision["value"] >= 0.9
        assert precision["low"] <= np.mean(kept) <= precision["high"]  # of all texts, labelled or not


def test_all_numbers_are_in_the_file(tmp_path: Path) -> None:
    out, verdicts = make_folder(tmp_path, synthetic_sees=3.0)
    verdicts[0]["verdict"] = "unsure"
    result = run(out, verdicts, "precision=0.9")
    web_right, web, *_ = truth(0, 3.0)
    report = result["sources"]["web"]
    assert (report["labels"], report["unsure"], report["not_scored"]) == (ROWS - 1, 1, 0)
    assert report["right"] == web_right[1:].sum()
    assert report["noise"]["value"] == pytest.approx((~web_right[1:]).mean())
    assert report["dropped"] == pytest.approx((web < 0.5).mean())
    assert report["caught"]["value"] == pytest.approx((web[1:][~web_right[1:]] < 0.5).mean())
    curve, bands = report["curve"], report["bands"]
    assert len(curve["thresholds"]) == 200 == len(bands["recall"][0])
    for threshold, precision in zip(curve["thresholds"], curve["precision"], strict=True):
        assert precision == pytest.approx(web_right[1:][web[1:] >= threshold - 1e-7].mean())


def test_a_filter_that_trusts_its_captioner_sets_off_the_alarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, verdicts = make_folder(tmp_path, synthetic_sees=0.0)
    result = run(out, verdicts)
    printed = capsys.readouterr().out
    assert result["sources"]["synthetic"]["own"] is None
    assert "ALARM: captioner and filter agree too well" in printed
    assert "no threshold reaches 0.95 for synthetic texts" in printed
    web = [v for v in verdicts if v["source"] == "web"]
    only_web = run(out, web)
    assert "0 labelled texts are too few" in only_web["left_out"]["synthetic"]
    assert "Label 100 synthetic texts" in only_web["alarm"]


def test_a_precision_out_of_reach_is_an_error_and_the_curve_is_there(tmp_path: Path) -> None:
    out, verdicts = make_folder(tmp_path, synthetic_sees=0.0)
    synthetic = [v for v in verdicts if v["source"] == "synthetic"]
    with pytest.raises(
        ValueError, match=r"no threshold reaches the precision 0\.99; the best are synthetic: 0\."
    ):
        run(out, synthetic, "precision=0.99")
    assert json.loads((out / "calibration" / "calibration.json").read_text())["threshold"] is None
    assert (out / "calibration" / "curve.png").exists()


def test_labels_that_are_no_random_sample_are_noticed(tmp_path: Path) -> None:
    out, verdicts = make_folder(tmp_path, synthetic_sees=3.0)
    web = truth(0, 3.0)[1]
    best = [verdicts[i] for i in np.argsort(-web)[:200]]
    assert any("are no random sample" in warning for warning in run(out, best)["warnings"])


def test_too_few_labels_are_refused(tmp_path: Path) -> None:
    out, verdicts = make_folder(tmp_path, synthetic_sees=3.0)
    with pytest.raises(ValueError, match=r"web: 30 labelled texts are too few.*synthetic: 0 labelled"):
        run(out, verdicts[:30])


def test_a_clean_set_and_its_swapped_twin_are_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = make_folder(tmp_path, synthetic_sees=3.0)
    keys, texts = [f"c{i}" for i in range(100)], [f"clean {i}" for i in range(100)]
    for name, shift, level in (("own", 0, 0.6), ("swapped", 1, 0.1)):
        shard(tmp_path / name / "a.parquet", 100, key=keys, caption=[*texts[shift:], *texts[:shift]])
        score_shards(
            tmp_path / name,
            tmp_path / f"{name}_out",
            lambda row, level=level: Scores("ok", None, ("x",), level + row.index / 400, 0.0, (0.5,), (0.0,)),
        )
    folders = [f"positives={tmp_path / 'own_out'}", f"negatives={tmp_path / 'swapped_out'}"]
    assert calibrate.main([CONFIG, f"out={out}", *folders]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "calibration" / "calibration.json").read_text())
    assert list(result["sources"]) == ["web"]
    web = result["sources"]["web"]
    # right ones score 0.6 to 0.8475, wrong ones 0.1 to 0.3475: of the wrong ones, five may stay beside 100
    assert (web["labels"], web["right"]) == (200, 100)
    assert web["chosen"]["precision"]["count"] == 100 and web["chosen"]["precision"]["total"] == 105
    assert "half right and half other images' texts" in printed


def test_one_kind_of_labels_is_needed(tmp_path: Path) -> None:
    for given in ([], ["positives=a"], ["verdicts=v.json", "positives=a", "negatives=b"]):
        with pytest.raises(ConfigError, match="verdicts=FILE, or as positives"):
            calibrate.main([CONFIG, f"out={tmp_path}", *given])
    for wrong in ("precision=0", "precision=95", "resamples=3"):
        with pytest.raises(ConfigError, match=r"precision is|resamples is"):
            calibrate.main([CONFIG, f"out={tmp_path}", wrong])


def test_the_number_serves_the_source_that_needs_the_higher_one() -> None:
    """Web: 30 right above 30 wrong at 0.4; synthetic: the same at 0.7."""

    def labels(level: float) -> Labels:
        return Labels(np.repeat([level, level - 0.3], 30), np.repeat([True, False], 30))

    result = calibrate.calibrate({"web": labels(0.4), "synthetic": labels(0.7)}, {}, 1.0)
    assert {source: r.own.threshold for source, r in result.sources.items() if r.own} == {
        "web": 0.4,
        "synthetic": 0.7,
    }
    assert result.threshold == 0.7
    web = result.sources["web"].chosen
    assert web is not None and web.precision is None and web.kept == share(0, 60)
    assert "the threshold keeps 0 labelled web texts" in result.warnings[0]
