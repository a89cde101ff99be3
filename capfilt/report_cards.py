"""Rows that a person can look at: the galleries, and the sample to be judged."""

from collections.abc import Mapping, Sequence

from capfilt.report_charts import meter
from capfilt.report_data import BORDER, GALLERIES, Folder, Pair, Told
from capfilt.report_images import SIDE, Place
from capfilt.report_markup import Html, clipped, count, join, picture, short, tag

Images = Mapping[Place, bytes | str]
SOURCE_NAMES = {"web": "Web text", "synthetic": "Synthetic text"}
_TITLES = {  # of GALLERIES: name, what is in it
    "dropped_web": ("Dropped web", "The web text scores below the threshold."),
    "kept_web": ("Kept web", "The web text is kept."),
    "dropped_synthetic": ("Dropped synthetic", "The best synthetic text scores below the threshold."),
    "kept_synthetic": ("Kept synthetic", "The best synthetic text is kept."),
    "both_dropped": ("Both dropped", "Every text of the image scores below the threshold."),
    "borderline": ("Borderline", f"A score less than {BORDER:g} from the threshold, nearest first."),
    "disagreement": ("Biggest disagreement", "The two texts of an image score most differently."),
}
_MARKS = {"kept": "\u2713", "empty": "\u2013"}  # all other fates are a cross
_REASONS = {
    "empty": "there is no text",
    "not_scored": "dropped: it was not scored",
    "not_wanted": "dropped: texts of this source are not wanted",
    "duplicate_of_web": "dropped: the same words as the web text",
    "duplicate_of_synthetic": "dropped: the same words as another synthetic text",
}


def galleries(folder: Folder, images: Images) -> Html:
    """One panel a stratum, below each other; report_page.js makes tabs of them."""
    tally, plan = folder.tally, folder.tally.plan
    panels = []
    for name in GALLERIES:
        title, meaning = _TITLES[name]
        pairs, of_all = tally.galleries[name].items, tally.strata[name]
        chosen = "" if len(pairs) == of_all else f", drawn at random with seed {plan.seed}"
        if name in ("borderline", "disagreement"):
            chosen = ""
        shown = f"{meaning} {count(len(pairs))} of {count(of_all, 'such row')}{chosen}."
        cards = [_card(pair, images, plan.threshold) for pair in pairs]
        inside = (
            tag("ul", *cards, class_="cards") if pairs else tag("p", "There is no such row.", class_="empty")
        )
        panels.append(
            tag(
                "section",
                tag("h3", title, " ", tag("span", count(of_all), class_="badge")),
                tag("p", shown, class_="note"),
                inside,
                id=f"gallery-{name}",
                data_tab=title,
                data_count=count(of_all),
                class_="panel",
            )
        )
    return tag("div", *panels, data_tabs="galleries", aria_label="Galleries")


def judging(folder: Folder, images: Images) -> tuple[Html, list[str]]:
    """The cards to be judged, and the key of each, in their order. Scores are folded away."""
    pairs = folder.tally.judge.unique
    cards = [_card(pair, images, folder.tally.plan.threshold, place=i) for i, pair in enumerate(pairs)]
    inside = (
        tag("ul", *cards, class_="cards") if pairs else tag("p", "There is no row to judge.", class_="empty")
    )
    return inside, [pair.key for pair in pairs]


def shown_pairs(folder: Folder) -> list[Pair]:
    """Every row whose image the page needs."""
    tally = folder.tally
    return [*tally.judge.unique, *(pair for sample in tally.galleries.values() for pair in sample.items)]


def _card(pair: Pair, images: Images, threshold: float, place: int | None = None) -> Html:
    """`place` is the card's number among those to be judged, None for a card of a gallery."""
    best = pair.synthetic[:1] or (Told("synthetic", None, None, "empty"),)
    blocks = [_text_block(pair, told, threshold, place) for told in (pair.web, *best)]
    where = " \u00b7 ".join([f"row {pair.row} of {pair.split}", *([pair.host] if pair.host else [])])
    return tag(
        "li",
        _figure(pair, images),
        tag("div", *blocks, _others(pair.synthetic[1:], threshold, place), class_="texts"),
        tag("p", tag("bdi", short(pair.key), class_="key"), " ", tag("bdi", short(where)), class_="where"),
        class_="card",
    )


def _figure(pair: Pair, images: Images) -> Html:
    image = images.get((pair.split, pair.row), "the image was not found")
    return picture(image, f"image of the row {short(pair.key)}", SIDE)


def _text_block(pair: Pair, told: Told, threshold: float, place: int | None) -> Html:
    words = tag("p", clipped(told.text), class_="words") if told.text and told.text.strip() else None
    decided = _decision(told, threshold)
    if place is not None:
        folded = tag("details", tag("summary", "score and decision"), decided, class_="score")
        decided = join(_buttons(pair, told, place) if words else None, folded)
    edge = "is-open" if place is not None else "is-kept" if told.fate == "kept" else "is-dropped"
    return tag(
        "div",
        tag("p", SOURCE_NAMES[told.source], class_=f"source {told.source}"),
        words or tag("p", "no text", class_="words empty"),
        decided,
        class_=f"text {edge}",
    )


def _decision(told: Told, threshold: float) -> Html:
    kind = "kept" if told.fate == "kept" else "dropped" if told.text else "absent"
    return join(
        tag(
            "p",
            tag("span", _MARKS.get(told.fate, "\u2717"), class_="mark", aria_hidden="true"),
            " ",
            decision_words(told, threshold),
            class_=f"decision {kind}",
        ),
        None if told.itm is None else meter(told.itm, threshold, told.source),
    )


def decision_words(told: Told, threshold: float) -> str:
    """What became of a text and why, with as many digits as it takes to tell score and threshold apart."""
    if told.itm is None or told.fate not in ("kept", "below_threshold"):
        return _REASONS.get(told.fate, told.fate)
    score, limit = next(
        (a, b)
        for digits in range(2, 18)
        if (a := f"{told.itm:.{digits}f}") != (b := f"{threshold:.{digits}f}")
        or told.itm == threshold
        or digits == 17
    )
    if told.fate == "kept":
        return f"kept: {score} \u2265 {limit}"
    return f"dropped: {score} < {limit}"


def _others(told: Sequence[Told], threshold: float, place: int | None) -> Html | None:
    """The captions that are not the best."""
    if not told:
        return None
    items = [
        tag("li", clipped(other.text or ""), " ", _decision(other, threshold) if place is None else None)
        for other in told
    ]
    return tag("details", tag("summary", f"{count(len(told), 'synthetic text')} more"), tag("ul", *items))


def _buttons(pair: Pair, told: Told, place: int) -> Html:
    """Hidden until report_page.js, without which they do nothing, shows them."""
    named = f"Does the {SOURCE_NAMES[told.source].lower()} describe the image of {short(pair.key)}?"
    words = {"keep": "\u2713 keep", "drop": "\u2717 drop", "unsure": "? unsure"}
    buttons = [
        tag("button", label, type="button", data_verdict=word, data_source=told.source, data_row=place,
            aria_pressed="false")
        for word, label in words.items()
    ]  # fmt: skip
    return tag("div", *buttons, class_="verdicts", role="group", aria_label=named, hidden=True)
