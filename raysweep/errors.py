"""What a user is told in one line: a mistake, or a storage that fails."""

from __future__ import annotations

MAX_MESSAGE = 700
"""Characters; what a file holds is quoted in messages and can be of any length."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: the culprit and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class StorageError(UserError):
    """A storage failed for longer than could be waited for: the same call may work later."""


def _one_line(message: str) -> str:
    """Without line breaks, and with control characters written out: terminals act on those."""
    text = " ".join(message.split())
    if len(text) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


OF_THE_SEARCH = ("cmaes", "optuna", "ray", "tokenizers", "torch")
"""Packages that `pip install raysweep` alone does not bring."""


def needs_search(error: ModuleNotFoundError, what: str) -> str | None:
    """What to say where `what` (a command, a function) lacks a package that the search needs; None
    where another one is missing."""
    package = (error.name or "").partition(".")[0]
    if package not in OF_THE_SEARCH:
        return None
    return f"{what} needs {package}, which is not installed: pip install 'raysweep[search]'"
