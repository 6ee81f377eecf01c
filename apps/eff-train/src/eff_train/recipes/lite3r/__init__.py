"""Lite3R: a dense multi-view model, and its copy with sparse-linear attention and FP8-aware linear layers."""
