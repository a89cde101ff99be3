"""`make results`: ranks against loops, papers' numbers against other tables, our rows against the metrics."""

import html
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import IMAGES, K, evaluate

from pipelines import results
from pipelines.config import ConfigError, run_main
from pipelines.results_papers import read_papers
from pipelines.results_ranks import ranks_of, read_ranks, recall_curve
from pipelines.results_runs import decoding_words, read_evaluation
from pipelines.results_table import cell, code, results_page
from pipelines.retrieval import recalls

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/results.yaml")

# ---- ranks ---------------------------------------------------------------------------------------


def test_ranks_are_those_of_two_loops() -> None:
    torch.manual_seed(0)
    to_text, to_image = torch.randn(7, 15), torch.randn(15, 7)
    owners = torch.arange(15) % 7
    found = ranks_of(to_text, to_image, owners)
    for side, scores, right in (
        ("tr", to_text, lambda q, c: int(owners[c]) == q),
        ("ir", to_image, lambda q, c: int(owners[q]) == c),
    ):
        for query, row in enumerate(scores.tolist()):
            order = sorted(range(len(row)), key=lambda c: -row[c])
            place = next(place for place, c in enumerate(order) if right(query, c))
            assert found[side]["rank"][query] == place
            assert found[side]["top"][query] == order[:5]


def test_a_recall_curve_is_recall_at_every_k() -> None:
    assert recall_curve([0, 0, 2, 9], 4) == [0.5, 0.5, 0.75, 0.75]
    ranks = torch.randint(0, 40, (101,), generator=torch.Generator().manual_seed(1))
    curve = recall_curve(ranks.tolist(), 30)
    for name, value in recalls("tr", ranks, (1, 5, 10, 30)).items():
        assert curve[int(name.removeprefix("tr@")) - 1] == pytest.approx(value)


