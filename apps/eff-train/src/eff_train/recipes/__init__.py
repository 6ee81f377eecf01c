"""One readable file per recipe; each assigns its class to ``RECIPE``."""
