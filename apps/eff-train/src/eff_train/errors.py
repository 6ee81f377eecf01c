"""What a user did that cannot work, told apart from faults in code: the first is one line, the second a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """A command cannot do what was asked; the message says why and what to do."""


@contextmanager
def refusing() -> Iterator[None]:
    """A block in which wrong values, wrong files and damaged checkpoints are the user's to mend."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise Refused(str(error)) from error
