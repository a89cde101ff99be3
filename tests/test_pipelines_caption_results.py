"""Captions of a file against a test set, by domain, with metrics in Java; and what is refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_files import jpeg, numbered, put, put_json
from test_pipelines_metrics import BAD, GOOD, REFERENCES

from pipelines import eval_captions, eval_retrieval, ingest
from pipelines.annotations import read_domains, read_results
from pipelines.config import ConfigError
from pipelines.java_metrics import Extra, meteor, refuse_absent, spice
from pipelines.metrics import bleu, cider_d, rouge_l

NOCAPS = {  # id: domain, captions
    3: ("in-domain", ("a red dog runs", "the dog is red")),
    0: ("near-domain", ("two cats sleep on a bed", "cats in bed")),
    7: ("out-domain", ("a puffin on a rock", "one black bird")),
    5: ("near-domain", ("a bus in a street", "the bus waits")),
    6: ("in-domain", ("a man eats an apple", "a man with some fruit")),
}
WRITTEN = {
    "0": "two cats on a bed",
    "3": "a red dog",
    "5": "a bus in the street",
    "6": "a man with an apple",
    "7": "a red rock",
}
PARTS = {"in-domain": ("3", "6"), "near-domain": ("0", "5"), "out-domain": ("7",)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Of annotations in the layout of NoCaps."""
    for key in NOCAPS:
        put(tmp_path / f"images/{key}.jpg", jpeg(key))
    tree = {
        "images": [{"id": key, "file_name": f"{key}.jpg", "domain": of} for key, (of, _) in NOCAPS.items()],
        "annotations": [
            {"id": 10 * key + i, "image_id": key, "caption": text}
            for key, (_, texts) in NOCAPS.items()
            for i, text in enumerate(texts)
        ],
    }
    coco = {"file": put_json(tmp_path / "nocaps.json", tree)}
    run = {"images": str(tmp_path / "images"), "out": str(tmp_path / "shards"), "coco": coco}
    assert ingest.main([put_json(tmp_path / "ingest.yaml", run)]) == 0
    return tmp_path / "shards"


def rows(captions: dict[str, str]) -> list[dict[str, Any]]:
    """As COCO's tool takes them, with numbers for ids."""
    return [{"image_id": int(key), "caption": text} for key, text in captions.items()]


def score(shards: Path, results: Any, **more: Any) -> dict[str, Any]:
    """What is written about a file of captions."""
    folder = shards.parent
    tree = {"out": str(folder / "out"), "results": put_json(folder / "results.json", results)}
    tree |= {"shards": [str(shards)], "device": "cpu"}
    assert eval_captions.main([put_json(folder / "run.yaml", tree | more)]) == 0
    found: dict[str, Any] = json.loads((folder / "out/metrics.json").read_text())
    return found


def expected(keys: tuple[str, ...]) -> dict[str, float]:
    captions = {key: WRITTEN[key] for key in keys}
    references = {key: list(NOCAPS[int(key)][1]) for key in keys}
    bleus = {f"bleu{n}": value for n, value in enumerate(bleu(captions, references)[0], start=1)}
    return bleus | {
        "rouge_l": rouge_l(captions, references)[0],
        "cider_d": cider_d(captions, references)[0],
    }


# ---- a file of captions --------------------------------------------------------------------------


