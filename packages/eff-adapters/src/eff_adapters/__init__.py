"""Adapters of language models, one sub-package a method.

Importing this package loads torch and nothing larger; the functions that need transformers or peft import them.
"""
