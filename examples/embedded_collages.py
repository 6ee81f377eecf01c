"""Pictures with exact labels, as many as you like: names, masks, captions, questions with answers.

uv run examples/embedded_collages.py collages.png
"""

import sys

from eff_embedded import collages
from PIL import Image

file = sys.argv[1] if len(sys.argv) > 1 else "collages.png"
config = collages.CollageConfig(objects=(2, 4), pairs=collages.everyday_pairs(0.9))
sheet = Image.new("RGB", (4 * 128, 2 * 128))
for seed in range(8):
    collage = collages.sample(seed, config)
    sheet.paste(Image.fromarray(collage.picture), (seed % 4 * 128, seed // 4 * 128))
    asked = collage.questions()[0]
    print(f"{collage.caption(seed).text}  [{asked.text} {asked.answer}]")
sheet.save(file)
