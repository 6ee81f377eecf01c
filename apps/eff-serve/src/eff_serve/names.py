"""Names that the command line and the loader share, apart from anything that is slow to import."""

EYES = "smollm2-eyes"
"""Name under which the embedded model with eyes is asked for."""
