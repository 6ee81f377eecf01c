"""The studio's engine from Python: a picture that holds the settings it was made with.

uv run examples/studio_draw.py drawn.png
"""

import sys

from eff_studio.engine import load_model, run_work
from eff_studio.work import Generate, LayerBox

file = sys.argv[1] if len(sys.argv) > 1 else "drawn.png"
dog = LayerBox(prompt="a dog", box=(0.05, 0.3, 0.45, 0.9))
apple = LayerBox(prompt="an apple", box=(0.55, 0.3, 0.95, 0.9))
work = Generate(prompt="a dog and an apple", layers=(dog, apple), seed=3, steps=8)
result = run_work(
    load_model(),
    work,
    open_picture=None,
    report=lambda progress: print(f"step {progress.step}", end=" ", flush=True),
    cancelled=lambda: False,
)
result.images[0].save(file)
print(f"\n{file}: {result.images[0].size}")
