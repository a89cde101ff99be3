"""Everything the report page says, read from the scored shards once, without images and in bounded memory.

What is counted is counted over all rows; what is shown is drawn by the hash of (seed, split, row), so that
the same folder gives the same page.
"""

import json
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from capfilt.parquet import open_parquet
from capfilt.report_markup import KEPT_CHARS
from capfilt.schema import SCORED, STATUSES, ShardError, best_caption, is_string, scored_columns, short_reason
from capfilt.select import DEFAULT_THRESHOLD, SOURCES, verdict
from capfilt.shards import Done, done_splits, missing_files, scored_path
from capfilt.stats import BINS

GALLERIES = ("dropped_web", "kept_web", "dropped_synthetic", "kept_synthetic", "both_dropped",
             "borderline", "disagreement")  # fmt: skip
ENDS = ("both", "web", "synthetic", "none")  # which texts a row keeps
BORDER = 0.05  # a score nearer than this to the threshold is borderline
HEALTH_ROWS = 20_000  # rows whose texts are looked at as texts
ERROR_ROWS = 5  # examples of each status
READ_ROWS = 256  # without images; a text has 32,768 characters at most
_REACHED_MODELS = ("ok", "caption_error", "score_error")
_COLUMNS = ("capfilt_key", "capfilt_status", "capfilt_error", "caption_web", "itm_web", "captions_synthetic",
            "itms_synthetic")  # fmt: skip
_NEVER_NULL = ("capfilt_key", "capfilt_status", "captions_synthetic", "itms_synthetic")

Text = tuple[str | None, float | None]  # a text and its ITM score
Rank = tuple[float, int]
T = TypeVar("T")


# ---- what is shown -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A text of a row that is shown. `fate` is 'kept' or a reason of `select`."""

    source: str
    text: str | None  # one character more than KEPT_CHARS shows that there are more
    itm: float | None
    fate: str


@dataclass(frozen=True)
class Pair:
    """A row that is shown. `synthetic` begins with the best."""

    split: str
    row: int  # in its scored shard
    key: str
    status: str
    error: str | None
    host: str | None  # of the image's address, if the shard tells it
    web: Told
    synthetic: tuple[Told, ...]


class Sample(Generic[T]):
    """The `size` items of lowest rank, whatever the order they are offered in. A rank met again is counted.

    With a hash for a rank this is a sample without replacement, with a distance the nearest.
    """

    def __init__(self, size: int):
        self.size = size
        self._ranks: list[Rank] = []
        self._items: dict[Rank, T] = {}
        self._times: Counter[Rank] = Counter()

    def offer(self, rank: Rank, item: T) -> None:
        if rank not in self._items:
            if len(self._ranks) == self.size:
                if not self._ranks or rank > self._ranks[-1]:
                    return
                last = self._ranks.pop()
                del self._items[last], self._times[last]
            insort(self._ranks, rank)
            self._items[rank] = item
        self._times[rank] += 1

    @property
    def items(self) -> list[T]:
        return [self._items[rank] for rank in self._ranks]

    @property
    def unique(self) -> list[T]:
        """The items whose rank was met once."""
        return [self._items[rank] for rank in self._ranks if self._times[rank] == 1]


