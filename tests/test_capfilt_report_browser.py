"""The report in a real Chromium: what a person clicks works, what a stranger wrote does nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import BINARY, Page, chromium
from report_folder import HOSTILE, finish, make_folder

from capfilt.report import write_report
from capfilt.schema import Row, Scores
from pipelines import calibrate

pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium on this machine; `apt-get install chromium` brings one"
)
ROWS = 150
WIDTHS = (360, 1440)


def score(row: Row) -> Scores:
    """Scores all over 0..1; rows 0 to 13 say hostile words twice."""
    web, synthetic = (row.index * 7 % ROWS) / ROWS, (row.index * 11 % ROWS) / ROWS
    made = row.text if row.index < len(HOSTILE) else f"made {row.index}"
    return Scores("ok", None, (made or "",), web, 0.0, (synthetic,), (0.0,))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [*HOSTILE, *(f"web text {i}" for i in range(len(HOSTILE), ROWS))]
    keys = [f"{i} {text[:40]}" for i, text in enumerate(words)]
    folder = make_folder(tmp_path_factory.mktemp("run"), score, ROWS, words, keys, shards=1)
    finish(folder)
    return write_report(folder, per_gallery=8).path


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


def text(page: Page, query: str) -> str:
    found: str = page.run(f"document.querySelector({json.dumps(query)}).innerText")
    return found


def state(page: Page) -> dict[str, object]:
    found: dict[str, object] = page.run("JSON.parse(document.getElementById('state').textContent)")
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_without_a_request_an_error_or_a_sideways_scroll(
    browser: Page, report: Path, width: int, dark: bool
) -> None:
    browser.open(report, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.run("Promise.all([...document.images].map((image) => image.decode()))")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert (browser.requests, browser.trouble) == ([], [])
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_words_are_seen_and_do_nothing(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    assert browser.run("window.hacked") is None
    assert re.fullmatch(r"CapFilt report: run\d+/out", browser.run("document.title"))
    assert browser.run("document.scripts.length") == 2
    shown = browser.run("[...document.querySelectorAll('#judge .words')].map((e) => e.textContent)")
    drawn = {int(key.split()[0]) for key in state(browser)["keys"]}  # type: ignore[attr-defined]
    seen = [i for i in range(7) if i in drawn]
    assert len(seen) >= 4
    for i in seen:
        assert shown.count(HOSTILE[i]) == 2, HOSTILE[i]
    words = " ".join(shown)
    for i, odd in ((7, "paypalU+202Egpj.exe"), (9, "U+001B]0;ownedU+0007U+001B[31mred")):
        assert (odd in words) == (i in drawn)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_slider_moves_all_that_it_should(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    known = state(browser)
    assert browser.run("document.getElementById('threshold').offsetWidth") > 200
    browser.run("document.getElementById('threshold').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert text(browser, "#at") == "0.53"
    assert browser.run("document.getElementById('threshold').getAttribute('aria-valuetext')") == "0.53"
    assert text(browser, "#select-command") == f"make select OUT={report.parent} THRESHOLD=0.53"
    for what, kept in known["kept"].items():  # type: ignore[attr-defined]
        assert text(browser, f"[data-kept={what}]") == str(kept[53])
        assert text(browser, f"[data-share={what}]") == f"{kept[53] / ROWS:.1%}"
    assert browser.run(
        "[...document.querySelectorAll('[data-cut=line]')].map((e) => e.getAttribute('x1'))"
    ) == (["53.000%"] * 3)
    browser.press("End")
    assert text(browser, "#at") == "1.00" and text(browser, "[data-kept=rows]") == "0"
    assert browser.trouble == []


@pytest.mark.parametrize("width", WIDTHS)
def test_tabs_show_one_gallery_and_obey_the_keyboard(browser: Page, report: Path, width: int) -> None:
    browser.open(report, width)
    visible = "[...document.querySelectorAll('.panel')].filter((e) => e.offsetHeight).map((e) => e.id)"
    chosen = "document.activeElement.getAttribute('aria-controls')"
    assert browser.run(visible) == ["gallery-dropped_web"]
    browser.run("document.querySelectorAll('[role=tab]')[3].click()")
    assert browser.run(visible) == ["gallery-kept_synthetic"]
    browser.run("document.querySelectorAll('[role=tab]')[3].focus()")
    for key, panel in (
        ("ArrowRight", "gallery-both_dropped"),
        ("End", "gallery-disagreement"),
        ("ArrowRight", "gallery-dropped_web"),
        ("ArrowLeft", "gallery-disagreement"),
        ("Home", "gallery-dropped_web"),
    ):
        browser.press(key)
        assert browser.run(visible) == [panel] == [browser.run(chosen)]
    assert browser.run("document.querySelectorAll('[role=tab][tabindex=\"0\"]').length") == 1
    assert browser.trouble == []


def test_switches_blur_and_stretch(browser: Page, report: Path) -> None:
    browser.open(report, 1440)
    filter_ = "getComputedStyle(document.querySelector('#judge .thumb img')).filter"
    assert browser.run(filter_) == "none"
    browser.run("document.getElementById('blur').focus()")
    browser.press(" ")
    assert "blur" in browser.run(filter_)
    shown = "['even', 'log'].map((name) => getComputedStyle(document.querySelector('.bars.' + name)).display)"
    assert browser.run(shown) == ["inline", "none"]
    browser.run("document.getElementById('log').click()")
    assert browser.run(shown) == ["none", "inline"]


def judge(browser: Page, source: str) -> None:
    """Keep what scores 0.4 or more, as a person who agrees with the filter would; be unsure about one."""
    factor = 7 if source == "web" else 11
    browser.run(f"""state.keys.forEach((key, i) => {{
        const score = (Number(key.split(' ')[0]) * {factor} % {ROWS}) / {ROWS};
        const word = i === 5 ? 'unsure' : score >= 0.4 ? 'keep' : 'drop';
        document.querySelector(`[data-row="${{i}}"][data-source={source}][data-verdict=${{word}}]`).click();
    }})""")


def test_verdicts_are_downloaded_and_calibrate_reads_them(
    browser: Page, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.open(report, 1440)
    browser.run("localStorage.clear()")
    browser.open(report, 1440)
    assert browser.run("document.getElementById('download').disabled") is True
    judge(browser, "web")
    judge(browser, "synthetic")
    assert text(browser, "#progress") == "240 texts judged: 120 web, 120 synthetic"
    first = "document.querySelector('[data-row=\"0\"][data-source=web][aria-pressed=true]')"
    was = browser.run(f"{first}.dataset.verdict")
    browser.run(f"{first}.focus()")
    browser.press(" ")  # takes it back
    assert browser.run(first) is None and text(browser, "#progress").startswith("239 texts")
    browser.open(report, 1440)  # they outlive the page
    assert text(browser, "#progress").startswith("239 texts")
    browser.run(f"document.querySelector('[data-row=\"0\"][data-source=web][data-verdict={was}]').click()")

    browser.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.getElementById('download').click()")
    path = tmp_path / "verdicts.json"
    browser.wait(path.exists)
    browser.wait(lambda: path.stat().st_size > 0)
    entries = json.loads(path.read_text())
    assert len(entries) == 240 and entries[0].keys() == {"key", "source", "verdict"}
    assert {entry["key"] for entry in entries} == set(state(browser)["keys"])  # type: ignore[call-overload]
    config = str(Path(__file__).resolve().parent.parent / "configs/calibrate.yaml")
    overrides = [f"out={report.parent}", f"verdicts={path}", "precision=0.9", "resamples=100"]
    assert calibrate.main([config, *overrides]) == 0
    found = re.search(r"THRESHOLD=([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert found is not None and 0.3 < float(found[1]) <= 0.4
    assert browser.requests == [] and browser.trouble == []


def test_verdicts_are_forgotten_when_asked(browser: Page, report: Path) -> None:
    browser.open(report, 1440)
    browser.run("localStorage.clear()")
    browser.open(report, 1440)
    judge(browser, "web")
    browser.run("setTimeout(() => document.getElementById('forget').click())")
    browser.wait_for("Page.javascriptDialogOpening")
    browser.ask("Page.handleJavaScriptDialog", accept=True)
    assert text(browser, "#progress").startswith("0 texts judged")
    assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 0


def test_without_javascript_all_but_the_slider_is_there(browser: Page, report: Path) -> None:
    browser.open(report, 1440, scripts=False)
    seen = (
        "(query) => [...document.querySelectorAll(query)].filter((e) => e.offsetHeight || e.getBBox).length"
    )
    count = {query: browser.run(f"({seen})({query!r})") for query in (
        ".panel", ".chart", ".card", "#threshold", "[data-verdict]", "[data-copy]", ".judge-tools", "noscript"
    )}  # fmt: skip
    assert count[".panel"] == 7 and count[".chart"] == 5 and count[".card"] > 120 and count["noscript"] == 2
    assert [count[q] for q in ("#threshold", "[data-verdict]", "[data-copy]", ".judge-tools")] == [0] * 4
    assert "blur" not in browser.run("getComputedStyle(document.querySelector('.thumb img')).filter")
    browser.run("document.getElementById('blur').checked = true")
    assert "blur" in browser.run("getComputedStyle(document.querySelector('.thumb img')).filter")
    assert browser.trouble == []
