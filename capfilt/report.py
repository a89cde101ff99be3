"""One page, report.html, that shows a CapFilt output folder to a person: self-contained, offline, safe.

The data is hostile. Nothing of it becomes markup (`report_markup`), images are decoded by the safe gate and
encoded anew, and the page's own policy allows one script and one style, by hash, and no connection at all.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from capfilt.report_cards import galleries, judging, shown_pairs
from capfilt.report_data import Folder, Plan, chosen_threshold, read_folder
from capfilt.report_health import Health, health
from capfilt.report_images import thumbnails
from capfilt.report_markup import Html, island, join, policy, tag
from capfilt.report_scores import (
    command,
    copyable,
    health_section,
    histograms,
    retention_section,
    shown_threshold,
    texts_of,
)
from capfilt.report_sections import errors, facts, funnel, speed, tiles, warnings
from capfilt.select import SOURCES
from capfilt.shards import replacing

PAGE, STYLE, SCRIPT = (Path(__file__).with_name(f"report_page.{kind}") for kind in ("html", "css", "js"))


@dataclass(frozen=True)
class Report:
    """The page that was written. `warnings` are those at its head."""

    path: Path
    rows: int
    bytes: int
    warnings: tuple[str, ...]


def write_report(
    out: Path, *, threshold: float | None = None, per_gallery: int = 20, to_judge: int = 120, seed: int = 0
) -> Report:
    """Write out/report.html: `per_gallery` rows in each gallery and `to_judge` random rows to be judged.

    `threshold` is that of the decisions shown; None is that of the last `select`, or 0.5. The same folder
    gives the same bytes. Errors: ValueError when `out` is no output folder, or a scored shard is damaged.
    """
    plan = Plan(chosen_threshold(out, threshold), per_gallery, to_judge, seed)
    folder = read_folder(out, plan)
    images = thumbnails(out, folder.marks, shown_pairs(folder))
    prompt = str(((folder.summary or {}).get("config") or {}).get("prompt") or "")
    pairs = folder.tally.texts.items
    found = {
        source: health([text for pair in pairs if (text := pair[i])], prompt)
        for i, source in enumerate(SOURCES)
    }
    alarms = warnings(folder, found["synthetic"], sum(isinstance(image, str) for image in images.values()))
    page = _page(folder, images, found, alarms).encode()
    path = out / "report.html"
    with replacing(path) as file:
        file.write(page)
    return Report(path, folder.tally.rows, len(page), tuple(alarms))


def _page(
    folder: Folder,
    images: Mapping[tuple[str, int], bytes | str],
    found: Mapping[str, Health],
    alarms: list[str],
) -> str:
    plan = folder.tally.plan
    cards, keys = judging(folder, images)
    state = _state(folder, keys)
    style, script = STYLE.read_text(encoding="utf-8"), SCRIPT.read_text(encoding="utf-8")
    head = tag("h2", "Warnings") if alarms else None
    told = tag("ul", *(tag("li", alarm) for alarm in alarms)) if alarms else None
    calibrate = command("calibrate", folder.out, "VERDICTS=verdicts.json")
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        policy=policy(style, script),
        style=style,
        script=script,
        state=island(state),
        title=join(f"CapFilt report: {'/'.join(folder.out.parts[-2:])}"),
        threshold=join(shown_threshold(plan.threshold)),
        threshold_of=join(_threshold_of(folder)),
        warnings=tag("section", head, told, class_="warnings") if alarms else Html(""),
        tiles=tiles(folder),
        facts=facts(folder),
        funnel=funnel(folder),
        histograms=histograms(folder),
        retention=retention_section(folder, state),
        galleries=galleries(folder, images),
        judging=cards,
        calibrate=copyable(calibrate, "calibrate-command"),
        health=health_section(folder, found),
        errors=errors(folder),
        speed=speed(folder.marks),
    )


def _threshold_of(folder: Folder) -> str:
    if folder.selected == folder.tally.plan.threshold:
        return "the threshold of the last make select"
    return "no clean shards were selected with it yet"


def _state(folder: Folder, keys: list[str]) -> dict[str, Any]:
    """What report_page.js knows: how much is kept at every threshold, and the keys of the cards to judge."""
    tally = folder.tally
    totals = {source: texts_of(folder, source) for source in SOURCES} | {"rows": tally.rows}
    kept = {what: tally.kept_at(what) for what in totals}
    made_of = [[mark.split.id, mark.fingerprint, mark.files] for mark in folder.marks]
    return {
        "grid": [shown_threshold(t) for t in tally.plan.grid],
        "kept": kept,
        "totals": totals,
        "command": command("select", folder.out, "THRESHOLD="),
        "keys": keys,
        "name": hashlib.sha256(json.dumps([made_of, keys], sort_keys=True).encode()).hexdigest()[:16],
    }
