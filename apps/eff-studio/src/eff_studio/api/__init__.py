"""The server: jobs with server-sent events, pictures, and OpenAI's image endpoints."""

from eff_studio.api.app import create_app
from eff_studio.api.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
