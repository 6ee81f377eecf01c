"""Adapters for transformer models: routed mixtures of LoRA, a second set of weights for pictures, preference training against hallucination."""
