"""Thresholds from labels: shares by hand and by loops, intervals by their definition and by simulation."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.calibrate import (
    Share,
    agreement_alarm,
    best_precision,
    bootstrap_bands,
    caught_share,
    labels_from_swaps,
    predict,
    share,
    threshold_curve,
    threshold_for_precision,
    too_few,
)
from capfilt.select import keep

# ---- a share and its interval --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (8, 10, 0.4439045, 0.9747893),  # binom.test of R
        (5, 20, 0.08657147, 0.49104587),
        (20, 20, 0.025 ** (1 / 20), 1.0),  # closed forms
        (0, 20, 0.0, 1 - 0.025 ** (1 / 20)),
        (1, 1, 0.025, 1.0),
    ],
)
def test_the_interval_of_a_share(count: int, total: int, low: float, high: float) -> None:
    found = share(count, total)
    assert (found.value, found.count, found.total) == (count / total, count, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-7), pytest.approx(high, abs=1e-7))


def binomial(total: int, p: float) -> list[float]:
    return [math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(total + 1)]


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_the_interval_covers_every_true_share_at_least_as_often_as_it_says(level: float) -> None:
    shares = [share(count, 30, level) for count in range(31)]
    for p in np.linspace(0.005, 0.995, 67):
        covered = sum(
            weight
            for weight, found in zip(binomial(30, p), shares, strict=True)
            if found.low <= p <= found.high
        )
        assert covered >= level


def test_large_counts_are_no_problem() -> None:
    found = share(90_000, 100_000)
    normal = 1.959964 * math.sqrt(0.9 * 0.1 / 100_000)
    assert found.low == pytest.approx(0.9 - normal, abs=2e-5)
    assert found.high == pytest.approx(0.9 + normal, abs=2e-5)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_a_share_of_nothing_is_refused(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        share(count, total)


# ---- the curve -----------------------------------------------------------------------------------


def test_the_curve_by_hand() -> None:
    #                     0.9 right, 0.7 right and wrong, 0.4 wrong, 0.2 right
    curve = threshold_curve([0.7, 0.2, 0.9, 0.4, 0.7], [True, True, True, False, False])
    assert curve.thresholds.tolist() == [0.2, 0.4, 0.7, 0.9]
    assert curve.precision.tolist() == [3 / 5, 2 / 4, 2 / 3, 1.0]
    assert curve.recall.tolist() == [1.0, 2 / 3, 2 / 3, 1 / 3]
    assert curve.kept.tolist() == [1.0, 4 / 5, 3 / 5, 1 / 5]


def shares_by_loop(
    scores: Sequence[float | None], right: Sequence[bool], threshold: float
) -> tuple[float, float, float]:
    """(precision, recall, kept) with the rule of `select`, one text after the other."""
    known = [(s, r) for s, r in zip(scores, right, strict=True) if s is not None and not math.isnan(s)]
    kept = [r for s, r in known if keep(s, threshold)]
    all_right = [r for _, r in known if r]
    recall = sum(kept) / len(all_right) if all_right else math.nan
    return sum(kept) / len(kept) if kept else math.nan, recall, len(kept) / len(known)


LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # few, so that they tie
ROWS = st.lists(st.tuples(LEVELS | st.none() | st.just(math.nan), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_the_curve_is_that_of_a_double_loop(rows: list[tuple[float | None, bool]]) -> None:
    scores, right = [score for score, _ in rows], [flag for _, flag in rows]
    known = {score for score in scores if score is not None and not math.isnan(score)}
    if not known:
        with pytest.raises(ValueError, match="no labelled text was scored"):
            threshold_curve(scores, right)
        return
    curve = threshold_curve(scores, right)
    assert curve.thresholds.tolist() == sorted(known)
    for threshold, *found in zip(curve.thresholds, curve.precision, curve.recall, curve.kept, strict=True):
        assert found == pytest.approx(shares_by_loop(scores, right, threshold), nan_ok=True)


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="every labelled text needs one of each"):
        threshold_curve([0.1, 0.2], [True])


# ---- bootstrap -----------------------------------------------------------------------------------


def binomial_quantile(total: int, p: float, at: float) -> int:
    reached = 0.0
    for count, weight in enumerate(binomial(total, p)):
        reached += weight
        if reached >= at:
            return count
    return total


def test_the_kept_share_scatters_like_a_binomial() -> None:
    """Drawing 40 of 40 rows with replacement, of which 10, 24 and 30 are kept, is a binomial each."""
    scores = np.repeat([0.9, 0.6, 0.3, 0.1], [10, 14, 6, 10])
    bands = bootstrap_bands(
        scores, np.arange(40) % 3 > 0, np.array([0.3, 0.6, 0.9]), resamples=20_000, seed=1
    )
    for at, p in enumerate([30 / 40, 24 / 40, 10 / 40]):
        for edge, quantile in ((0, 0.025), (1, 0.975)):
            assert abs(bands.kept[edge, at] * 40 - binomial_quantile(40, p, quantile)) <= 1


def test_the_bands_are_those_of_drawing_rows_one_by_one() -> None:
    rng = np.random.default_rng(3)
    right = rng.random(60) < 0.7
    scores = np.round(rng.random(60) * 0.5 + 0.4 * right, 1)
    at = np.array([0.3, 0.5, 0.7])
    drawn = []
    for _ in range(4000):
        rows = rng.integers(0, 60, 60)
        drawn.append([shares_by_loop(scores[rows].tolist(), right[rows].tolist(), t) for t in at])
    expected = np.nanquantile(drawn, [0.025, 0.975], axis=0)  # [2, T, 3]
    bands = bootstrap_bands(scores, right, at, resamples=4000, seed=4)
    for index, found in enumerate((bands.precision, bands.recall, bands.kept)):
        np.testing.assert_allclose(found, expected[:, :, index], atol=0.03)


def test_bands_repeat_for_a_seed_and_hold_the_curve() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.6
    scores = rng.normal(right, 1)
    curve = threshold_curve(scores, right)
    first = bootstrap_bands(scores, right, curve.thresholds)
    again = bootstrap_bands(scores, right, curve.thresholds)
    other = bootstrap_bands(scores, right, curve.thresholds, seed=1)
    assert np.array_equal(first.recall, again.recall) and not np.array_equal(first.recall, other.recall)
    middle = slice(20, 180)
    for name in ("precision", "recall", "kept"):
        low, high = getattr(first, name)[:, middle]
        assert (low <= getattr(curve, name)[middle]).all() and (getattr(curve, name)[middle] <= high).all()


# ---- the threshold -------------------------------------------------------------------------------


def test_the_threshold_by_hand() -> None:
    """20 right at 0.9, 20 with one wrong at 0.7, 20 wrong at 0.3: 39/40 from 0.7 on, 39/60 from 0.3."""
    scores = [0.9] * 20 + [0.7] * 20 + [0.3] * 20
    right = [True] * 39 + [False] * 21
    found = threshold_for_precision(scores, right, 0.95)
    assert found is not None and found.precision is not None and found.recall is not None
    assert found.threshold == 0.7
    assert (found.precision.count, found.precision.total) == (39, 40)
    assert (found.recall.count, found.recall.total) == (39, 39)
    assert (found.kept.count, found.kept.total) == (40, 60)
    assert found.precision == share(39, 40)
    assert threshold_for_precision(scores, right, 0.6) == predict(scores, right, 0.3)
    exact = threshold_for_precision(scores, right, 0.975)  # 39/40 is enough
    assert exact is not None and exact.threshold == 0.7
    strict = threshold_for_precision(scores, right, 0.98)
    assert strict is not None and strict.threshold == 0.9
    assert threshold_for_precision(scores, right, 0.98, min_kept=21) is None
    assert best_precision(scores, right) == predict(scores, right, 0.9)


def test_the_threshold_is_short_and_keeps_the_same_texts() -> None:
    """Scores are float32; the number is to be typed and read."""
    scores = np.repeat(np.array([0.9, 0.731234, 0.72], dtype=np.float32).astype(float), 20)
    right = [True] * 39 + [False] * 21
    found = threshold_for_precision(scores, right, 0.95)
    assert found is not None and found.threshold == 0.73
    assert found == predict(scores, right, 0.73)
    close = np.repeat([0.9, 0.7312345, 0.7312344], 20)
    found = threshold_for_precision(close, right, 0.95)
    assert found is not None and found.kept.count == 40
    assert 0.7312344 < found.threshold <= 0.7312345


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LEVELS, st.booleans()), min_size=60, max_size=70), st.sampled_from([0.4, 0.6, 0.9]))
def test_the_threshold_is_the_smallest_that_will_do(rows: list[tuple[float, bool]], wanted: float) -> None:
    scores, right = [score for score, _ in rows], [flag for _, flag in rows]
    if too_few(np.array(right)):
        return
    good = []
    for threshold in sorted(set(scores)):
        precision, _, kept = shares_by_loop(scores, right, threshold)
        if precision >= wanted and kept * len(rows) > 19.5:
            good.append(threshold)
    found = threshold_for_precision(scores, right, wanted)
    assert (found is None) == (not good)
    if found is not None:
        kept_rows = [keep(score, found.threshold) for score in scores]
        assert kept_rows == [keep(score, good[0]) for score in scores]


def test_a_threshold_without_sense_or_labels_is_refused() -> None:
    scores, right = [0.5] * 60, [True] * 60
    for wanted in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="wanted precision"):
            threshold_for_precision(scores, right, wanted)
    with pytest.raises(ValueError, match="49 labelled texts are too few, at least 50"):
        threshold_for_precision(scores[:49], right[:49], 0.9)
    with pytest.raises(ValueError, match="19 of 60 labelled texts are right, at least 20"):
        threshold_for_precision(scores, [True] * 19 + [False] * 41, 0.9)
    with pytest.raises(
        ValueError, match="49 labelled texts are too few"
    ):  # what was not scored does not count
        threshold_for_precision([*scores[:49], None, math.nan], right[:51], 0.9)


def test_nothing_kept_has_no_precision() -> None:
    found = predict([0.1, 0.2], [False, False], 0.5)
    assert (found.precision, found.recall, found.kept.count) == (None, None, 0)


# ---- does the interval keep its word on fresh texts? ---------------------------------------------

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def filter_that_sees(share_right: float, distance: float) -> Draw:
    """Scores like those of ITM: two bells, `distance` widths apart, through a steep sigmoid, in float32."""

    def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        right = rng.random(rows) < share_right
        logits = 3 * rng.normal(np.where(right, distance / 2, -distance / 2))
        return (1 / (1 + np.exp(-logits))).astype(np.float32).astype(float), right

    return draw


def calibrations(
    draw: Draw, wanted: float, seeds: range, labels: int = 300
) -> list[tuple[float, float, float]]:
    """(low, high, precision on 10,000 fresh texts) for every seed that finds a threshold."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        prediction = threshold_for_precision(*draw(rng, labels), wanted)
        if prediction is not None and prediction.precision is not None:
            scores, right = draw(rng, 10_000)
            fresh = float(right[scores >= prediction.threshold].mean())
            found.append((prediction.precision.low, prediction.precision.high, fresh))
    return found


