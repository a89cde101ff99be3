"""The report's charts as inline SVG. Places are percents and heights are pixels, so that a chart fits any
width while its letters keep their size. Colours and patterns are classes of report_page.css.
"""

import math
from collections.abc import Mapping, Sequence

from capfilt.report_markup import Html, count, join, percent, tag

HEIGHT = 180  # pixels of a plot, without the numbers below it
_BELOW = 24  # pixels for these
_HEADROOM = 22  # pixels above the highest bar, for the label of the threshold


def histogram(counts: Sequence[int], threshold: float, source: str, title: str) -> Html:
    """Bars over 0..1. All that is left of the threshold is hatched; report_page.js moves both."""
    top, total = max([*counts, 1]), sum(counts)
    at = f"{100 * threshold:.3f}%"
    tall = tag("text", f"tallest bar: {count(top)}", x="100%", y=12, text_anchor="end", class_="soft")
    inside = [
        _hatch(f"hatch-{source}"),
        tag("rect", class_=f"dropped {source}", data_cut="width", x=0, y=0, width=at, height=HEIGHT),
        tag("g", *_bars([n / top for n in counts]), class_=f"bars {source} even"),
        tag("g", *_bars([math.log1p(n) / math.log1p(top) for n in counts]), class_=f"bars {source} log"),
        _cut(at),
        tall,
    ]
    ends = (
        f"{percent(counts[0], total)} of them in the lowest and {percent(counts[-1], total)} in the highest"
    )
    described = f"{title}: {count(total)} scores from 0 to 1, {ends} of {len(counts)} bins"
    return _frame(described, *inside, *_ticks((0, 0.25, 0.5, 0.75, 1)))


def lengths(counts: Sequence[int], source: str, title: str) -> Html:
    """Bars over the number of words, the last one for all longer texts."""
    top, last = max([*counts, 1]), len(counts) - 1
    marks = [
        _label(f"{n}{'+' if n == last else ''}", (n + 0.5) / len(counts), n, last)
        for n in range(0, last + 1, 5)
    ]
    return _frame(title, tag("g", *_bars([n / top for n in counts]), class_=f"bars {source}"), *marks)


def retention(curves: Mapping[str, Sequence[float]], grid: Sequence[float], threshold: float) -> Html:
    """Kept shares over the threshold, one line each; the lines differ in colour and in dashes."""
    lines = [
        tag("polyline", class_=f"curve {name}", points=" ".join(
            f"{100 * t:.2f},{100 - 100 * share:.2f}" for t, share in zip(grid, shares, strict=True)
        ))
        for name, shares in curves.items()
    ]  # fmt: skip
    plot = tag(
        "svg", *lines, viewBox="0 0 100 100", preserveAspectRatio="none", x=0, width="100%",
        y=_HEADROOM, height=HEIGHT - _HEADROOM,
    )  # fmt: skip
    rules = []
    for share in (0.25, 0.5, 0.75, 1.0):
        y = HEIGHT - share * (HEIGHT - _HEADROOM)
        rules.append(tag("line", class_="rule", x1=0, x2="100%", y1=y, y2=y))
        rules.append(tag("text", f"{share:.0%}", x="100%", y=y - 4, text_anchor="end", class_="soft"))
    title = (
        "Kept share of web texts, of synthetic texts and of images over the threshold; the table has it too"
    )
    return _frame(title, *rules, plot, _cut(f"{100 * threshold:.3f}%"), *_ticks((0, 0.25, 0.5, 0.75, 1)))


def parts(counts: Mapping[str, int], title: str) -> Html:
    """One bar that is divided into its parts, each with a class, a pattern and, where it fits, its share."""
    total, left, drawn = max(1, sum(counts.values())), 0.0, []
    for name, number in counts.items():
        width = 100 * number / total
        x = f"{left:.3f}%"
        drawn.append(tag("rect", class_=f"part {name}", x=x, width=f"{width:.3f}%", y=0, height=34))
        if width > 9:
            middle = f"{left + width / 2:.3f}%"
            drawn.append(
                tag("text", f"{width:.0f}%", x=middle, y=22, class_=f"inside {name}", text_anchor="middle")
            )
        left += width
    return tag("svg", tag("title", title), _hatch("hatch-none"), *drawn, class_="parts", width="100%",
               height=34, role="img", aria_label=title)  # fmt: skip


def bar(share: float, kind: str) -> Html:
    """A single bar inside a table; the number stands beside it, so it is hidden from screen readers."""
    filled = tag("rect", class_=f"fill {kind}", width=f"{100 * share:.2f}%", height=12, rx=2)
    track = tag("rect", class_="track", width="100%", height=12, rx=2)
    return tag("svg", track, filled, class_="strip", width="100%", height=12, aria_hidden="true")


def meter(score: float | None, threshold: float, kind: str) -> Html:
    """A score between 0 and 1 with a mark where the threshold is."""
    value = f"{100 * min(1.0, max(0.0, score or 0.0)):.1f}%"
    at = f"{100 * threshold:.1f}%"
    return tag(
        "svg",
        tag("rect", class_="track", width="100%", y=3, height=6, rx=3),
        tag("rect", class_=f"fill {kind}", width=value, y=3, height=6, rx=3),
        tag("line", class_="cut", x1=at, x2=at, y1=0, y2=12),
        class_="meter", width="100%", height=12, aria_hidden="true",
    )  # fmt: skip


def _bars(shares: Sequence[float]) -> list[Html]:
    """Bars side by side, each a share of the full height."""
    width = 100 / len(shares)
    drawn = []
    for i, share in enumerate(shares):
        if share:
            height = round(max(1.5, share * (HEIGHT - _HEADROOM)), 1)  # a single text is still seen
            x, y = f"{i * width + 0.1:.2f}%", round(HEIGHT - height, 1)
            drawn.append(tag("rect", x=x, width=f"{width - 0.2:.2f}%", y=y, height=height))
    return drawn


def _cut(at: str) -> Html:
    return tag("line", class_="cut", data_cut="line", x1=at, x2=at, y1=0, y2=HEIGHT)


def swatch(mark: Html, name: str, *more: str) -> Html:
    """An entry of a legend."""
    drawn = tag("svg", mark, width=28, height=14, aria_hidden="true")
    return tag("li", drawn, " ", name, *more)


def _ticks(places: Sequence[float]) -> list[Html]:
    return [_label(f"{place:g}", place, place, 1) for place in places]


def _label(text: str, place: float, position: float, last: float) -> Html:
    anchor = "start" if position == 0 else "end" if position == last else "middle"
    x = 0.0 if position == 0 else 1.0 if position == last else place
    return tag("text", text, x=f"{100 * x:.1f}%", y=HEIGHT + 17, text_anchor=anchor, class_="soft")


def _hatch(name: str) -> Html:
    line = tag("path", d="M0 7L7 0", class_="hatch-line")
    back = tag("rect", width=7, height=7, class_="hatch-back")
    pattern = tag("pattern", back, line, id=name, width=7, height=7, patternUnits="userSpaceOnUse")
    return tag("defs", pattern)


def _frame(title: str, *inside: Html) -> Html:
    base = tag("line", class_="base", x1=0, x2="100%", y1=HEIGHT, y2=HEIGHT)
    return tag(
        "svg", tag("title", title), join(*inside), base, class_="chart", width="100%",
        height=HEIGHT + _BELOW, role="img", aria_label=title,
    )  # fmt: skip
