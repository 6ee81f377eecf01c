"""Adapters of language models, one sub-package a method.

- `lora_mixer`: LoRA experts that are chosen token by token.
- `llamafusion`: a second set of weights, with which a text model reads and draws pictures.
- `sentinel`: preference training on a model's own sentences, against invented objects.

Importing this package loads torch and nothing larger; the functions that need transformers or peft import them.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("eff-adapters")