def test_the_precision_of_fresh_texts_lies_in_the_interval_for_eight_seeds() -> None:
    for low, high, fresh in calibrations(filter_that_sees(0.6, 2.0), 0.95, range(8)):
        assert low <= fresh <= high
        assert high - low < 0.15  # an interval of everything would cover as well


@pytest.mark.parametrize(
    ("share_right", "distance", "wanted", "labels"),
    [(0.5, 2.0, 0.9, 100), (0.5, 2.0, 0.9, 300), (0.75, 2.0, 0.95, 300), (0.85, 1.0, 0.95, 300)],
)
def test_nominal_95_percent_are_at_least_90(
    share_right: float, distance: float, wanted: float, labels: int
) -> None:
    found = calibrations(filter_that_sees(share_right, distance), wanted, range(200), labels)
    assert len(found) > 100
    assert sum(low <= fresh <= high for low, high, fresh in found) >= 0.9 * len(found)


def test_a_blind_filter_seldom_gets_a_false_promise() -> None:
    """Its precision is 0.85 at any threshold; what it gets for 0.95 is luck, so few may get it."""
    found = calibrations(filter_that_sees(0.85, 0.0), 0.95, range(200))
    assert sum(not low <= fresh <= high for low, high, fresh in found) <= 0.1 * 200


