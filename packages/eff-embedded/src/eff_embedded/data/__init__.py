"""Data and small models from registry packages."""
