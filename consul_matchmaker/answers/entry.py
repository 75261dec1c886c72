"""What is kept of one topic: what is believed of it, who asks for it, what is under way."""

from __future__ import annotations

from .belief import NEVER, Belief, Rules

Key = str | tuple[str, str]
"""A topic, or a topic and one server of it."""


def key_of(topic: str, server: str | None) -> Key:
    return topic if server is None else (topic, server)


class Entry(Belief):
    """What is believed of a topic, and who asks for it."""

    __slots__ = (
        "asked_at",
        "is_slow",
        "offers",
        "placed_at",
        "question",
        "queued_at",
        "settled_at",
    )

    def __init__(self, topic: str, server: str | None, rules: Rules, now: float) -> None:
        super().__init__(topic, server, rules)
        self.asked_at = now  # by a caller
        self.placed_at = now  # in the order of eviction
        self.settled_at = -NEVER  # when the last answer or failure came
        self.queued_at = NEVER  # when the refresher looks at it; never: it is in no queue
        self.is_slow = False  # whether its last question took longer than `QUICK_SECONDS`
        self.offers = 0  # answers that came from the watcher
        self.question: object = None  # that is on its way

    def start_anew(self, rules: Rules) -> None:
        """In a forked child: only the answer stays."""
        super().start_anew(rules)
        self.queued_at = NEVER
        self.question = None

    @property
    def key(self) -> Key:
        return key_of(self.topic, self.server)
