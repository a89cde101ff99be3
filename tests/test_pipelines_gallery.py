"""The gallery: its examples against the metrics, the page against strangers, and in a real Chromium."""

import base64
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from chromium import BINARY, chromium
from chromium import Page as Browser
from evaluations import IMAGES, TEXTS, evaluate, write_clean, write_metrics
from PIL import Image
from report_folder import HOSTILE, Page

from pipelines import eval_captions, results
from pipelines.gallery_data import Answered, Captioned, Query, examples_of, pick
from pipelines.results_runs import read_evaluation
from pipelines.testset import read_testset

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/results.yaml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return evaluate(tmp_path_factory.getbasetemp() / "evaluated")


def make(runs: list[Path], out: Path) -> Page:
    assert results.main([CONFIG, f"out={out}", f"runs={json.dumps([str(run) for run in runs])}"]) == 0
    return Page(out / "gallery.html")


# ---- what is chosen ------------------------------------------------------------------------------


def test_captions_are_ranked_by_the_score_that_the_metrics_are_the_mean_of(runs: dict[str, Path]) -> None:
    run = read_evaluation(runs["captions"])
    shown = examples_of(run, per_gallery=IMAGES, seed=0)
    groups = {group.kind: group.examples for group in shown.groups}
    best, worst = ([one.score for one in groups[kind]] for kind in ("best", "worst"))
    assert len(best) == IMAGES and best == sorted(best, key=lambda x: -(x or 0)) and worst == sorted(best)
    assert mean(score or 0 for score in best) == pytest.approx(run.found["metrics"]["cider_d"])
    written = json.loads((runs["captions"] / "captions.json").read_text())
    references = {image.key: image.texts for image in read_testset(run.shards)}
    for one in groups["random"]:
        assert isinstance(one, Captioned)
        assert {"image_id": one.key, "caption": one.caption} in written
        assert one.references == references[one.key]
    assert {type(image) for image in shown.images.values()} == {bytes} and len(shown.images) == IMAGES


def test_a_file_of_captions_that_was_scored_alone_is_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    """With more captions than were asked for, as eval_captions allows."""
    whole = read_evaluation(runs["captions"])
    tree = {"out": str(tmp_path / "file"), "results": str(runs["captions"] / "captions.json"), "limit": 4,
            "shards": whole.shards}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    assert eval_captions.main([str(tmp_path / "config.yaml")]) == 0
    run = read_evaluation(tmp_path / "file")
    found = examples_of(run, per_gallery=9, seed=0).groups[0].examples
    assert run.model == tree["results"] and run.size == len(found) == 4
    assert mean(one.score or 0 for one in found) == pytest.approx(run.found["metrics"]["cider_d"])


def test_queries_tell_what_was_found_and_what_is_right(runs: dict[str, Path]) -> None:
    run = read_evaluation(runs["retrieval"])
    shown = examples_of(run, per_gallery=TEXTS, seed=0)
    images = list(read_testset(run.shards))
    owner = {text: image.key for image in images for text in image.texts}
    for side, of, recall in (("Texts of an image", TEXTS, "tr"), ("The image of a text", IMAGES, "ir")):
        groups = {group.kind: group.examples for group in shown.groups if group.side == side}
        assert len(groups) == 3 and all(len(found) == IMAGES for found in groups.values())
        for one in groups["random"]:
            assert isinstance(one, Query) and one.of == of
            rights = [hit.right for hit in one.top]
            assert rights == [(owner[hit.text] if hit.text else hit.key) == one.key for hit in one.top]
            if one.rank < 5:
                assert rights.index(True) == one.rank
            else:
                assert not any(rights)
            assert (one.text is None) == (recall == "tr")
        ranks = [one.rank for one in groups["worst"] if isinstance(one, Query)]
        assert ranks == sorted(ranks, reverse=True)
        if recall == "tr":
            assert mean(rank < 5 for rank in ranks) == pytest.approx(run.found["itm"]["tr@5"])


def test_answers_have_the_accuracy_that_the_metrics_are_the_mean_of(runs: dict[str, Path]) -> None:
    run = read_evaluation(runs["vqa"])
    found = {group.kind: group for group in examples_of(run, per_gallery=1000, seed=0).groups}
    assert found["best"].of_all == run.found["questions"] > IMAGES
    best, worst = ([one.score or 0.0 for one in found[kind].examples] for kind in ("best", "worst"))
    assert mean(worst) <= run.found["metrics"]["accuracy"] <= mean(best)
    assert min(worst) == 0.0 and max(best) > 0.5
    for one in found["worst"].examples:
        assert isinstance(one, Answered) and one.score is not None
        assert (one.answer == "nonsense") == (one.score == 0.0)


