"""What a model folder says about text: its tokenizer and chat template."""
