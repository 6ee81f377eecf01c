"""GGUF files, read without llama.cpp and without its Python package."""
