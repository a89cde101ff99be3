"""The sections of the report about the run: header, warnings, funnel, errors, speed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from capfilt.report_charts import bar, parts, swatch
from capfilt.report_data import ENDS, Folder
from capfilt.report_health import Health
from capfilt.report_markup import Html, clipped, count, join, percent, table, tag
from capfilt.report_scores import texts_of
from capfilt.select import SOURCES
from capfilt.shards import Done

_END_NAMES = {
    "both": "both texts",
    "web": "the web text only",
    "synthetic": "a synthetic text only",
    "none": "no text",
}
_SLOW_ROWS = 25  # splits in the table of speed
_MANY_ERRORS = 0.05
_MANY_PROMPTS = 0.01
_FEW_UNIQUE, _FEW_TEXTS = 0.5, 20
_FAILED_SHOWN = 20
_FATES = ("kept", "below_threshold", "duplicate_of_web", "duplicate_of_synthetic", "not_scored", "empty")


# ---- header --------------------------------------------------------------------------------------


def tiles(folder: Folder) -> Html:
    """The five numbers to take home."""
    tally = folder.tally
    kept = sum(tally.ends[name] for name in ENDS[:3])
    failed = tally.rows - sum(tally.ends[name] for name in ENDS)
    found = [
        ("rows read", count(tally.rows), count(len(folder.marks), "shard")),
        ("images that keep a text", percent(kept, tally.rows), count(kept, "image")),
        *(
            (f"{source} texts kept", percent(now, of_all), f"{count(now)} of {count(of_all)}")
            for source in SOURCES
            for now, of_all in [(tally.fates[source, "kept"], texts_of(folder, source))]
        ),
        ("rows not usable", percent(failed, tally.rows), count(failed, "row")),
    ]
    items = [
        tag("div", tag("dt", name), tag("dd", tag("b", big), tag("span", small)))
        for name, big, small in found
    ]
    return tag("dl", *items, class_="tiles")


def facts(folder: Folder) -> Html:
    """Which models made this, and how."""
    summary = folder.summary or {}
    config = summary.get("config") or {}
    print_ = summary.get("fingerprint") or (folder.marks[0].fingerprint if folder.marks else {})
    decoding = ", ".join(f"{name} {value}" for name, value in (config.get("decoding") or {}).items())
    rows = [["output folder", str(folder.out)]]
    for name in ("captioner", "filter"):
        where = "/".join(Path(str(config.get(name, ""))).parts[-3:])
        rows.append([name, " ".join(filter(None, [where, f"({str(print_.get(name, 'unknown'))[:12]})"]))])
    rows += [
        ["configuration", str(print_.get("config", "unknown"))[:16]],
        ["captions an image", str(config.get("captions", "unknown"))],
        ["decoding", decoding or "unknown"],
        ["prompt", str(config.get("prompt", "unknown")).strip()],
        ["seed", str(config.get("seed", "unknown"))],
        ["last run took", _duration(summary.get("seconds"))],
    ]
    listed = [tag("div", tag("dt", name), tag("dd", clipped(value))) for name, value in rows]
    return tag("dl", *listed, class_="facts")


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "unknown"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def warnings(folder: Folder, made: Health, unseen: int) -> list[str]:
    """What a person should know before believing the rest. `unseen` images could not be read."""
    tally, found = folder.tally, _unfinished(folder)
    failed = tally.rows - tally.statuses["ok"]
    if not tally.rows:
        found.append("No row has been scored yet.")
    elif failed > _MANY_ERRORS * tally.rows:
        found.append(f"{percent(failed, tally.rows)} of the rows could not be scored; see the errors below.")
    unique, prompted = (percent(n, made.texts) for n in (made.unique, made.prompted))
    if made.texts >= _FEW_TEXTS and made.unique < _FEW_UNIQUE * made.texts:
        found.append(f"Only {unique} of the synthetic captions are unique: the captioner repeats itself.")
    if made.prompted > _MANY_PROMPTS * made.texts:
        found.append(f"{prompted} of the synthetic captions begin with the prompt.")
    found += [
        f"No {source} text is kept at this threshold."
        for source in SOURCES
        if texts_of(folder, source) and not tally.fates[source, "kept"]
    ]
    if unseen:
        found.append(f"{count(unseen)} of the images to be shown could not be read.")
    return found


def _unfinished(folder: Folder) -> list[str]:
    """What the folder lacks, and what in it does not belong together."""
    found, summary = [], folder.summary or {}
    done = len(folder.marks) + len(folder.incomplete)
    if folder.summary is None:
        found.append(f"The run is unfinished: {count(done, 'shard')} done so far.")
    elif (summary.get("splits"), summary.get("done")) != (done, done):
        planned = count(summary.get("splits", 0))
        found.append(
            f"The run is unfinished: {count(done, 'shard')} done, of {planned} that the last run to end "
            "had planned; run make capfilt again to go on."
        )
    elif folder.writing:
        found.append("The run is unfinished: a shard is being written, or its worker was killed.")
    failed = list((summary.get("failed") or {}).items())
    found += [f"The shard {split} failed: {reason}" for split, reason in failed[:_FAILED_SHOWN]]
    if len(failed) > _FAILED_SHOWN:
        found.append(f"{count(len(failed) - _FAILED_SHOWN, 'shard')} more failed; summary.json lists them.")
    if folder.incomplete:
        left_out = f"{count(len(folder.incomplete), 'shard')} left out, {folder.incomplete[0]} first"
        found.append(f"{left_out}: the file is gone or not as it was written; run make capfilt again.")
    prints = [{k: v for k, v in mark.fingerprint.items() if k != "input"} for mark in folder.marks]
    if any(other != prints[0] for other in prints):
        found.append("The shards were made by different models or configurations.")
    return found


# ---- funnel --------------------------------------------------------------------------------------


def funnel(folder: Folder) -> Html:
    """From rows to kept images, and the parts that add up to all rows."""
    tally = folder.tally
    usable = sum(tally.ends[name] for name in ENDS)
    kept = usable - tally.ends["none"]
    stages = [
        ("rows read", tally.rows),
        ("images decoded", usable),
        ("images captioned", tally.captioned),
        ("images that keep a text", kept),
    ]
    rows = [
        [name, bar(n / max(1, tally.rows), "plain"), count(n), percent(n, tally.rows)] for name, n in stages
    ]
    parts_ = {name: tally.ends[name] for name in ENDS} | {"failed": tally.rows - usable}
    names = _END_NAMES | {"failed": "nothing, it could not be used"}
    title = "What an image keeps: " + ", ".join(f"{names[name]} {count(n)}" for name, n in parts_.items())
    legend = [
        swatch(tag("rect", class_=f"part {name}", width=28, height=14), names[name], " ", tag("b", count(n)))
        for name, n in parts_.items()
    ]
    sum_ = " + ".join(count(n) for n in parts_.values())
    return join(
        table(["stage", "", "rows", "share"], rows, "From rows to images that keep a text", numbers=2),
        tag("h3", "What an image keeps"),
        parts(parts_, title) if tally.rows else None,
        tag("ul", *legend, class_="legend"),
        tag("p", f"{sum_} = {count(tally.rows, 'row')}", class_="note sum"),
        _fates(folder),
    )


def _fates(folder: Folder) -> Html:
    tally = folder.tally
    others = sorted({fate for _, fate in tally.fates} - set(_FATES))
    names = [name for name in (*_FATES, *others) if any(tally.fates[source, name] for source in SOURCES)]
    rows = [
        [source, *(count(tally.fates[source, name]) for name in names),
         count(sum(tally.fates[source, name] for name in names))]
        for source in SOURCES
    ]  # fmt: skip
    head = ["texts", *(name.replace("_", " ") for name in names), "sum"]
    return table(head, rows, "What became of every text", numbers=len(head) - 1)


# ---- errors and speed ----------------------------------------------------------------------------


def errors(folder: Folder) -> Html:
    tally = folder.tally
    bad = [(status, n) for status, n in tally.statuses.most_common() if status != "ok"]
    if not bad:
        return tag("p", "Every row was scored.", class_="empty")
    rows = [
        [status.replace("_", " "), bar(n / tally.rows, "plain"), count(n), percent(n, tally.rows)]
        for status, n in bad
    ]
    examples = [
        tag("div", tag("h3", status.replace("_", " ")), tag("ul", *(
            tag("li", tag("bdi", key[:120], class_="key"), ": ", clipped(reason))
            for key, reason in tally.errors[status].items
        )))
        for status, _ in bad
    ]  # fmt: skip
    return join(
        table(["reason", "", "rows", "share"], rows, "Rows that were not scored, by reason", numbers=2),
        tag("details", tag("summary", "examples of each reason"), tag("div", *examples, class_="examples")),
    )


def speed(marks: Sequence[Done]) -> Html:
    """Rows a second of every shard, the slowest first."""
    known = [(mark, rate) for mark in marks if (rate := _rate(mark)) is not None]
    if not known:
        return tag("p", "No shard says how long it took.", class_="empty")
    rates, seconds = sorted(rate for _, rate in known), sum(mark.counts["seconds"] for mark, _ in known)
    slowest = sorted(known, key=lambda pair: (pair[1], pair[0].split.id))[:_SLOW_ROWS]
    rows = [
        [mark.split.id, bar(rate / rates[-1], "plain"), count(mark.counts["rows"]),
         f"{mark.counts['seconds']:.1f}", f"{rate:.1f}"]
        for mark, rate in slowest
    ]  # fmt: skip
    said = (
        f"{count(len(known), 'shard')} in {_duration(seconds)} of work; a worker did {rates[0]:.1f} to "
        f"{rates[-1]:.1f} rows a second, {median(rates):.1f} in the median."
    )
    shown = "The shards" if len(known) <= _SLOW_ROWS else f"The {_SLOW_ROWS} slowest shards"
    return join(
        tag("p", said), table(["shard", "", "rows", "seconds", "rows a second"], rows, shown, numbers=3)
    )


def _rate(mark: Done) -> float | None:
    rows, seconds = mark.counts.get("rows"), mark.counts.get("seconds")
    if not isinstance(rows, int) or not isinstance(seconds, int | float) or seconds <= 0:
        return None
    return rows / seconds
