"""How texts that come from elsewhere are shown: control characters escaped, secrets left out."""

from __future__ import annotations

import re

SHOWN_LENGTH = 200
"""Of a foreign text in an error: enough for each of Consul's own."""
_SHORTEST_PART = 4
"""Parts of a secret that are shorter tell nobody anything, and are in every text."""


# What is between user and host, in a query, or long and made of what tokens are made of.
_LIKE_A_TOKEN = re.compile(r"@|://|[?=&]|[A-Za-z0-9+/_~-]{16}")


def quoted(value: object) -> str:
    """*value* in quotes, for an error that repeats what somebody gave; unless that looks as if a
    token had come to the wrong place."""
    text = repr(value)
    if _LIKE_A_TOKEN.search(text):
        return "what was given (not shown: it may hold a token)"
    return escaped_line(text[:SHOWN_LENGTH])


def escaped(text: str) -> str:
    """*text* without anything that steers a terminal, a log or a line: ESC is ``\\x1b``.

    So are newlines, other control and format characters, and what is no character at all; the
    backslash is doubled, so that two texts never look the same.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escaped, text))


def escaped_word(text: str) -> str:
    """The same, and spaces as well: for what stands alone, or between spaces, in a line."""
    return escaped(text).replace(" ", "\\x20")


def escaped_line(text: str) -> str:
    """The same as `escaped`, for a sentence of ours: its backslashes stay as they are."""
    return text if text.isprintable() else "".join(c if c == "\\" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def without_secret(text: str, secret: str | None) -> str:
    """*text* with ``***`` for *secret*, and for every part of it of four characters or more."""
    if not secret:
        return text
    size = min(_SHORTEST_PART, len(secret))
    parts = {secret[start : start + size] for start in range(len(secret) - size + 1)}
    is_secret = [False] * len(text)
    for start in range(len(text) - size + 1):
        if text[start : start + size] in parts:
            is_secret[start : start + size] = [True] * size
    shown = []
    for place, character in enumerate(text):
        if not is_secret[place]:
            shown.append(character)
        elif not place or not is_secret[place - 1]:
            shown.append("***")
    return "".join(shown)
