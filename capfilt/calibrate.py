"""Which threshold gives a wanted precision, and how sure that is: pure functions of scores and labels.

N labelled texts of one source, each with the filter's score and whether it is `right`; T thresholds. A text
is kept when its score is at least the threshold, which is the rule of `select`:

    precision(t) = right texts kept / texts kept        what share of the clean set is right
    recall(t)    = right texts kept / right texts       what share of what is right stays
    kept(t)      = texts kept / texts
    noise        = wrong texts / texts                  before filtering
    caught(t)    = wrong texts dropped / wrong texts    what share of what is wrong goes

The labelled texts must be a random sample of the scored texts of their source: then these shares, and the
intervals around them, are those of all its texts. Of a sample that has more of some scores than of others,
precision and recall at a threshold are not those of the corpus. None and NaN scores do not count, as `select`
drops them. Intervals take the texts for independent; several texts of one image are a little less than that.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of all intervals
MIN_LABELS = 50  # labelled texts of a source, below which nothing is calibrated
MIN_KEPT = 20  # labelled texts that a threshold must keep to be chosen, and right ones that there must be
MIN_WRONG = 10  # labelled wrong texts, below which it is not said what share of them the filter catches

Scores = Sequence[float | None] | np.ndarray


@dataclass(frozen=True)
class Labels:
    """Labelled texts of one source. `unsure` and `not_scored` texts were left out."""

    scores: np.ndarray  # [N] P(match)
    right: np.ndarray  # [N] bool
    unsure: int = 0
    not_scored: int = 0


@dataclass(frozen=True)
class Share:
    """A share that was counted, and the interval that its true value lies in."""

    count: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The shares at rising thresholds, each [T]. A share of nothing is NaN."""

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Bands:
    """Intervals around a `Curve`: rows low and high, each [2, T]."""

    precision: np.ndarray
    recall: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What a threshold will do to fresh texts; None where no labelled text can tell."""

    threshold: float
    precision: Share | None
    recall: Share | None
    kept: Share


# ---- shares and their intervals ------------------------------------------------------------------


def share(count: int, total: int, level: float = LEVEL) -> Share:
    """`count` of `total` with the Clopper-Pearson interval (Biometrika 26, 1934).

    It covers the true share with at least probability `level`, also where all or none were counted; the
    bootstrap says +-0 there. Errors: ValueError when it is a share of nothing.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total} is no share; it needs 0 <= count <= total and a total above 0")
    tail = (1 - level) / 2
    low, high = _lowest(count, total, tail), 1 - _lowest(total - count, total, tail)
    return Share(count, total, count / total, low, high)


def _lowest(count: int, total: int, tail: float) -> float:
    """The p at which `count` or more of `total` have the probability `tail`; found by halving."""
    if count == 0:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    j = np.arange(count, total + 1)
    log_ways = log_factorial[total] - log_factorial[j] - log_factorial[total - j]
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        probability = np.exp(log_ways + j * math.log(p) + (total - j) * math.log1p(-p)).sum()
        low, high = (p, high) if probability < tail else (low, p)
    return (low + high) / 2


def threshold_curve(scores: Scores, right: Sequence[bool] | np.ndarray) -> Curve:
    """The shares at every distinct score, by one sort and running sums: O(N log N).

    Errors: ValueError when the lengths differ or nothing is scored.
    """
    values, flags = _scored(scores, right)
    order = np.argsort(values)
    values, flags = values[order], flags[order]
    first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))  # [T] of equal scores
    kept = len(values) - first  # [T] texts at or above
    right_kept = flags.sum() - np.concatenate([[0], np.cumsum(flags)])[first]  # [T]
    all_right = flags.sum() or math.nan
    return Curve(values[first], right_kept / kept, right_kept / all_right, kept / len(values))


