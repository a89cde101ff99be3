"""Words of strangers -> markup that is safe by construction: what is not `Html` is escaped where it enters.

Characters that cannot be seen, or that turn the direction of their neighbours, are written out by their
number, so that a text cannot pass for another one.
"""

import base64
import hashlib
import json
import unicodedata
from html import escape
from itertools import groupby

SHOWN_CHARS = 300  # of a text; the rest is folded away
KEPT_CHARS = 1_000  # of a text; what is beyond is not on the page
_ODD_RUNS = 30  # characters that a text may have written out; further ones become U+FFFD
_JOINERS = "\u200c\u200d"  # zero-width; they shape letters of Persian, Hindi and emoji, never ASCII
_VOID = ("br", "img", "input", "link", "meta")


class Html(str):
    """Markup that may be written as it is."""


def visible(text: str) -> Html:
    """The text, escaped; odd characters become <i class="odd">U+202E</i>, runs of one of them counted."""
    if text.isprintable():
        return Html(escape(text, quote=True))
    parts, written_out = [], 0
    for character, run in groupby(_with_joiners_marked(text)):
        count = len(list(run))
        if len(character) > 1 or not _is_odd(character):
            parts.append(escape(character[0] * count, quote=True))
        elif written_out == _ODD_RUNS:
            parts.append("\ufffd")
        else:
            written_out += 1
            name = unicodedata.name(character, "control character")
            times = f"\u00d7{count}" if count > 1 else ""
            parts.append(f'<i class="odd" title="{name.lower()}">U+{ord(character):04X}{times}</i>')
    return Html("".join(parts))


def plain(text: str) -> str:
    """The text for an attribute: odd characters become U+FFFD."""
    return escape("".join("\ufffd" if _is_odd(c) else c for c in text), quote=True)


def _with_joiners_marked(text: str) -> list[str]:
    """Its characters; a joiner between characters that it may join is doubled, to pass as it is."""
    found = list(text)
    for i in range(1, len(text) - 1):
        if text[i] in _JOINERS and min(ord(text[i - 1]), ord(text[i + 1])) > 127:
            found[i] = text[i] * 2
    return found


def _is_odd(character: str) -> bool:
    """Control, format, unassigned and private characters; spaces of all widths and line ends are fine."""
    return not character.isprintable() and character not in "\n\t" and unicodedata.category(character) != "Zs"


def tag(name: str, *children: str | None, **attributes: str | int | float | bool | None) -> Html:
    """<name attributes>children</name>. A str is escaped, Html is not, None is left out.

    `class_` is class, `aria_label` aria-label; True is an attribute without value, None and False are none.
    """
    words = [name]
    for key, value in attributes.items():
        word = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(word)
        elif value is not None and value is not False:
            words.append(f'{word}="{plain(str(value))}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in _VOID else f"{opened}{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """The children side by side, escaped like those of `tag`."""
    return Html(
        "".join(
            child if isinstance(child, Html) else visible(child) for child in children if child is not None
        )
    )


def clipped(text: str) -> Html:
    """A text of any length in its own direction: the first 300 characters, up to 1,000 behind a click."""
    if len(text) <= SHOWN_CHARS:
        return tag("bdi", text)
    more = "\u2026 and more" if len(text) > KEPT_CHARS else None
    rest = tag("bdi", text[SHOWN_CHARS:KEPT_CHARS], more)
    return join(
        tag("bdi", text[:SHOWN_CHARS], "\u2026"), tag("details", tag("summary", "show the rest"), rest)
    )


def short(text: str) -> str:
    """A name that may be long, in at most 120 characters."""
    return text if len(text) <= 120 else text[:119] + "\u2026"


def table(head: list[str], rows: list[list[str]], caption: str, *, numbers: int = 0) -> Html:
    """A table whose first column names the row; the last `numbers` columns are set flush right."""
    words = len(head) - numbers

    def cell(position: int, content: str, name: str) -> Html:
        scope = ("col" if name == "th" else None) if position or name == "th" else "row"
        shape = "number" if position >= words else None
        return tag("th" if position == 0 else name, content, scope=scope, class_=shape)

    body = [tag("tr", *(cell(i, content, "td") for i, content in enumerate(row))) for row in rows]
    inside = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(cell(i, content, "th") for i, content in enumerate(head)))),
        tag("tbody", *body),
    )
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=caption)


def picture(image: bytes | str, alt: str, side: int) -> Html:
    """A JPEG of at most `side` pixels a side, as part of the page, or the words why there is none."""
    if isinstance(image, str):
        return tag("div", tag("span", image), class_="thumb missing")
    data = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    # By hand, as `plain` would look at every character of the data.
    without = tag("img", alt=alt, width=side, height=side, decoding="async")
    return tag("div", Html(f'{without[:-1]} src="{data}">'), class_="thumb")


def policy(style: str, script: str | None = None) -> str:
    """Content-Security-Policy: this style, this script, images inside the page, and nothing else."""

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    scripts = "'none'" if script is None else allowed(script)
    return (
        f"default-src 'none'; img-src data:; style-src {allowed(style)}; script-src {scripts}; "
        "base-uri 'none'; form-action 'none'"
    )


def island(value: object) -> Html:
    """JSON for inside a <script> that is data: no character can end the element."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(text)


def count(number: int, noun: str = "") -> str:
    """1,000, and with a noun: 1,000 rows, 1 row."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if noun else f"{number:,}"


def percent(part: float, whole: float) -> str:
    """A share, never rounded to all or nothing."""
    if not whole:
        return "-"
    share = part / whole
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else f"{share:.1%}"