@dataclass(frozen=True)
class Plan:
    """What to count and how much to show."""

    threshold: float
    per_gallery: int = 20
    to_judge: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it is a probability, from 0 to 1")
        for name in ("per_gallery", "to_judge"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1000")

    @property
    def grid(self) -> list[float]:
        """The thresholds that the slider offers, the chosen one among them."""
        return sorted({*(i / 100 for i in range(101)), self.threshold})


# ---- what is counted -----------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over rows, and the samples. Made by `read_folder`."""

    plan: Plan
    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    captioned: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of ENDS, or the status of rows without an image
    fates: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, 'kept' or why not)
    strata: Counter[str] = field(default_factory=Counter)  # rows that belong to a gallery

    def __post_init__(self) -> None:
        plan = self.plan
        self.scores = {source: [0] * BINS for source in SOURCES}  # histograms, as in `Stats`
        self.kept = {what: np.zeros(len(plan.grid) + 1, int) for what in (*SOURCES, "rows")}
        self.galleries = {name: Sample[Pair](plan.per_gallery) for name in GALLERIES}
        self.judge = Sample[Pair](plan.to_judge)
        self.errors: dict[str, Sample[tuple[str, str]]] = {}
        self.texts = Sample[tuple[str | None, str | None]](HEALTH_ROWS)
        self._grid = np.array(plan.grid)

    def kept_at(self, what: str) -> list[int]:
        """How many texts of a source, or rows, `select` keeps at each threshold of the grid."""
        return [int(n) for n in self.kept[what][::-1].cumsum()[::-1][1:]]

    def add(self, split: str, number: int, row: Mapping[str, Any]) -> None:
        """Count a row and offer it to the samples; `number` is its place in the scored shard of `split`."""
        web: Text = (row["caption_web"], row["itm_web"])
        synthetic: list[Text] = list(zip(row["captions_synthetic"], row["itms_synthetic"], strict=True))
        fates = fates_of(web, synthetic, self.plan.threshold)
        status = row["capfilt_status"] if row["capfilt_status"] in STATUSES else "unknown_status"
        self.rows += 1
        self.statuses[status] += 1
        self.captioned += any(text and text.strip() for text, _ in synthetic)
        self.ends[_end(fates, status)] += 1
        self.fates.update(("web" if i == 0 else "synthetic", fate) for i, fate in enumerate(fates))
        self._count_scores(web, synthetic)
        chance = _hash(self.plan.seed, f"{split}/{number}")
        best = best_caption([itm for _, itm in synthetic])
        made = None if best is None else synthetic[best][0]
        self.texts.offer((0.0, chance), (_cut(web[0]), _cut(made)))
        if status != "ok":
            examples = self.errors.setdefault(status, Sample(ERROR_ROWS))
            examples.offer((0.0, chance), (row["capfilt_key"], row["capfilt_error"] or ""))
            return
        self._show(_pair(split, number, row, web, synthetic, fates), chance)

    def _count_scores(self, web: Text, synthetic: Sequence[Text]) -> None:
        for source, texts in (("web", [web]), ("synthetic", synthetic)):
            for _, itm in texts:
                if itm is not None and itm == itm:
                    self.scores[source][min(BINS - 1, max(0, int(itm * BINS)))] += 1
        for score, change in steps(web, synthetic):
            place = int(np.searchsorted(self._grid, score, side="right"))  # 0: kept at no threshold
            for what, difference in change.items():
                self.kept[what][place] += difference

    def _show(self, pair: Pair, chance: int) -> None:
        best = pair.synthetic[0] if pair.synthetic else Told("synthetic", None, None, "empty")
        ranks: dict[str, float] = {}
        for told in (pair.web, best):
            if told.fate in ("kept", "below_threshold"):
                ranks[f"{'kept' if told.fate == 'kept' else 'dropped'}_{told.source}"] = 0.0
        if {pair.web.fate, *(told.fate for told in pair.synthetic)} == {"below_threshold"} and pair.synthetic:
            ranks["both_dropped"] = 0.0
        scores = [told.itm for told in (pair.web, best) if told.itm is not None]
        near = min((abs(score - self.plan.threshold) for score in scores), default=1.0)
        if near < BORDER:
            ranks["borderline"] = near
        if len(scores) == 2 and scores[0] != scores[1]:
            ranks["disagreement"] = -abs(scores[0] - scores[1])
        for name, rank in ranks.items():
            self.strata[name] += 1
            self.galleries[name].offer((rank, chance), pair)
        if pair.key.strip():  # a verdict names its row by the key alone
            self.judge.offer((0.0, _hash(self.plan.seed, f"judge {pair.key}")), pair)


def fates_of(web: Text, synthetic: Sequence[Text], threshold: float) -> list[str]:
    """'kept', or why not, of the web text and then of each synthetic one: THE RULE, text by text."""
    judged = verdict(web, synthetic, threshold)
    kept, rejected = list(judged.kept), iter(judged.rejected)
    fates = []
    for i, (text, itm) in enumerate([web, *synthetic]):
        source = SOURCES[min(i, 1)]
        if kept and (kept[0].source, kept[0].text, kept[0].itm) == (source, text, itm):
            kept.pop(0)
            fates.append("kept")
        else:
            fates.append(next(rejected).reason)
    return fates


