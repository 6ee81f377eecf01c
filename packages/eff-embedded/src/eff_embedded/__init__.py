"""Real models and data without a download: small models from packages, generated pictures and scenes with exact labels, and trained checkpoints."""
