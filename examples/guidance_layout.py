"""Draw what is asked for where it is asked for, one object in front of another.

uv run examples/guidance_layout.py dog_and_house.png
"""

import sys

from eff_embedded import load_collage_diffusion
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, apply_layerbind
from PIL import Image

file = sys.argv[1] if len(sys.argv) > 1 else "dog_and_house.png"
pipe = load_collage_diffusion()  # or any StableDiffusion3Pipeline or FluxPipeline
prompt = "a dog in front of a house on a blue background"
dog = Layer(prompt="a dog on a blue background", box=(0.1, 0.4, 0.6, 0.9))
house = Layer(prompt="a house on a blue background", box=(0.4, 0.1, 0.9, 0.6))
layout = Layout(background="a blue background", layers=(dog, house))  # front to back

plain = pipe(prompt, seed=0, num_inference_steps=10).images[0]
with apply_layerbind(pipe, layout, LayerBindConfig(hard_blocks=(0,))):
    placed = pipe(prompt, seed=0, num_inference_steps=10).images[0]
both = Image.new("RGB", (2 * plain.width, plain.height))
both.paste(plain, (0, 0))
both.paste(placed, (plain.width, 0))
both.save(file)
print(f"{file}: left without a layout, right with the dog below left and the house above right")
