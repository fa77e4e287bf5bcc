"""HTML in which every word is escaped unless it is marked as HTML."""

import html
from collections.abc import Iterable

VOID = ("img", "input", "link", "meta")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """``<tag …>children</tag>``.

    Args:
        tag: of the element.
        children: :class:`Html` as it is, lists of children, and anything else as escaped text; None is left out.
        attributes: escaped; ``class_`` and ``for_`` lose their underscore, ``_`` within a name becomes ``-``, True is
            an attribute without a value, None and False none.
    """
    words = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"')
    start = f"<{tag}{''.join(words)}>"
    return Html(start if tag in VOID else f"{start}{joined(children)}</{tag}>")


def joined(children: Iterable[object]) -> Html:
    """Children one after the other."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, list | tuple):
            parts.append(joined(child))
        elif child is not None:
            parts.append(html.escape(str(child)))
    return Html("".join(parts))