def captioned(key: str, score: float | None) -> Captioned:
    return Captioned(key, "c", ("r",), score)


def test_equal_ones_are_drawn_by_chance_and_an_image_comes_once() -> None:
    found = [captioned(f"k{i}", 1.0 if i < 40 else 0.0) for i in range(50)]
    drawn = {seed: [one.key for one in pick(found, "best", 5, seed)] for seed in (0, 0, 1)}
    assert (
        drawn[0] == [one.key for one in pick(found, "best", 5, 0)] != drawn[1] != [f"k{i}" for i in range(5)]
    )
    assert {one.score for one in pick(found, "best", 40, 3)} == {1.0}
    assert {one.score for one in pick(found, "worst", 10, 3)} == {0.0}
    assert {one.score for one in pick(found, "random", 30, 3)} == {0.0, 1.0}
    twice = [captioned("a", 0.1), captioned("a", 0.2), captioned("b", 0.9)]
    assert [(one.key, one.score) for one in pick(twice, "worst", 3, 0)] == [("a", 0.1), ("b", 0.9)]
    assert pick([captioned("a", None)], "best", 3, 0) == () != pick([captioned("a", None)], "random", 3, 0)


def test_the_page_shows_the_examples_and_their_scores(runs: dict[str, Path], tmp_path: Path) -> None:
    page = make([runs["captions"], runs["vqa"]], tmp_path)
    shown = examples_of(read_evaluation(runs["captions"]), per_gallery=8, seed=0)
    for group in shown.groups:
        for one in group.examples:
            assert isinstance(one, Captioned) and one.score is not None
            assert one.caption in page.words and f"CIDEr-D {100 * one.score:.1f}" in page.words
            assert all(text in page.words for text in one.references)
    assert "accuracy 0%" in page.words and re.search(r"\u00d7\d", page.words)
    links = [str(a["href"])[1:] for name, a in page.elements if name == "a"]
    names = {a.get("id") for _, a in page.elements}
    assert len(links) > 8 and set(links) <= names


# ---- what is missing -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """Shards of four images, and captions of them."""
    shards = tmp_path / "shards/a.parquet"
    write_clean(shards, [(f"k{i}", [f"text {i}", f"words {i}"]) for i in range(4)])
    run = write_metrics(tmp_path / "run", shards, "m", task="captions", images=4, metrics={"cider_d": 0.5})
    (run / "captions.json").write_text(
        json.dumps([{"image_id": f"k{i}", "caption": "text"} for i in range(4)])
    )
    return run, shards


