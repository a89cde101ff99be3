"""gallery.html: what evaluations got right and wrong, with the images. One file, offline, no script.

Captions, keys and images are of strangers. As on the report of CapFilt, nothing of them becomes markup,
images are decoded by the safe gate and encoded anew, and the page's policy allows one style and nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from capfilt.report import STYLE as REPORT_STYLE
from capfilt.report_markup import Html, clipped, count, join, policy, short, tag
from capfilt.shards import replacing
from pipelines.gallery_cards import card
from pipelines.gallery_data import Group, Shown
from pipelines.results_runs import Evaluation, protocol_of
from pipelines.results_table import scores_of

PAGE, STYLE = (Path(__file__).with_name(f"gallery_page.{kind}") for kind in ("html", "css"))
_TITLES = {"captions": "Captions", "retrieval": "Retrieval", "vqa": "Questions", "zeroshot": "Classes"}
_ORDER = {  # of the examples of a task: what decides
    "captions": "CIDEr-D of the caption against what people wrote, times 100",
    "retrieval": "how many wrong candidates stand before the first right one",
    "vqa": "the accuracy of VQA: how many people gave the same answer",
}


def write_gallery(
    path: Path,
    runs: Sequence[Evaluation],
    shown: Mapping[Path, Shown],
    missing: Mapping[Path, str],
    seed: int,
) -> int:
    """Write the page -> its size in bytes. A folder of `runs` is in `shown`, or in `missing` with why."""
    style = REPORT_STYLE.read_text(encoding="utf-8") + STYLE.read_text(encoding="utf-8")
    names = [f"run-{i}" for i in range(len(runs))]
    links = [tag("a", _heading(run), href=f"#{name}") for name, run in zip(names, runs, strict=True)]
    sections = [
        _section(name, run, shown.get(run.folder), missing.get(run.folder, ""), seed)
        for name, run in zip(names, runs, strict=True)
    ]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        policy=policy(style), style=style, links=join(*links), sections=join(*sections)
    )
    with replacing(path) as file:
        file.write(page.encode())
    return len(page.encode())


def _heading(run: Evaluation) -> str:
    return f"{_TITLES[run.task]}: {short(run.folder.name)}"


def _section(name: str, run: Evaluation, shown: Shown | None, reason: str, seed: int) -> Html:
    head = tag("h2", _heading(run))
    if shown is None:
        none = tag("p", "Nothing to show: ", clipped(reason), class_="note")
        return tag("section", head, _facts(run), none, id=name)
    groups = [(f"{name}-{i}", group) for i, group in enumerate(shown.groups)]
    panels = [_panel(place, group, shown.images, seed) for place, group in groups]
    jumps = [
        tag("p", f"{side}: " if side else None, join(*links), class_="jump")
        for side in dict.fromkeys(group.side for group in shown.groups)
        if (links := [tag("a", one.kind, href=f"#{place}") for place, one in groups if one.side == side])
    ]
    jump = tag("nav", *jumps, aria_label=f"Examples of {_heading(run)}")
    order = tag("p", f"Best and worst by {_ORDER[run.task]}.", class_="note")
    return tag("section", head, _facts(run), order, jump, *panels, id=name)


def _panel(name: str, group: Group, images: Mapping[str, bytes | str], seed: int) -> Html:
    title = f"{group.side}, {group.kind}" if group.side else group.kind.capitalize()
    of_all = f"{count(len(group.examples))} of {count(group.of_all)}"
    drawn = f"{'' if group.kind == 'random' else 'equal ones '}drawn by chance with seed {seed}, one an image"
    said = of_all if len(group.examples) == group.of_all else f"{of_all}, {drawn}"
    cards = [card(example, images) for example in group.examples]
    return tag(
        "section",
        tag("h3", title),
        tag("p", f"{said}.", class_="note"),
        tag("ul", *cards, class_="cards"),
        id=name,
        class_="panel",
    )


def _facts(run: Evaluation) -> Html:
    data = run.found["data"]
    rows = {
        "evaluation": str(run.folder),
        "model": f"{run.model} ({run.weights})",
        "test set": f"{', '.join(data.get('shards') or data['sets'])} ({run.data})",
        "protocol": protocol_of(run),
    }
    for how, scores in scores_of(run):
        rows[how or "scores"] = ", ".join(f"{name} {score:.1f}" for name, score in scores.items()) or "none"
    listed = [tag("div", tag("dt", name), tag("dd", clipped(value))) for name, value in rows.items()]
    return tag("dl", *listed, class_="facts")
