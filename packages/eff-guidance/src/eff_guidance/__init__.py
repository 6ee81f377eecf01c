"""Control of diffusion transformers, one sub-package a method.

Importing this package loads torch and nothing larger; diffusers and transformers are imported by the functions that need
them.
"""
