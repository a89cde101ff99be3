"""A CapFilt output folder with pictures and hostile words, and the report page taken apart, for tests."""

import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hostile_files import shard
from image_files import jpeg
from scored_folder import score_shards

from capfilt.schema import Row, Scores
from capfilt.shards import done_splits

HOSTILE = [
    "<img src=x onerror=\"window.hacked='img'\">",
    "</script><script>window.hacked='script'</script>",
    "</style><style>body{display:none}</style>",
    '"><svg onload=window.hacked=1>',
    "<!--<script>",
    "' autofocus onfocus=window.hacked=1 x='",
    "javascript:window.hacked=1",
    "paypal\u202egpj.exe",
    "zero\u200bwidth\u2066iso\u2069\ufefflate",
    "\x1b]0;owned\x07\x1b[31mred\x1b[0m nul\x00 c1\x9b31m",
    "[/bold] {{7*7}} ${7*7} $policy %s",
    "line\u2028separator\u2029s",
    "long " + "w" * 5000,
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 and Zalgo a" + "\u0301" * 60,
]


def score(row: Row) -> Scores:
    """Two captions a row; some repeat the web text, some rows have no image, some no caption."""
    i = row.index
    if i % 10 == 7:
        return Scores("decode_error", "the bytes are no image")
    if i % 10 == 8:
        return Scores("caption_error", "the captioner wrote no word", ("", " "), 0.9, 0.1, (0.2, 0.3), (0, 0))
    web = (i * 37 % 101) / 100
    first = row.text if i % 5 == 0 else f"made {i}"
    return Scores(
        "ok", None, (first or "", f"also {i}"), web, 0.1, ((i * 53 % 97) / 96, (i * 11 % 89) / 88), (0, 0)
    )


def make_folder(
    folder: Path,
    score: Callable[[Row], Scores],
    rows: int = 40,
    captions: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    shards: int = 2,
) -> Path:
    """`shards` files of `rows` rows, scored by `score`, into folder/out."""
    for number in range(shards):
        shard(
            folder / "in" / f"{number:05d}.parquet",
            rows,
            jpg=[jpeg(number * rows + i) for i in range(rows)],
            caption=list(captions or [f"web text {number} {i}" for i in range(rows)]),
            key=list(keys or [f"k{number:02d}{i:04d}" for i in range(rows)]),
            url=[f"https://user:secret@host{i}.example.org/a.jpg?token=1" for i in range(rows)],
        )
    score_shards(folder / "in", folder / "out", score)
    return folder / "out"


def finish(out: Path, **changes: Any) -> None:
    """The summary that a run writes at its end."""
    done = len(done_splits(out))
    summary = {"splits": done, "done": done, "failed": {}, "seconds": 12.5, "fingerprint": {}, "config": {}}
    (out / "summary.json").write_text(json.dumps({**summary, **changes}))


class Page(HTMLParser):
    """report.html as a browser's parser sees it: its elements, its words, its tables by their caption."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.inside: dict[str, list[str]] = {"style": [], "script": []}
        self.words = ""
        self._rows: list[list[str]] = []
        self._open = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.inside:
            self.inside[tag].append("")
        elif tag == "caption":
            self._rows = [[""]]
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        if tag == "table":
            self.tables[self._rows[0][0]] = self._rows[1:]
            self._rows = []

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open][-1] += data
            return
        self.words += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data

    @property
    def state(self) -> Any:
        return json.loads(self.inside["script"][0])

    def classed(self, name: str) -> int:
        """How many elements have this class."""
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.elements)
