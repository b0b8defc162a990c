"""The error that is the user's to mend, and what a command can advise."""

from dataclasses import dataclass


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line: what was got, expected, what to do."""


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """Advice to the user of a command, in words of its own flags and keys; each ends a message."""

    resume: str  # go on with a run that ended early
    weights_only: str  # leave the rest of a checkpoint that does not fit aside
    bad_steps: str  # the loss or its gradient is not finite, step after step
    worker_died: str  # a data loading process died, probably for lack of memory