def bootstrap_bands(
    scores: Scores,
    right: Sequence[bool] | np.ndarray,
    thresholds: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Bands:
    """Percentile bootstrap intervals (Efron 1979) of the three shares at each of the rising `thresholds`.

    Drawing N rows with replacement is drawing how many fall into each cell (highest threshold reached, right
    or wrong) from a multinomial, so a resample costs T and not N; memory is `resamples` * T * 64 bytes. These
    are intervals at a fixed threshold, for the curve; a resample that keeps no text has no precision.
    """
    values, flags = _scored(scores, right)
    reached = np.searchsorted(thresholds, values, side="right")  # [N] thresholds that keep the row, 0..T
    cells = np.bincount(2 * reached + flags, minlength=2 * (len(thresholds) + 1))
    drawn = np.random.default_rng(seed).multinomial(len(values), cells / len(values), size=resamples)
    drawn = drawn.reshape(resamples, -1, 2)  # [R, T + 1, 2] wrong and right rows by thresholds reached
    above = drawn[:, ::-1].cumsum(1)[:, ::-1]
    kept, right_kept = above[:, 1:].sum(-1), above[:, 1:, 1]  # [R, T]
    with np.errstate(invalid="ignore"):
        shares = (right_kept / kept, right_kept / above[:, :1, 1], kept / len(values))
    edges = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    return Bands(*(np.nanquantile(found, edges, axis=0) for found in shares))


def _scored(scores: Scores, right: Sequence[bool] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, flags = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    if values.shape != flags.shape or values.ndim != 1:
        raise ValueError(
            f"{values.shape} scores for {flags.shape} labels; every labelled text needs one of each"
        )
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError("no labelled text was scored, so there is nothing to calibrate")
    return values[known], flags[known]


# ---- the threshold -------------------------------------------------------------------------------


def predict(scores: Scores, right: Sequence[bool] | np.ndarray, threshold: float) -> Prediction:
    """Precision, recall and kept share at `threshold`, each with its Clopper-Pearson interval."""
    values, flags = _scored(scores, right)
    keep = values >= threshold
    kept, right_kept, all_right = int(keep.sum()), int((keep & flags).sum()), int(flags.sum())
    return Prediction(
        threshold,
        share(right_kept, kept) if kept else None,
        share(right_kept, all_right) if all_right else None,
        share(kept, len(values)),
    )


def threshold_for_precision(
    scores: Scores, right: Sequence[bool] | np.ndarray, wanted: float, *, min_kept: int = MIN_KEPT
) -> Prediction | None:
    """The smallest threshold whose precision among the labelled texts is at least `wanted`, None without one.

    Thresholds that keep fewer than `min_kept` labelled texts are not considered. The interval of the
    precision is for the true one of fresh texts at this threshold, that is of infinitely many; a count on m
    fresh kept texts scatters around the true one by another sqrt(p (1 - p) / m).

    Choosing a threshold and measuring it on the same labels is optimistic. Simulated for good, weak and blind
    filters and 100 to 600 labels, at most 5 % of the calibrations gave an interval that missed the true
    precision, so Clopper-Pearson's caution pays for the choice. (A bootstrap that repeats the choice missed
    5 to 20 % for good filters and more for others.) But where the wanted precision is far out of reach, the
    few answers that there are come from luck among the best 20 to 40 texts, and most are false: read
    `precision.total` beside it.
    Errors: ValueError for a precision outside (0, 1], or fewer labels than `too_few` allows.
    """
    if not 0 < wanted <= 1:
        raise ValueError(f"the wanted precision is {wanted}; it is a share, above 0 and at most 1")
    values, flags = _scored(scores, right)
    if reason := too_few(flags):
        raise ValueError(reason)
    curve = threshold_curve(values, flags)
    enough = (curve.precision >= wanted) & (np.rint(curve.kept * len(values)) >= min_kept)
    if not enough.any():
        return None
    at = int(np.argmax(enough))
    below = curve.thresholds[at - 1] if at else -math.inf
    return predict(values, flags, _shortest(float(below), float(curve.thresholds[at])))


def best_precision(
    scores: Scores, right: Sequence[bool] | np.ndarray, *, min_kept: int = MIN_KEPT
) -> Prediction:
    """The highest precision of all thresholds that keep `min_kept` labelled texts: what is in reach at most.

    The best of many estimates flatters. Errors: ValueError when fewer than `min_kept` texts are labelled.
    """
    values, flags = _scored(scores, right)
    curve = threshold_curve(values, flags)
    if len(values) < min_kept:
        raise ValueError(f"{len(values)} labelled texts are fewer than the {min_kept} that must be kept")
    allowed = np.rint(curve.kept * len(values)) >= min_kept
    return predict(values, flags, float(curve.thresholds[np.argmax(np.where(allowed, curve.precision, -1))]))


def too_few(right: np.ndarray) -> str | None:
    """Why this is too little to choose a threshold by, None when it is enough."""
    if len(right) < MIN_LABELS:
        return f"{len(right)} labelled texts are too few, at least {MIN_LABELS} are needed; label more"
    if right.sum() < MIN_KEPT:
        return (
            f"{right.sum()} of {len(right)} labelled texts are right, at least {MIN_KEPT} must be; label more"
        )
    return None


def _shortest(below: float, score: float) -> float:
    """The shortest number above `below` and at most `score`, of two decimals or more; it keeps the same."""
    for digits in range(2, 17):
        rounded = math.floor(score * 10**digits) / 10**digits
        if below < rounded <= score:
            return rounded
    return score


# ---- noise, and a captioner and a filter that agree too well ---------------------------------------


def caught_share(scores: Scores, right: Sequence[bool] | np.ndarray, threshold: float) -> Share | None:
    """The share of the wrong texts that `threshold` drops; None when fewer than MIN_WRONG are labelled."""
    values, flags = _scored(scores, right)
    wrong = values[~flags]
    return share(int((wrong < threshold).sum()), len(wrong)) if len(wrong) >= MIN_WRONG else None


def agreement_alarm(caught: Mapping[str, Share | None], dropped: Mapping[str, float | None]) -> str | None:
    """A sentence when the filter is blind to the captioner's errors, or may be; None when all is well.

    `caught` and `dropped` map 'web' and 'synthetic' to the share of the wrong texts and of all texts that the
    filter drops at 0.5. BLIP saw it happen (paper, section 4.4): its filter dropped 25 % of the captioner's
    texts, but 8 % when captioner and filter shared parameters, and every result became worse. A low share
    alone may also mean a good captioner, so labels decide: alarm when the filter surely catches fewer than
    half of the wrong synthetic texts, or surely a smaller share than of the wrong web texts. 'Surely' means
    that the intervals do not touch. Without such labels it asks for some, when the filter drops less than
    half as large a share of the synthetic texts as of the web texts.
    """
    synthetic, web = caught.get("synthetic"), caught.get("web")
    if synthetic is not None:
        if synthetic.high >= max(0.5, web.low if web is not None else 0.0):
            return None
        beside = f", of the wrong web texts {web.value:.0%}" if web is not None else ""
        return (
            f"captioner and filter agree too well: of {synthetic.total} wrong synthetic texts the filter "
            f"drops {synthetic.value:.0%} ({synthetic.low:.0%} to {synthetic.high:.0%}){beside}. Fine-tune "
            "the two without shared parameters, train the filter on errors like the captioner's, or take "
            "another one; until then do not trust kept synthetic texts"
        )
    few, many = dropped.get("synthetic"), dropped.get("web")
    if few is not None and many is not None and few < many / 2:
        return (
            f"the filter drops {few:.0%} of the synthetic texts and {many:.0%} of the web texts: the "
            "captioner is good, or the two agree too well (BLIP's dropped 25 % of the synthetic texts, but "
            "8 % with shared parameters). Label 100 synthetic texts to tell"
        )
    return None


# ---- labels without a person -----------------------------------------------------------------------


def labels_from_swaps(
    matched: Mapping[str, tuple[str | None, float | None]],
    swapped: Mapping[str, tuple[str | None, float | None]],
) -> Labels:
    """Labels from a clean set: its own texts are right, the text of another image is wrong.

    Both map the key of an image to its text and score; images that only one has are left out. So is a swapped
    text with the words of the image's own text, as it is not wrong. Half of the labels are then wrong, and
    grossly so: the precision is that of a corpus of this kind, and says little about texts that are nearly
    right. Errors: ValueError when the two share less than half of their images.
    """
    shared = [key for key in matched if key in swapped]
    images = len(matched.keys() | swapped.keys())
    if 2 * len(shared) < max(1, images):
        raise ValueError(
            f"the clean set and its swapped twin share {len(shared)} of {images} scored images; score the "
            "same rows twice, once with their own and once with each other's texts"
        )
    wrong = [key for key in shared if _words(swapped[key][0]) != _words(matched[key][0])]
    scores = [matched[key][1] for key in shared] + [swapped[key][1] for key in wrong]
    right = np.arange(len(scores)) < len(shared)
    values = np.asarray(scores, dtype=float)
    known = ~np.isnan(values)
    return Labels(values[known], right[known], not_scored=int((~known).sum()))


def _words(text: str | None) -> list[str]:
    return re.findall(r"\w+", (text or "").casefold())
