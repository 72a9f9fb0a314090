"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: the culprit and the mend."""
