"""Counts of a run that add up: rows by status, texts, and histograms of the scores."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capfilt.schema import Row, Scores

BINS = 50  # of a score histogram, over 0..1


@dataclass
class Stats:
    """Sums over rows; `a += b` adds two. Histograms hold counts of ITM scores in 50 equal bins of 0..1."""

    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    web_texts: int = 0
    synthetic_texts: int = 0
    web: list[int] = field(default_factory=lambda: [0] * BINS)
    synthetic: list[int] = field(default_factory=lambda: [0] * BINS)
    seconds: float = 0.0  # of work, over all workers

    def add(self, rows: Sequence[Row], scores: Sequence[Scores]) -> None:
        self.rows += len(rows)
        self.statuses.update(score.status for score in scores)
        web = [score.itm_web for score in scores if score.itm_web is not None]
        synthetic = [itm for score in scores for itm in score.itms if itm is not None]
        self.web_texts += len(web)
        self.synthetic_texts += len(synthetic)
        _count(self.web, web)
        _count(self.synthetic, synthetic)

    def __iadd__(self, other: "Stats") -> "Stats":
        self.rows += other.rows
        self.statuses.update(other.statuses)
        self.web_texts += other.web_texts
        self.synthetic_texts += other.synthetic_texts
        self.web = [a + b for a, b in zip(self.web, other.web, strict=True)]
        self.synthetic = [a + b for a, b in zip(self.synthetic, other.synthetic, strict=True)]
        self.seconds += other.seconds
        return self

    @property
    def errors(self) -> int:
        return self.rows - self.statuses["ok"]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "statuses": dict(sorted(self.statuses.items()))}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Stats":
        return Stats(**{**value, "statuses": Counter(value["statuses"])})


def kept_share(histogram: Sequence[int], threshold: float) -> float:
    """Share of the scores at or above a threshold, as finely as the bins allow; 0 when there is no score."""
    first = round(threshold * BINS)
    return sum(histogram[first:]) / max(1, sum(histogram))


def _count(histogram: list[int], scores: Iterable[float]) -> None:
    for score in scores:
        if score == score:  # not NaN
            histogram[min(BINS - 1, int(score * BINS))] += 1
