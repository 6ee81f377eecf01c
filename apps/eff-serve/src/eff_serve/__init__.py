"""A small, fast, OpenAI-compatible LLM server and command line."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("eff-serve")
