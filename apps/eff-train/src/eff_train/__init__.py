"""Training recipes: one readable file each, resumed bit for bit, reported in one page."""
