"""The OpenAI-compatible HTTP layer."""

from eff_serve.api.app import create_app
from eff_serve.api.settings import Settings

__all__ = ["Settings", "create_app"]