def steps(web: Text, synthetic: Sequence[Text]) -> Iterator[tuple[float, dict[str, int]]]:
    """How the number of kept texts of a row grows as the threshold falls past each of its scores.

    The rule itself is asked at every score, so that duplicates count as `select` counts them.
    """
    scores = {itm for _, itm in (web, *synthetic) if itm is not None and itm == itm}
    before = dict.fromkeys((*SOURCES, "rows"), 0)
    for score in sorted(scores, reverse=True):
        sources = [text.source for text in verdict(web, synthetic, score).kept]
        now = {**{source: sources.count(source) for source in SOURCES}, "rows": int(bool(sources))}
        yield score, {what: now[what] - before[what] for what in now}
        before = now


def _end(fates: Sequence[str], status: str) -> str:
    web, synthetic = fates[0] == "kept", "kept" in fates[1:]
    if web or synthetic:
        return "both" if web and synthetic else "web" if web else "synthetic"
    return "none" if status in _REACHED_MODELS else status


def _pair(
    split: str,
    number: int,
    row: Mapping[str, Any],
    web: Text,
    synthetic: Sequence[Text],
    fates: Sequence[str],
) -> Pair:
    told = [
        Told(SOURCES[min(i, 1)], _cut(text), itm, fates[i]) for i, (text, itm) in enumerate([web, *synthetic])
    ]
    best = best_caption([itm for _, itm in synthetic])
    made = told[1:] if best is None else [told[best + 1], *told[1 : best + 1], *told[best + 2 :]]
    status, error = row["capfilt_status"], row["capfilt_error"]
    host = _host(row.get("url") or row.get("URL"))
    return Pair(split, number, row["capfilt_key"], status, error, host, told[0], tuple(made))


def _cut(text: str | None) -> str | None:
    return text if text is None else text[: KEPT_CHARS + 1]


def _host(url: str | None) -> str | None:
    """Addresses may carry passwords and tokens; the host is enough to know where an image is from."""
    try:
        return urlsplit(url or "").hostname
    except ValueError:
        return None


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}|{name}".encode(), digest_size=8).digest(), "big")


# ---- the folder ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A CapFilt output folder, read. `summary` is that of the last run that ended, None if none did."""

    out: Path
    marks: Sequence[Done]  # of the splits on the page
    incomplete: Sequence[str]  # splits that are left out, as a file of theirs is gone or damaged
    summary: Mapping[str, Any] | None
    selected: float | None  # threshold of the last `select`
    writing: bool  # or killed while it was
    tally: Tally


def last_threshold(out: Path) -> float | None:
    """The threshold of the last `select`, None if there was none."""
    found = _read_json(out / "clean" / "_select.json")
    return None if found is None else float(found["threshold"])


def read_folder(out: Path, plan: Plan) -> Folder:
    """Read all done splits. Errors: ValueError when `out` is no output folder, ShardError for a bad shard."""
    if not any((out / name).exists() for name in ("_done", "scored", "summary.json")):
        raise ValueError(f"{out}: is no output folder of CapFilt; run `make capfilt` with this OUT first")
    tally, marks, incomplete = Tally(plan), [], []
    for mark in done_splits(out):
        if missing_files(out, mark):
            incomplete.append(mark.split.id)
            continue
        marks.append(mark)
        for number, row in enumerate(_rows(scored_path(out, mark.split.id))):
            tally.add(mark.split.id, number, row)
    summary, writing = _read_json(out / "summary.json"), any(out.glob("scored/.*.tmp"))
    return Folder(out, marks, incomplete, summary, last_threshold(out), writing, tally)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a scored shard without images. Errors: ShardError."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
        scored_columns(schema, path)
        for name in _COLUMNS:
            if schema.field(name).type != SCORED.field(name).type:
                raise ShardError(f"{path}: column {name!r} is {schema.field(name).type}; score it again")
        urls = [
            name for name in ("url", "URL") if name in schema.names and is_string(schema.field(name).type)
        ]
        try:
            for batch in file.iter_batches(READ_ROWS, columns=[*_COLUMNS, *urls], use_threads=False):
                if any(batch.column(name).null_count for name in _NEVER_NULL):
                    raise ShardError(f"{path}: has nulls where CapFilt writes none; score it again")
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ShardError(
                f"{path}: cannot be read ({short_reason(error)}); delete it and run `make capfilt` again"
            ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path}: is no JSON ({short_reason(error)}); delete it and make it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; delete it and make it again")
    return found


def chosen_threshold(out: Path, threshold: float | None) -> float:
    """The given one, that of the last `select`, or the paper's."""
    if threshold is not None:
        return threshold
    found = last_threshold(out)
    return DEFAULT_THRESHOLD if found is None else found
