"""Training recipes: one readable file each, resumed bit for bit, reported in one page."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("eff-train")
