"""Names that the command line and the loader share, apart from anything that is slow to import."""

from collections.abc import Sequence
from pathlib import Path

EYES = "smollm2-eyes"
"""Name under which the embedded model with eyes is asked for."""

EMBEDDED = "SmolLM2-135M-Instruct"
"""Name of the embedded model."""


def model_name(model: str | None) -> str:
    """What requests call a model: its folder's last part, a file without its ending, a name on the hub as it is."""
    if model is None:
        return EMBEDDED
    path = Path(model)
    if path.is_dir():
        return path.name or path.resolve().name
    return path.stem if model.lower().endswith(".gguf") else model


def named_models(given: Sequence[str]) -> list[tuple[str, str]]:
    """Names and places of models that are given as PLACE or NAME=PLACE.

    Raises:
        ValueError: two have one name, or a part is missing.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = model_name(text), text
        if not name or not place or not name.isprintable() or name != name.strip():
            raise ValueError(f"model {text!r}; wanted a folder, a file or a name on the hub, or NAME=one of these")
        if name in found:
            raise ValueError(f"two models are called {name!r}; tell them apart with NAME={place}")
        found[name] = place
    return list(found.items())
