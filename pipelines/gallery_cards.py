"""One card for each example of the gallery: what was asked, what the model said, what is right."""

from collections.abc import Mapping

from capfilt.report_images import SIDE
from capfilt.report_markup import Html, clipped, count, join, picture, short, tag
from pipelines.gallery_data import Answered, Captioned, Example, Query

Images = Mapping[str, bytes | str]
_ENOUGH = 0.5  # accuracy from which an answer is marked as right: two of ten people gave it


def card(example: Example, images: Images) -> Html:
    if isinstance(example, Captioned):
        return _caption(example, images)
    return _answer(example, images) if isinstance(example, Answered) else _query(example, images)


def _caption(example: Captioned, images: Images) -> Html:
    said = [
        tag("p", "Caption", class_="source web"),
        tag("div", clipped(example.caption) if example.caption.strip() else "no word", class_="words"),
        _fact("CIDEr-D", f"{100 * example.score:.1f}") if example.score is not None else None,
    ]
    return _beside(example.key, images, tag("div", *said, class_="text is-open"), _people(example.references))


def _people(texts: tuple[str, ...]) -> Html:
    if not texts:
        return tag("p", "Nobody described it.", class_="note")
    return tag(
        "div",
        tag("p", "People wrote", class_="source people"),
        tag("ul", *(tag("li", clipped(text)) for text in texts), class_="told"),
    )


def _answer(example: Answered, images: Images) -> Html:
    right = example.score is not None and example.score >= _ENOUGH
    edge = "is-open" if example.score is None else "is-kept" if right else "is-dropped"
    said = [
        tag("p", "Answer", class_="source web"),
        tag("div", clipped(example.answer) if example.answer.strip() else "no word", class_="words"),
        _mark(right, f"accuracy {100 * example.score:.0f}%") if example.score is not None else None,
    ]
    given = [
        tag("li", clipped(one.text), _times(one.weight * example.people))
        for one in sorted(example.question.answers, key=lambda one: (-one.weight, one.text))
    ]
    people = join(tag("p", "People answered", class_="source people"), tag("ul", *given, class_="told"))
    return _beside(
        example.key,
        images,
        tag("div", clipped(example.question.question), class_="asked"),
        tag("div", *said, class_=f"text {edge}"),
        tag("div", people) if given else tag("p", "Nobody's answer is known.", class_="note"),
    )


def _times(people: float) -> str:
    return f" \u00d7{round(people)}" if people > 1.5 else ""


def _query(example: Query, images: Images) -> Html:
    what = "first right text" if example.text is None else "right image"
    place = f"place {count(example.rank + 1)} of {count(example.of)}"
    first = _mark(example.rank == 0, f"{what}: {place}")
    if example.text is None:
        found = [_row(hit.right, clipped(hit.text or "")) for hit in example.top]
        missed = None if any(hit.right for hit in example.top) else _people(example.truth)
        return _beside(example.key, images, first, tag("ol", *found, class_="found"), missed)
    tiles = [_tile(i, hit.right, hit.key, images) for i, hit in enumerate(example.top)]
    if not any(hit.right for hit in example.top):
        tiles.append(_tile(example.rank, True, example.key, images))
    return tag(
        "li",
        tag("div", clipped(example.text), class_="asked"),
        first,
        tag("ol", *tiles, class_="tiles-found"),
        class_="card wide-card",
    )


def _row(right: bool, words: Html) -> Html:
    said = tag("span", "right: " if right else "wrong: ", class_="unseen")
    return tag("li", _sign(right), " ", said, words, class_="right" if right else "wrong")


def _tile(place: int, right: bool, key: str, images: Images) -> Html:
    said = tag("span", ", right" if right else ", wrong", class_="unseen")
    return tag(
        "li",
        _image(key, images),
        tag("p", _sign(right), " ", count(place + 1), said),
        class_="right" if right else "wrong",
    )


def _beside(key: str, images: Images, *words: Html | None) -> Html:
    """An image, words below it, and its key."""
    return tag(
        "li",
        _image(key, images),
        tag("div", *words, class_="texts"),
        tag("p", tag("bdi", short(key), class_="key"), class_="where"),
        class_="card",
    )


def _image(key: str, images: Images) -> Html:
    return picture(images.get(key, "the image was not found"), f"test image {short(key)}", SIDE)


def _fact(name: str, value: str) -> Html:
    return tag("p", name, " ", tag("b", value), class_="fact")


def _mark(right: bool, words: str) -> Html:
    return tag("p", _sign(right), " ", words, class_=f"decision {'kept' if right else 'dropped'}")


def _sign(right: bool) -> Html:
    """For the eye; words beside it say the same to a screen reader."""
    return tag("span", "\u2713" if right else "\u2717", class_="mark", aria_hidden="true")
