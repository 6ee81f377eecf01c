"""Diffusion with layouts, heads, insertion and style: one engine under a command line, a server and a web page."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("eff-studio")
