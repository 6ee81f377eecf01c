"""Draw docs/images/collage_diffusion.png: pictures that collage diffusion makes of fixed prompts, three seeds each."""

from pathlib import Path

from eff_embedded.diffusion import load_collage_diffusion
from PIL import Image, ImageDraw, ImageFont

IMAGE = Path(__file__).parents[1] / "docs/images/collage_diffusion.png"
PROMPTS = (
    "a dog to the left of an apple",
    "a car below a tree on a blue background",
    "A robot on a yellow background.",
    "a panda and a guitar",
    "A crown is above a frog on a purple background.",
    "a sailboat, a star and a house on a dark blue background",
    "a fox to the right of a cactus",
    "a hamburger on a green background",
    "an owl above a pig on a pink background",
    "a basketball to the left of a butterfly",
    "a snowman and a rocket on a black background",
    "There is a sunflower below an airplane.",
)
SEEDS, COLUMNS, SIDE, LINE = 3, 3, 128, 18


def main() -> None:
    """Write the picture."""
    pipe = load_collage_diffusion()
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SEEDS * SIDE + 12) - 12, rows * (SIDE + LINE)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, prompt in enumerate(PROMPTS):
        x, y = i % COLUMNS * (SEEDS * SIDE + 12), i // COLUMNS * (SIDE + LINE)
        pen.text((x + 2, y + 1), prompt, fill="black", font=font)
        for j, picture in enumerate(pipe([prompt] * SEEDS, seed=0).images):
            sheet.paste(picture, (x + j * SIDE, y + LINE))
    sheet.save(IMAGE, optimize=True)


if __name__ == "__main__":
    main()
