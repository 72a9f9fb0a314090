"""The one exception that a user's mistake raises."""

from __future__ import annotations

MAX_MESSAGE = 700
"""Characters; what a file holds is quoted in messages and can be of any length."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: the culprit and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    """Without line breaks, and with control characters written out: terminals act on those."""
    text = " ".join(message.split())
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
