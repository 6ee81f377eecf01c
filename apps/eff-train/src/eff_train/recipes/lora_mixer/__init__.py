"""LoRA-Mixer on SmolLM2: three task adapters (`experts`), then the router that mixes them (`router`)."""