def test_captions_of_a_file_are_scored_whole_and_by_domain(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = score(shards, rows(WRITTEN))
    whole = expected(("3", "0", "7", "5", "6"))  # the order does not matter but for the last digit
    assert {name: found["metrics"][name] for name in whole} == pytest.approx(whole, abs=1e-12)
    assert whole["cider_d"] > 0.5 and found["images"] == 5 and found["left_out"] == 0
    assert list(found["domains"]) == list(PARTS)
    for domain, keys in PARTS.items():
        part = expected(keys)
        assert {name: found["domains"][domain][name] for name in part} == pytest.approx(part, abs=1e-12)
        assert found["domains"][domain]["images"] == len(keys)
    assert found["domains"]["near-domain"]["cider_d"] != pytest.approx(whole["cider_d"], abs=1e-3)
    assert found["results"]["source"].endswith("results.json") and "weights" not in found
    shown = capsys.readouterr().out.splitlines()
    heads = ["in-domain", "near-domain", "out-domain", "overall"]
    assert heads in [line.split() for line in shown]
    cells = [f"{100 * found['domains'][name]['cider_d']:.1f}" for name in PARTS]
    assert ["cider_d", *cells, f"{100 * whole['cider_d']:.1f}"] in [line.split() for line in shown]
    assert not (shards.parent / "out/captions.json").exists()  # they are where they were


def test_ids_that_do_not_fit_are_listed(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json captions '3' 2 times, '5' 3 times"):
        score(shards, rows(WRITTEN) + rows({"3": "x", "5": "y"}) + rows({"5": "z"}))
    with pytest.raises(ValueError, match="captions of 2 images that are not in shards: 11, 12"):
        score(shards, rows(WRITTEN | {"11": "x", "12": "y"}), subset=True)
    some = {key: text for key, text in WRITTEN.items() if key not in ("0", "6")}
    with pytest.raises(ValueError, match=r"has no caption of 2 images in shards: 0, 6\. Scores of a part"):
        score(shards, rows(some))
    assert not (shards.parent / "out").exists()


def test_a_subset_is_scored_where_it_is_asked_for(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("3", "7", "5")
    found = score(shards, rows({key: WRITTEN[key] for key in keys}), subset=True)
    part = expected(keys)
    assert {name: found["metrics"][name] for name in part} == pytest.approx(part, abs=1e-12)
    assert (found["images"], found["left_out"]) == (3, 2)
    assert "a part: limit None, 2 images left out" in capsys.readouterr().out
    found = score(shards, rows(WRITTEN), limit=2)  # said, so captions of others are no matter
    assert found["images"] == 2 and found["protocol"]["limit"] == 2
    assert found["metrics"]["cider_d"] == pytest.approx(expected(("3", "0"))["cider_d"], abs=1e-12)
    with pytest.raises(ValueError, match="the test set has no image"):
        score(shards, [], subset=True)


@pytest.mark.parametrize(
    ("results", "complaint"),
    [
        ({"3": "x"}, r"results\.json: record is .*expected a list"),
        ([{"image_id": 3}], r"record\[0\] has no key 'caption'; it has 'image_id'"),
        ([{"image_id": 3, "caption": ["x"]}], r"record\[0\] caption is .*expected text"),
        (
            [{"image_id": 3.0, "caption": "x"}],
            r"record\[0\] image_id is 3\.0, expected a whole number or text",
        ),
    ],
)
def test_bad_files_of_captions(shards: Path, results: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        score(shards, results)


def test_what_a_run_writes_can_be_scored_again(tmp_path: Path) -> None:
    file = put_json(tmp_path / "captions.json", [{"image_id": "a/7", "caption": "x"}, *rows({"42": "y"})])
    assert read_results(file) == [("a/7", "x"), ("42", "y")]


def test_runs_that_make_no_sense(tmp_path: Path) -> None:
    for tree, complaint in (
        ({}, "give one of model and results"),
        ({"model": "m", "results": "r"}, "give one of model and results"),
        ({"results": "r", "grounding_gap": True}, "grounding_gap needs a model"),
        ({"model": "m", "synonyms": "s"}, "give objects too"),
        ({"model": "m", "extra": ["meteors"]}, "extra"),
    ):
        file = put_json(tmp_path / "run.yaml", {"out": "o", "shards": ["s"], **tree})
        with pytest.raises(ConfigError, match=complaint):
            eval_captions.main([file])


# ---- images that are not in the shards -----------------------------------------------------------


def test_shards_that_lack_images_are_a_subset(tmp_path: Path) -> None:
    run = numbered(tmp_path, 4, absent=[1, 2])
    assert ingest.ingest(run).rows == 2
    written = [{"image_id": f"{i:03d}", "caption": f"picture {i}"} for i in (0, 3)]
    out = Path(run.out)
    with pytest.raises(ValueError, match=r"out: lacks 2 of the annotated images \(001, 002\)"):
        score(out, written)
    assert score(out, written, subset=True)["left_out"] == 2
    tree = {"out": str(tmp_path / "x"), "model": "nowhere", "shards": [run.out]}
    with pytest.raises(ValueError, match=r"lacks 2 of the annotated images .* or set subset=true"):
        eval_retrieval.main([put_json(tmp_path / "retrieval.yaml", tree)])


def test_domains_are_those_of_the_annotations(shards: Path, tmp_path: Path) -> None:
    domains = {str(key): domain for key, (domain, _) in NOCAPS.items()}
    assert read_domains(str(tmp_path / "nocaps.json")) == domains
    assert json.loads((shards / "domains.json").read_text()) == domains
    coco = put_json(tmp_path / "coco.json", {"images": [{"id": 1, "file_name": "1.jpg"}]})
    assert read_domains(coco) == {}
    put_json(shards / "domains.json", {"3": "in-domain"})
    with pytest.raises(ValueError, match="tell no domain of the images 0, 7, 5, 6; run make shards again"):
        score(shards, rows(WRITTEN))
    put(shards / "domains.json", b"[1")
    with pytest.raises(ValueError, match=r"domains\.json: is not JSON"):
        score(shards, rows(WRITTEN))


# ---- metrics in Java -----------------------------------------------------------------------------


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name and no more, in place of the true one, if any; where its parser should be."""
    true = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("pycocoevalcap")}
    place = tmp_path / "place"
    put(place / "pycocoevalcap/__init__.py", b"")
    put(place / "bin/java", b"#!/bin/sh\nexit 1\n").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(place)
        patch.setenv("PATH", str(place / "bin"))
        yield place / "pycocoevalcap/spice/lib"
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]
    sys.modules.update(true)


def test_what_is_missing_is_said_before_anything_is_done(
    shards: Path, lib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_absent(())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycocoevalcap", None)
        with pytest.raises(
            ValueError, match=r"extra asks for meteor, which needs pycocoevalcap, .*pip install"
        ):
            score(shards, rows(WRITTEN), extra=["meteor"])
    refuse_absent(("meteor",))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match="there is no java on the PATH"):
            refuse_absent(("meteor",))
    wanted: tuple[Extra, ...] = ("meteor", "spice")
    put(lib / "stanford-corenlp-3.6.0.jar", b"")
    with pytest.raises(ValueError, match=r"lacks SPICE's parser: put stanford-corenlp-3\.6\.0-models\.jar"):
        refuse_absent(wanted)
    put(lib / "stanford-corenlp-3.6.0-models.jar", b"")
    refuse_absent(wanted)


def test_spice_is_never_downloaded(lib: Path) -> None:
    """The wrapper, which would fetch its parser, is not even imported; and where it fails, that is said."""
    put(lib.parent / "__init__.py", b"")
    wrapper = put(lib.parent / "spice.py", b"raise SystemExit('this downloads')")
    with pytest.raises(ValueError, match="nothing is downloaded here"):
        spice(GOOD, REFERENCES)
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        put(lib / name, b"")
    wrapper.write_text(
        "import subprocess\n"
        "class Spice:\n"
        "    def compute_score(self, *_):\n"
        "        subprocess.check_call(['java'])\n"
    )
    with pytest.raises(ValueError, match=r"Java program failed \(status 1\).*not on 16 and newer"):
        spice(GOOD, REFERENCES)


def test_meteor_has_its_published_numbers() -> None:
    """Of jmhessel/clipscore's worse example; its README has four digits, the others are pycocoevalcap's own.

    Each call starts a Java machine, which takes seconds.
    """
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if not shutil.which("java"):
        pytest.skip("no java")
    corpus, each = meteor(BAD, REFERENCES)
    assert corpus == pytest.approx(0.1860710704, abs=1e-9)
    assert list(each) == list(BAD) and 0 < min(each.values()) < corpus < max(each.values()) < 1
    corpus, each = meteor({0: "", 1: "a dog."}, {0: ["a cat"], 1: ["a dog"]})
    assert each[0] == 0 and each[1] > 0.9
