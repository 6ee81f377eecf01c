"""Where models come from: the embedded default, folders, names; and their tokenizer."""