# ---- noise and alarm -----------------------------------------------------------------------------


def test_the_caught_share_counts_wrong_texts_below_the_threshold() -> None:
    scores = [0.1] * 6 + [0.5] * 2 + [0.9] * 4 + [0.2] * 5 + [None]
    right = [False] * 12 + [True] * 5 + [False]
    assert caught_share(scores, right, 0.5) == share(6, 12)
    assert caught_share(scores[3:], right[3:], 0.5) is None  # nine wrong ones


def test_the_alarm_rings_when_wrong_synthetic_texts_pass() -> None:
    dropped = {"web": 0.4, "synthetic": 0.3}
    blind = agreement_alarm({"web": share(90, 100), "synthetic": share(6, 100)}, dropped)
    assert blind is not None and "of 100 wrong synthetic texts" in blind and "drops 6%" in blind
    assert "wrong web texts 90%" in blind
    assert agreement_alarm({"web": share(90, 100), "synthetic": share(88, 100)}, dropped) is None
    less = agreement_alarm({"web": share(95, 100), "synthetic": share(70, 100)}, dropped)
    assert less is not None  # far worse than on web texts
    assert agreement_alarm({"web": None, "synthetic": share(70, 100)}, dropped) is None
    assert agreement_alarm({"synthetic": share(20, 100)}, dropped) is not None  # under half
    assert (
        agreement_alarm({"web": share(9, 10), "synthetic": share(4, 10)}, dropped) is None
    )  # too few to say
    bad_at_both = agreement_alarm({"web": share(10, 100), "synthetic": share(10, 100)}, dropped)
    assert bad_at_both is not None


