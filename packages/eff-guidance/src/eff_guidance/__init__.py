"""Control of diffusion transformers, one sub-package a method.

Importing this package loads torch and nothing larger; the functions that need diffusers or transformers import them.
"""
