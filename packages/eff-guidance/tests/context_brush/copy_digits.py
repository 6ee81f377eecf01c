"""A small FLUX Fill of 8 x 8 points: above a digit in some colour, below a hole that is to be filled by the like.

Latents are the points themselves. Its weights lie beside this file (``bench/context_brush_digits.py`` trains them).
"""

import itertools
from pathlib import Path

import torch
from einops import rearrange

WEIGHTS = Path(__file__).with_name("copy_digits.safetensors")
SIDE, TEXT, WIDTH = 8, 4, 32  # points of a half, tokens of a prompt, their width
TOKENS = (SIDE, SIDE // 2)  # of the canvas, 2 x 2 points each


def make_model():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=28, out_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )  # fmt: skip


def load_model():
    from safetensors.torch import load_file

    model = make_model()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)


def digits():
    """Shapes [n, 8, 8] from 0 to 1 and classes [n]; the last 297 are for tests."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target)


def paint(shapes, colours):
    """Digits in colours on black, [n, 3, 8, 8] from -1 to 1."""
    return 2 * shapes[:, None] * colours[:, :, None, None] - 1


def random_colours(count, draw):
    return 0.15 + 0.85 * torch.rand(count, 3, generator=draw)


def prompts(classes, keep):
    """Tokens [n, 4, 32] and pooled [n, 32] of classes; zeros where nothing is kept."""
    table = torch.randn(10, TEXT, WIDTH, generator=torch.Generator().manual_seed(9))
    text = table[classes] * keep[:, None, None]
    return text, text.mean(1)


def pack(x):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(x):
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=TOKENS[0], p=2, q=2)


def places():
    """Places of picture tokens and of text tokens."""
    ids = torch.zeros(*TOKENS, 3)
    ids[..., 1], ids[..., 2] = torch.arange(TOKENS[0])[:, None], torch.arange(TOKENS[1])[None]
    return {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(TEXT, 3)}


def conditions(demo):
    """The canvas with its hole, and the mask, packed."""
    canvas = torch.cat([demo, torch.zeros_like(demo)], 2)
    mask = torch.zeros(len(demo), 1, 2 * SIDE, SIDE)
    mask[:, :, SIDE:] = 1
    return torch.cat([pack(canvas), pack(mask)], -1)


@torch.no_grad()
def fill(model, demo, text, pooled, *, seed=0, steps=8):
    """Fill the lower half, [n, 3, 8, 8] from -1 to 1."""
    given = conditions(demo)
    z = torch.randn(len(demo), given.shape[1], 12, generator=torch.Generator().manual_seed(seed))
    levels = torch.linspace(1, 0, steps + 1)
    for now, then in itertools.pairwise(levels):
        made = model(
            torch.cat([z, given], -1), encoder_hidden_states=text, pooled_projections=pooled,
            timestep=now.expand(len(demo)), **places(),
        ).sample  # fmt: skip
        z = z + (then - now) * made
    return unpack(z)[:, :, SIDE:].clamp(-1, 1)


def nearest_class(pictures, count=1500):
    """Classes of painted digits: the nearest of the real ones, whatever their colours."""
    shapes, classes = digits()
    gray = ((pictures + 1) / 2).mean(1).flatten(1)
    known = shapes[:count].flatten(1)
    gray, known = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-6) for x in (gray, known))
    return classes[(gray @ known.T).argmax(1)]


def likeness(pictures, demo):
    """Correlation of each picture with its demonstration over points and colours, [n]."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (pictures, demo))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)
