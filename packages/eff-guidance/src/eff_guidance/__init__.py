"""Control of diffusion transformers: guidance by heads, layouts, insertion, subjects, styles, grounding, and losses for training."""
