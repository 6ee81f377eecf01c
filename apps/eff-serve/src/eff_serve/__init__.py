"""A small, fast, OpenAI-compatible LLM server and command line."""
