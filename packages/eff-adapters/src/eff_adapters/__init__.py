"""Adapters of language models, one sub-package a method.

Importing this package loads torch and nothing larger; transformers and peft are imported by the functions that need them.
"""
