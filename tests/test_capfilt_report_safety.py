"""The report page against the words and images of strangers: what they send is shown and does nothing."""

import base64
import hashlib
import io
import json
import re
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import jpeg
from PIL import Image
from report_folder import HOSTILE, Page, finish, make_folder, score

from capfilt.report import STYLE, write_report
from capfilt.report_markup import clipped, island, percent, tag, visible
from capfilt.schema import Row, Scores
from capfilt.shards import done_splits, mark_done, scored_path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page of harmless words, for what both must have in common."""
    folder = make_folder(tmp_path_factory.mktemp("harmless"), score)
    finish(folder)
    return Page(write_report(folder).path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Hostile words in every place that data reaches: texts, keys, captions, reasons, shard names."""
    names = [f"{i} {text[:300]}" for i, text in enumerate(HOSTILE)]

    def judge(row: Row) -> Scores:
        if row.index % 5 == 4:
            return Scores("decode_error", row.text)
        return Scores("ok", None, (row.text or "",), row.index / 20, 0.0, (0.9 - row.index / 20,), (0.0,))

    folder = make_folder(tmp_path_factory.mktemp("hostile"), judge, len(HOSTILE), HOSTILE, names, shards=1)
    evil = "<script>window.hacked=1</script>\u202e"
    finish(folder, failed={evil: evil}, config={"prompt": evil, "captioner": evil, "decoding": {evil: evil}})
    return Page(write_report(folder).path)


def test_hostile_words_are_words(hostile: Page, page: Page) -> None:
    kinds = {name for name, _ in hostile.elements}
    assert kinds <= {name for name, _ in page.elements} | {"i"}
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    for text in HOSTILE[:7]:
        assert text in hostile.words, text
    assert "paypalU+202Egpj.exe" in hostile.words
    assert "zeroU+200BwidthU+2066isoU+2069U+FEFFlate" in hostile.words
    assert "U+001B]0;ownedU+0007U+001B[31mredU+001B[0m nulU+0000 c1U+009B31m" in hostile.words
    assert [name for name, _ in hostile.elements].count("script") == 2


def test_no_character_of_the_page_is_invisible(hostile: Page) -> None:
    odd = {c for c in hostile.source if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")}
    assert odd <= {"\n", "\t"}


def test_a_long_text_is_cut(hostile: Page) -> None:
    assert "w" * 600 in hostile.words and "w" * 1001 not in hostile.words
    assert "show the rest" in hostile.words


def test_keys_reach_the_download_as_they_are(hostile: Page) -> None:
    good = [f"{i} {text[:300]}" for i, text in enumerate(HOSTILE) if i % 5 != 4]
    assert sorted(hostile.state["keys"]) == sorted(good)


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_nothing_is_loaded_from_anywhere(which: str, request: pytest.FixtureRequest) -> None:
    found: Page = request.getfixturevalue(which)
    for name, attributes in found.elements:
        for attribute in ("src", "href", "srcset", "action", "data", "xlink:href", "style"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")) or value == "data:,", (
                name
            )
    style, script = found.inside["style"][0], found.inside["script"][1]
    assert set(re.findall(r"url\((.)", style)) <= {"#"} and "@import" not in style
    for word in ("fetch", "XMLHttp", "WebSocket", "sendBeacon", "import(", "innerHTML", "eval(", "http"):
        assert word not in script, word
    assert "secret" not in found.source and "token=1" not in found.source


def test_the_policy_allows_this_style_and_this_script_alone(page: Page) -> None:
    meta = [a for name, a in page.elements if name == "meta" and a.get("http-equiv")]
    policy = dict(part.strip().split(" ", 1) for part in str(meta[0]["content"]).split(";"))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": digest(page.inside["style"][0]),
        "script-src": digest(page.inside["script"][1]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    scripts = [attributes.get("type") for name, attributes in page.elements if name == "script"]
    assert scripts == ["application/json", None]
    names = [name for name, _ in page.elements]
    assert names.index("style") > next(i for i, (_, a) in enumerate(page.elements) if a is meta[0])


def test_images_are_small_jpegs_made_here(tmp_path: Path) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.new("RGB", (900, 300), (200, 30, 30)).save(file, "JPEG", exif=exif, comment=b"secret note")
    data = [file.getvalue(), b"<svg onload=1>", jpeg(1)]
    out = make_folder(tmp_path, score, rows=3, shards=1)
    path = scored_path(out, "00000")
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index("jpg"), "jpg", pa.array(data)), path)
    mark_done(out, done_splits(out)[0].split, {"input": "x"}, {}, [path])
    page = Page(write_report(out).path)
    sources = {str(a["src"]) for name, a in page.elements if name == "img"}
    sizes = set()
    for source in sources:
        raw = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(raw), formats=["JPEG"]) as image:
            sizes.add(image.size)
            assert not image.getexif()
        assert b"secret" not in raw
    assert sizes == {(224, 75), (24, 16)}
    assert "the image cannot be shown: decode_error" in page.words
    assert "of the images to be shown could not be read" in page.words


def without_images(out: Path) -> None:
    """As a run with keep_images: false leaves its shards."""
    for mark in done_splits(out):
        path = scored_path(out, mark.split.id)
        table = pq.read_table(path)
        note = {**json.loads(table.schema.metadata[b"capfilt"]), "images": False}
        kept = table.drop_columns(["jpg"])
        pq.write_table(kept.replace_schema_metadata({"capfilt": json.dumps(note)}), path)
        mark_done(out, mark.split, mark.fingerprint, mark.counts, [path])


def test_images_come_from_the_input_where_the_shards_kept_none(tmp_path: Path) -> None:
    out = make_folder(tmp_path, score)
    with_images = Page(write_report(out).path)
    without_images(out)
    assert [a for a in Page(write_report(out).path).elements if a[0] == "img"] == [
        a for a in with_images.elements if a[0] == "img"
    ]
    (tmp_path / "in" / "00000.parquet").unlink()
    page = Page(write_report(out).path)
    assert 0 < page.classed("missing") < page.classed("thumb")
    assert "the image cannot be read: FileNotFoundError" in page.words


def test_words_become_markup_only_when_they_are() -> None:
    assert tag("p", "<b>", tag("b", "x"), None, title='"\u202e', hidden=True, id=None) == (
        '<p title="&quot;\ufffd" hidden>&lt;b&gt;<b>x</b></p>'
    )
    assert visible("a\n\u00a0b") == "a\n\u00a0b"
    assert visible("\x00" * 500).count("<i") == 1 and "U+0000\u00d7500" in visible("\x00" * 500)
    assert visible("\x00\x01" * 500).count("<i") == 30
    family = "\U0001f468\u200d\U0001f469"
    assert visible(family) == family and "U+200D" in visible("a\u200db")
    assert island({"a": "</script>&\u2028"}) == '{"a": "\\u003c/script\\u003e\\u0026\\u2028"}'
    assert clipped("x" * 300) == f"<bdi>{'x' * 300}</bdi>"
    assert [percent(n, 10000) for n in (0, 1, 10, 9999, 10000)] == [
        "0.0%",
        "<0.1%",
        "0.1%",
        ">99.9%",
        "100.0%",
    ]


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_letters_stand_out_from_what_is_behind_them() -> None:
    themes = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        pairs = [
            (front, back) for front in ("ink", "soft") for back in ("back", "card", "track", "code", "warn")
        ]
        pairs += [
            (front, "card") for front in ("web", "synthetic", "kept", "dropped", "accent", "both", "failed")
        ]
        pairs += [("accent", "back"), ("accent", "on-accent"), ("ink", "none")]
        for front, back in pairs:
            high, low = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)