def test_labels_silence_what_low_shares_alone_would_suspect() -> None:
    dropped = {"web": 0.25, "synthetic": 0.08}
    suspected = agreement_alarm({}, dropped)
    assert suspected is not None and "8% of the synthetic" in suspected and "Label 100" in suspected
    assert agreement_alarm({"synthetic": share(19, 20)}, dropped) is None  # a good captioner
    assert agreement_alarm({}, {"web": 0.25, "synthetic": 0.2}) is None
    assert agreement_alarm({}, {"web": 0.25}) is None
    nothing: dict[str, Share | None] = {"web": None, "synthetic": None}
    assert agreement_alarm(nothing, dropped) == suspected


# ---- labels from a clean set ---------------------------------------------------------------------


def test_own_texts_are_right_and_swapped_ones_wrong() -> None:
    own: dict[str, tuple[str | None, float | None]] = {
        "a": ("A cat.", 0.9),
        "b": ("a cat", 0.8),
        "c": ("a dog", 0.7),
        "d": ("a hat", None),
        "only here": ("a sofa", 0.6),
    }
    texts = {"a": "a hat", "b": "A cat.", "c": "a cat", "d": "a dog"}  # b's is as good as its own
    swapped = {key: (text, 0.1 * at) for at, (key, text) in enumerate(texts.items(), 1)}
    labels = labels_from_swaps(own, swapped)
    assert labels.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.1, 0.3, 0.4])
    assert labels.right.tolist() == [True, True, True, False, False, False]
    assert (labels.unsure, labels.not_scored) == (0, 1)


def test_two_sets_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="share 1 of 4 scored images"):
        labels_from_swaps(
            {"a": ("x", 0.9), "b": ("y", 0.9)}, {"b": ("x", 0.1), "c": ("y", 0.1), "d": ("z", 0)}
        )
    with pytest.raises(ValueError, match="share 0 of 0"):
        labels_from_swaps({}, {})
