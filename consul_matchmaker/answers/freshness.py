"""Say until when what a watch told is known to be so: one number for all of its topics."""

from __future__ import annotations

import math


class Freshness:
    """What a watch knows: everything it told was still so at `taken_at`, and counts as fresh until
    `fresh_until`.

    One writer, its watch; readers take no lock, as both numbers are one attribute.
    """

    __slots__ = ("span",)

    def __init__(self) -> None:
        self.span = (-math.inf, -math.inf)
        """`taken_at` and `fresh_until`, of one moment."""

    def confirm(self, taken_at: float, fresh_until: float) -> None:
        """Nothing has changed until *taken_at*; that will do until *fresh_until*."""
        before = self.span
        self.span = max(before[0], taken_at), max(before[1], fresh_until)

    def lose(self) -> None:
        """The watch cannot say any more whether something changes."""
        self.span = self.span[0], -math.inf

    @property
    def taken_at(self) -> float:
        return self.span[0]

    @property
    def fresh_until(self) -> float:
        return self.span[1]
