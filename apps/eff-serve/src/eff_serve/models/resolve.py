"""From what the user wrote after ``--model`` to a folder with a model in it."""

from __future__ import annotations

import re
from pathlib import Path

from eff_serve.models.embedded import NAME, embedded_model

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


class ModelNotFoundError(ValueError):
    """There is no model by that name or at that place, or it cannot be reached."""


def resolve_model(model: str | None) -> tuple[str, Path]:
    """Return the name to serve under and the folder of a model.

    Args:
        model: None for the embedded model, a folder, or a name on the hub such as ``Qwen/Qwen3-0.6B``.

    Raises:
        ModelNotFoundError: with what was looked for and what can be done.
    """
    if model is None or model == NAME:
        return NAME, embedded_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{folder} has no config.json; --model wants a folder in transformers' layout")
        return folder.resolve().name, folder
    if folder.is_file():
        raise ModelNotFoundError(f"{folder} is a file; --model wants a folder in transformers' layout or a hub name")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/")):
        raise ModelNotFoundError(f"there is no folder {model!r}, and it is not a hub name of the form owner/name")
    return model, _from_hub(model)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED))
    except RepositoryNotFoundError as e:
        raise ModelNotFoundError(f"the hub has no model {name!r} that is open to you") from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ModelNotFoundError(
            f"{name!r} is neither a local folder nor in the hub library's cache, and the hub cannot be reached "
            f"({type(e).__name__}). Give a folder, or leave --model out for the embedded model"
        ) from e
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"the hub's {name!r} has no config.json, so it is not a transformers model")
    return folder
