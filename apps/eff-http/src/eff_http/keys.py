"""The file with the keys of a server."""

from __future__ import annotations

from pathlib import Path


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line; none without a file.

    Raises:
        ValueError: it cannot be read, or holds no key.
    """
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text("ascii").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the key file cannot be read: {error}") from error
    if not keys:
        raise ValueError(f"{path} holds no key")
    return keys