def told(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Why there is no example; the tables are written nevertheless."""
    page = make([run], out)
    assert page.classed("card") == 0 and "Nothing to show" in page.words
    assert "| **`m`** |" in (out / "results.md").read_text()
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_shards_that_changed_are_not_shown(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = small
    assert make([run], tmp_path / "good").classed("card") == 12
    write_clean(shards, [(f"k{i}", [f"other {i}"]) for i in range(4)])
    assert "the shards have changed since" in told(run, tmp_path / "changed", capsys)
    shards.unlink()
    assert "no such file or folder" in told(run, tmp_path / "gone", capsys)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (None, "No such file"),
        ([{"image_id": "k9", "caption": "c"}], "is of other images"),
        ([{"caption": "c"}], "image_id"),
    ],
)
def test_captions_of_something_else_are_not_shown(
    small: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    captions: object,
    message: str,
) -> None:
    run, _ = small
    (run / "captions.json").unlink()
    if captions:
        (run / "captions.json").write_text(json.dumps(captions))
    assert message in told(run, tmp_path / "out", capsys)


def test_without_references_there_is_no_best(tmp_path: Path) -> None:
    write_clean(tmp_path / "s.parquet", [(str(i), []) for i in range(5)])
    run = write_metrics(tmp_path / "run", tmp_path / "s.parquet", "m", task="captions", images=5, metrics={})
    (run / "captions.json").write_text(json.dumps([{"image_id": i, "caption": f"c {i}"} for i in range(5)]))
    page = make([run], tmp_path / "out")
    assert (
        page.classed("card") == 5
        and "Nobody described it." in page.words
        and "Best" not in page.words.split()
    )
    assert "| **`m`** |  | `" in (tmp_path / "out/results.md").read_text()


# ---- strangers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile words as keys, captions, references, model and folder; captions and a retrieval of them."""
    folder = tmp_path_factory.mktemp("hostile")
    shards, evil = folder / "shards.parquet", "<script>window.hacked=1</script>\u202e"
    rows = [(f"{i} {text[:300]}", [text, f"also {text}"]) for i, text in enumerate(HOSTILE)]
    write_clean(shards, rows)
    images, texts = len(rows), 2 * len(rows)
    one = write_metrics(folder / "c <b>", shards, evil, task="captions", images=images, metrics={})
    captions = [{"image_id": key, "caption": HOSTILE[-1 - i]} for i, (key, _) in enumerate(rows)]
    (one / "captions.json").write_text(json.dumps(captions))
    counted = {"task": "retrieval", "images": images, "texts": texts, "itc": {}}
    two = write_metrics(folder / 'r "onload=x', shards, evil, **counted)
    top = {"tr": [[(2 * i + j) % texts for j in range(5)] for i in range(images)],
           "ir": [[(t + j) % images for j in range(5)] for t in range(texts)]}  # fmt: skip
    ranks = {"tr": [0] * images, "ir": [t % images for t in range(texts)]}
    found = {side: {"rank": ranks[side], "top": top[side]} for side in top}
    (two / "ranks.json").write_text(json.dumps({"itc": found}))
    overrides = ["per_gallery=50", f"runs={json.dumps([str(one), str(two)])}"]
    assert results.main([CONFIG, f"out={folder / 'out'}", *overrides]) == 0
    return folder / "out/gallery.html"


def test_hostile_words_are_words(hostile: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    page, harmless = Page(hostile), make(list(runs.values()), tmp_path)
    kinds, known = ({name for name, _ in one.elements} for one in (page, harmless))
    assert kinds <= known | {"i", "details", "summary"} and "script" not in kinds
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for text in HOSTILE[:7]:
        assert text in page.words, text
    assert "paypalU+202Egpj.exe" in page.words
    assert "U+001B]0;ownedU+0007U+001B[31mred" in page.words
    odd = {c for c in page.source if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")}
    assert odd <= {"\n", "\t"}
    assert "w" * 1001 not in page.words


def test_nothing_is_loaded_and_no_script_is_allowed(hostile: Path) -> None:
    page = Page(hostile)
    for name, attributes in page.elements:
        for attribute in ("src", "href", "srcset", "action", "data", "style"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")) or value == "data:,", (
                name
            )
    meta = next(a for name, a in page.elements if name == "meta" and a.get("http-equiv"))
    policy = dict(part.strip().split(" ", 1) for part in str(meta["content"]).split(";"))
    assert (policy["default-src"], policy["script-src"], policy["img-src"]) == ("'none'", "'none'", "data:")
    assert page.inside["script"] == [] and len(page.inside["style"]) == 1


def test_images_are_encoded_anew_or_said_to_be_broken(hostile: Path) -> None:
    page = Page(hostile)
    sources = {str(a["src"]) for name, a in page.elements if name == "img"}
    assert len(sources) == len(HOSTILE) - 1
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])), formats=["JPEG"]) as image:
            assert image.size == (24, 16)
    assert "the image cannot be shown: decode_error" in page.words


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BINARY is None:
        pytest.skip("no Chromium on this machine; `apt-get install chromium` brings one")
    with chromium() as page:
        yield page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1440])
def test_it_opens_without_a_request_an_error_or_a_sideways_scroll(
    browser: Browser, hostile: Path, width: int, dark: bool
) -> None:
    browser.open(hostile, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.run("Promise.all([...document.images].map((image) => image.decode()))")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert (browser.requests, browser.trouble) == ([], [])
    assert browser.run("window.hacked") is None and browser.run("document.scripts.length") == 0
    out = "(e) => e.getBoundingClientRect().right > innerWidth"
    assert browser.run(f"[...document.querySelectorAll('.card *')].filter({out}).length") == 0
    assert browser.run("document.title") == "Evaluation gallery"


def test_images_can_be_blurred_without_a_script(browser: Browser, hostile: Path) -> None:
    browser.open(hostile, 1440)
    blur = "getComputedStyle(document.querySelector('.thumb img')).filter"
    assert browser.run(blur) == "none"
    browser.run("document.getElementById('blur').focus()")
    browser.press(" ")
    assert "blur" in browser.run(blur)


def test_what_is_read_aloud_says_right_and_wrong(browser: Browser, hostile: Path) -> None:
    browser.open(hostile, 1440)
    told = browser.run("[...document.querySelectorAll('.tiles-found li p')].map((e) => e.textContent)")
    assert told and all(re.fullmatch(r"[\u2713\u2717] \d+, (right|wrong)", words) for words in told)
    assert all(words.startswith("\u2713") == words.endswith("right") for words in told)
    alts = browser.run("[...document.images].map((image) => image.alt)")
    assert alts and all(alt.startswith("test image ") for alt in alts)
    levels = browser.run("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