GOOD = {"tr": {"rank": [0, 3], "top": [[0], [2]]}, "ir": {"rank": [0, 1, 1, 0], "top": [[0], [0], [1], [1]]}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found["itc"].pop("ir"),
        lambda found: found["itc"]["tr"]["rank"].pop(),
        lambda found: found["itc"]["tr"]["rank"].__setitem__(0, -1),
        lambda found: found["itc"]["tr"]["rank"].__setitem__(0, 5),
        lambda found: found["itc"]["tr"]["rank"].__setitem__(0, 0.5),
        lambda found: found["itc"]["tr"]["top"].__setitem__(0, [4]),
        lambda found: found["itc"]["tr"]["top"].pop(),
        lambda found: found.__setitem__("itc", "<script>"),
    ],
)
def test_ranks_of_another_test_set_are_refused(tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    found = {"itc": json.loads(json.dumps(GOOD))}
    assert read_ranks(tmp_path, 2, 4) is None
    (tmp_path / "ranks.json").write_text(json.dumps(found))
    assert read_ranks(tmp_path, 2, 4) is not None
    spoil(found)
    (tmp_path / "ranks.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"ranks\.json: does not tell the ranks of 2 images and 4 texts"):
        read_ranks(tmp_path, 2, 4)


# ---- papers --------------------------------------------------------------------------------------

# As other tables of the papers print them: BLIP Table 1 (with CapFilt), BLIP-2 Table 1, and LAVIS.
TWICE = [
    ("retrieval", "coco", "BLIP ViT-B, 14M", {"TR@1": 80.6, "IR@1": 63.1}),
    ("retrieval", "coco", "BLIP ViT-B, 129M", {"TR@1": 81.9, "IR@1": 64.3}),
    ("retrieval", "coco", "BLIP ViT-B CapFilt-L, 129M", {"TR@1": 81.2, "IR@1": 64.1}),
    ("retrieval", "coco", "BLIP ViT-L, 129M", {"TR@1": 82.4, "IR@1": 65.1}),
    ("retrieval", "coco", "BLIP-2 ViT-g", {"TR@1": 85.4, "IR@1": 68.3}),
    ("captions", "coco", "BLIP ViT-B, 14M", {"BLEU-4": 38.6, "CIDEr": 129.7}),
    ("captions", "coco", "BLIP ViT-B, 129M", {"BLEU-4": 39.4, "CIDEr": 131.4}),
    ("captions", "coco", "BLIP ViT-B CapFilt-L, 129M", {"BLEU-4": 39.7, "CIDEr": 133.3}),
    ("captions", "coco", "BLIP ViT-L, 129M", {"BLEU-4": 40.4, "CIDEr": 136.7}),
    ("captions", "nocaps", "BLIP ViT-B, 14M", {"CIDEr": 105.1, "SPICE": 14.4}),
    ("captions", "nocaps", "BLIP ViT-B, 129M", {"CIDEr": 106.3, "SPICE": 14.3}),
    ("captions", "nocaps", "BLIP ViT-B CapFilt-L, 129M", {"CIDEr": 109.6, "SPICE": 14.7}),
    ("captions", "nocaps", "BLIP ViT-L, 129M", {"CIDEr": 113.2, "SPICE": 14.8}),
    ("captions", "nocaps", "BLIP-2 ViT-g FlanT5-XL", {"CIDEr": 121.6, "SPICE": 15.8}),
    ("vqa", "vqav2_test_dev", "Flamingo-80B", {"accuracy": 56.3}),
    ("vqa", "vqav2_test_dev", "BLIP-2 ViT-g FlanT5-XXL", {"accuracy": 65.0}),
    ("zeroshot", "imagenet", "CLIP ViT-L/14, 336 px", {"imagenet": 76.2, "v2": 70.1}),
]


@pytest.mark.parametrize(("task", "name", "model", "scores"), TWICE)
def test_numbers_are_those_of_other_tables(
    task: str, name: str, model: str, scores: dict[str, float]
) -> None:
    benchmark = read_papers().tasks[task][name]
    told = [
        dict(zip(benchmark.columns, row.scores, strict=True)) for row in benchmark.rows if row.model == model
    ]
    assert any(scores.items() <= row.items() for row in told), told


def test_papers_are_plausible() -> None:
    papers = read_papers()
    assert {(task, name) for task, found in papers.tasks.items() for name in found} >= {
        (task, name) for task, name, *_ in TWICE
    }
    for benchmark in papers.retrieval.values():
        for row in benchmark.rows:
            assert None not in row.scores
            assert list(row.scores[:3]) == sorted(row.scores[:3]), row  # type: ignore[type-var]
            assert list(row.scores[3:]) == sorted(row.scores[3:]), row  # type: ignore[type-var]
    for benchmark in papers.captions.values():  # the mean of the domains is the whole, or nearly
        for row in benchmark.rows:
            told = dict(zip(benchmark.columns, row.scores, strict=True))
            domains = [value for column, value in told.items() if column.endswith(" C") and value is not None]
            if domains:
                assert min(domains) <= (told["CIDEr"] or 0) <= max(domains)
    rows = [row for found in papers.tasks.values() for one in found.values() for row in one.rows]
    assert all(re.fullmatch(r"[\w-]+, (Table|Figure) \d+|LAVIS, \w+", row.source) for row in rows)


def test_a_wrong_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "papers.yaml"
    rest = {"captions": {}, "vqa": {}, "zeroshot": {}}
    row = {"model": "M", "how": "h", "scores": [1.0], "source": "A, Table 1"}
    table = {"title": "t", "size": 1, "columns": ["TR@1"], "rows": [row]}
    tree = {"sources": {"A": "a"}, "retrieval": {"coco": table}, **rest}
    path.write_text(json.dumps(tree))
    assert read_papers(path).retrieval["coco"].rows[0].scores == (1.0,)
    for change, message in (
        ({"source": "B, Table 1"}, "begins with none of A"),
        ({"scores": [1, 2]}, "2 scores"),
    ):
        row.update(change)
        path.write_text(json.dumps(tree))
        with pytest.raises(ConfigError, match=message):
            read_papers(path)
        row.update({"scores": [1.0], "source": "A, Table 1"})


# ---- the tables ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return evaluate(tmp_path_factory.getbasetemp() / "evaluated")


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Title -> rows of results.md, read by hand."""
    found: dict[str, list[dict[str, str]]] = {}
    title, head = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            title, head = line[3:], []
        elif line.startswith("|"):
            cells = [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not head:
                head = cells
            elif not set(line) <= set("|-:"):
                found.setdefault(title, []).append(dict(zip(head, cells, strict=True)))
    return found


def make(runs: dict[str, Path], out: Path, *more: str) -> dict[str, list[dict[str, str]]]:
    folders = json.dumps([str(run) for run in runs.values()])
    assert results.main([CONFIG, f"out={out}", f"runs={folders}", *more]) == 0
    return tables((out / "results.md").read_text())


def test_our_rows_stand_beside_the_papers(runs: dict[str, Path], tmp_path: Path) -> None:
    sets = {runs["retrieval"]: "flickr30k", runs["captions"]: "nocaps", runs["vqa"]: "vqav2_val"}
    named = ", ".join(f"{run}: {name}" for run, name in sets.items())
    found = make(runs, tmp_path, f"datasets={{{named}}}")
    titles = {title.partition(":")[0]: title for title in found}
    assert (
        list(titles) == ["Captions", "Image-text retrieval", "Visual question answering"] or len(titles) == 3
    )
    metrics = {task: json.loads((run / "metrics.json").read_text()) for task, run in runs.items()}
    *papers, itc, itm = found[titles["Image-text retrieval"]]
    assert (
        len(papers) == 15
        and papers[0]["TR@1"] == "95.9"
        and papers[0]["source, or run and protocol"] == ("BLIP, Table 5")
    )
    for row, way in ((itc, "itc"), (itm, "itm")):
        for column in ("TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"):
            assert float(row[column]) == pytest.approx(
                100 * metrics["retrieval"][way][column.lower()], abs=0.051
            )
    assert (itc["how"], itm["how"]) == ("ITC alone", f"best {K} of ITC ranked again by ITM")
    said = itm["source, or run and protocol"]
    weights, data = metrics["retrieval"]["weights"]["sha256"], metrics["retrieval"]["data"]["fingerprint"]
    assert said == (
        f"`{runs['retrieval']}`: k {K}, 32 px, fp32; weights `{weights[:12]}`, data `{data[:12]}`"
    )
    *papers, ours = found[titles["Captions"]]
    assert papers[4]["CIDEr"] == "113.2" and papers[3]["in C"] == "-" == ours["in C"] == ours["SPICE"]
    assert float(ours["CIDEr"]) == pytest.approx(100 * metrics["captions"]["metrics"]["cider_d"], abs=0.051)
    assert "nucleus 0.9, 5 to 14 tokens, 32 px, fp32" in ours["source, or run and protocol"]
    *papers, ours = found[titles["Visual question answering"]]
    assert papers[-1]["accuracy"] == "65.20"
    assert float(ours["accuracy"]) == pytest.approx(100 * metrics["vqa"]["metrics"]["accuracy"], abs=0.0051)
    text = (tmp_path / "results.md").read_text()
    assert f"No match for the papers: `{runs['retrieval']}` has {IMAGES} of 1,000." in text
    assert "- BLIP-2: Li et al. 2023" in text and "- CLIP:" not in text.replace("CLIP ViT", "")


def test_without_a_name_only_our_rows_are_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    found = make(runs, tmp_path)
    assert sorted(map(len, found.values())) == [1, 1, 2]
    text = (tmp_path / "results.md").read_text()
    assert "No match" not in text and "Sources" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "gallery.html", "recall.png", "results.md",
    ]  # fmt: skip


def test_the_same_runs_give_the_same_files(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(runs, tmp_path / name)
    for name in ("results.md", "gallery.html", "recall.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def copied(run: Path, to: Path) -> Path:
    to.mkdir()
    for path in run.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_folder_without_ranks_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    bare = copied(runs["retrieval"], tmp_path / "bare")
    (bare / "ranks.json").unlink()
    make({"bare": bare}, tmp_path / "out")
    assert not (tmp_path / "out/recall.png").exists()
    assert f"No recall curve: `{bare}` has no ranks.json." in (tmp_path / "out/results.md").read_text()
    make({"bare": bare, "whole": runs["retrieval"]}, tmp_path / "both")
    text = (tmp_path / "both/results.md").read_text()
    assert "![recall at k](recall.png)" in text and str(bare) in text


def test_the_picture_has_a_line_for_each_run_and_score(runs: dict[str, Path], tmp_path: Path) -> None:
    odd = copied(runs["retrieval"], tmp_path / "_cost $x^$ {")
    curves = results.recall_curves([read_evaluation(runs["retrieval"]), read_evaluation(odd)])
    assert [(Path(run).name, score) for run, score in curves] == [
        ("retrieval", "itc"), ("retrieval", "itm"), (odd.name, "itc"), (odd.name, "itm"),
    ]  # fmt: skip
    found = json.loads((runs["retrieval"] / "metrics.json").read_text())
    for (_, score), sides in curves.items():
        for side, curve in sides.items():
            assert [curve[0], curve[4]] == pytest.approx([found[score][f"{side}@{k}"] for k in (1, 5)])
            assert curve == sorted(curve) and curve[-1] == 1.0
    make({"a": runs["retrieval"], "b": odd}, tmp_path / "out")
    data = (tmp_path / "out/recall.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 900 and height > 350


def zeroshot(folder: Path) -> Path:
    """As pipelines.eval_zeroshot leaves it."""
    sets = {name: {"images": 10, "top1": top, "top5": 1.0, "mean_per_class": top} for name, top in
            (("imagenet", 0.612), ("a", 0.25), ("mine", 0.5))}  # fmt: skip
    tree = {
        "task": "zeroshot",
        "protocol": {"image_size": 64, "templates": ["a {}"] * 3, "classes": 48, "precision": "fp32"},
        "zeroshot": {"sets": sets},
        "probe": {"strength": 1.0, "sets": sets},
        "weights": {"source": "m", "sha256": "a" * 64},
        "data": {"sets": {name: {"fingerprint": "b" * 64} for name in sets}},
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(tree))
    return folder


def test_zero_shot_classes_have_a_column_for_each_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = zeroshot(tmp_path / "run")
    (rows,) = make({"run": run}, tmp_path / "out", f"datasets={{{run}: imagenet}}").values()
    *_, clip, ours, probe = rows
    assert (clip["imagenet"], clip["v2"], clip["mine"]) == ("76.5", "-", "-")
    assert [ours[name] for name in ("imagenet", "v2", "a", "mine")] == ["61.2", "-", "25.0", "50.0"]
    assert (ours["how"], probe["how"]) == ("zero-shot", "linear probe")
    assert "48 classes, 3 templates, 64 px, fp32" in ours["source, or run and protocol"]
    assert "no examples of" in capsys.readouterr().out


def test_domains_have_the_columns_of_the_papers(tmp_path: Path) -> None:
    """As pipelines.eval_captions leaves NoCaps with SPICE."""
    domains = {f"{name}-domain": {"images": 1, "cider_d": score, "spice": score / 10}
               for name, score in (("in", 1.1), ("near", 1.2), ("out", 1.3))}  # fmt: skip
    tree = {"task": "captions", "images": 4500, "protocol": {}, "domains": domains,
            "metrics": {"bleu4": 0.2, "cider_d": 1.25, "spice": 0.14},
            "weights": {"source": "m", "sha256": "a"},
            "data": {"shards": ["s"], "fingerprint": "b"}}  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text(json.dumps(tree))
    run = read_evaluation(tmp_path / "run", "nocaps")
    ((*_, ours),) = tables(results_page([run], read_papers())).values()
    numbers = {name: ours[name] for name in list(ours)[2:-1]}
    assert numbers == {"in C": "110.0", "in S": "11.0", "near C": "120.0", "near S": "12.0", "out C": "130.0",
                       "out S": "13.0", "CIDEr": "125.0", "SPICE": "14.0", "BLEU-4": "20.0"}  # fmt: skip


def test_decoding_in_words() -> None:
    usual = {"beams": 3, "top_p": None, "min_length": 5, "max_length": 20, "length_penalty": 1.0}
    assert decoding_words(usual) == "3 beams, 5 to 20 tokens"
    odd = usual | {"beams": 1, "length_penalty": -1.0, "repetition_penalty": 1.1}
    assert decoding_words(odd) == "greedy, 5 to 20 tokens, length penalty -1, repetition penalty 1.1"


# ---- what strangers and mistakes may do ----------------------------------------------------------

NAMES = [
    "a|b",
    "`code`",
    "<script>x</script>",
    "*bold* _it_ ~~no~~ [l](http://x)",
    "\u202e\x1b[31m",
    "a\nb",
    "",
    "\\",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_ends_its_cell_or_becomes_markup(name: str) -> None:
    for written in (cell(name), code(name)):
        assert len(re.split(r"(?<!\\)(?:\\\\)*\|", f"| {written} |")) == 3
        assert written.replace("\n", "?").isprintable() and "\n" not in written
    assert "<" not in cell(name)
    assert not re.search(r"(?<!\\)[*_~`\[]", cell(name))
    assert code(name).count("`") == 2
    if name.isprintable():
        assert html.unescape(re.sub(r"\\(.)", r"\1", cell(name))) == name


def test_hostile_names_stay_in_their_row(tmp_path: Path) -> None:
    run = zeroshot(tmp_path / "a|b `c` <i>")
    tree = json.loads((run / "metrics.json").read_text())
    tree["weights"]["source"] = "| x | `<script>`\u202e\n# head"
    tree["zeroshot"]["sets"] = {"| <b>": tree["zeroshot"]["sets"]["a"]}
    (run / "metrics.json").write_text(json.dumps(tree))
    text = results_page([read_evaluation(run)], read_papers())
    (rows,) = tables(text).values()
    assert len(rows) == 2 and len(rows[0]) == 7
    assert "\n# head" not in text and "\u202e" not in text and "<b>" not in re.sub("`[^`]*`", "", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=[]"], "runs is empty"),
        (["datasets={elsewhere: coco}"], "datasets names 'elsewhere'"),
        (["per_gallery=0"], "per_gallery is 0"),
        (["runz=[a]"], "did you mean 'runs'"),
    ],
)
def test_a_wrong_config_says_so(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        results.main([CONFIG, f"out={tmp_path}", *arguments])


def test_a_wrong_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "filter").mkdir()
    (tmp_path / "filter/metrics.json").write_text('{"task": "filter"}')
    (tmp_path / "part").mkdir()
    (tmp_path / "part/metrics.json").write_text('{"task": "captions", "images": 3}')
    run = zeroshot(tmp_path / "run")
    for folder, said, more in (
        ("none", "there is no such file; an evaluation writes it: make eval-retrieval", []),
        ("filter", "holds the task 'filter'; known are retrieval, captions, vqa, zeroshot", []),
        ("part", "lacks 'weights'; run `make eval-captions` again", []),
        ("run", "is said to be of 'coco'; for zeroshot pipelines/papers.yaml has imagenet", [f"{run}: coco"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            named = f"datasets={{{', '.join(more)}}}"
            run_main(results.main, [CONFIG, f"runs=[{tmp_path / folder}]", f"out={tmp_path}/out", named])
        assert stopped.value.code == 1
        assert said in capsys.readouterr().err
