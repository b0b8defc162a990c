"""The error that is the user's to mend."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line: what was got, expected, what to do."""
