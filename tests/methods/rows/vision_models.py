"""Models of eff-vision: kept by their state_dict, and the same alone and in a batch."""

import functools

import torch
from eff_vision.amodal import BEVConfig, EoRaS, EoRaSConfig
from eff_vision.brain_encoder import RoiMasks, RoiQueryConfig, RoiQueryEncoder
from eff_vision.geometry import intrinsics_from_fov
from eff_vision.multiview import MultiViewConfig, MultiViewTransformer
from eff_vision.panorama import PanoConv2d, PDBridgeConfig, PDBridgeNet
from eff_vision.pixpro import CnnCells, PixPro, PixProConfig
from eff_vision.projection_head import HeadedEncoder, MLPHead
from eff_vision.scanpath import OatConfig, ObjectScanpathTransformer
from eff_vision.specvit import LolaSpecViT, LolaSpecViTConfig
from eff_vision.unip import StudentConfig, StudentViT
from method_table import normal, state_row
from torch import nn


def seeded(cls):
    """A maker of models with the same weights each time, none of them zero."""

    @functools.wraps(cls)
    def make(*args, **settings):
        torch.manual_seed(0)
        model = cls(*args, **settings).eval()
        for p in model.parameters():
            if not p.detach().any():
                nn.init.normal_(p, std=0.1)
        return model

    return make


class Backbone(nn.Module):
    """Four maps at an eighth of the size."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.layers = nn.ModuleList(PanoConv2d(8, 8, 3) for _ in range(4))

    def forward(self, pictures):
        x, found = self.patch(pictures), []
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
            found.append(x)
        return found


@seeded
def panorama():
    return PDBridgeNet(Backbone(), PDBridgeConfig(classes=4, channels=8, dim=8, heads=2, blocks=1))


@seeded
def eoras():
    bev = BEVConfig(width=(-4.0, 4.0), height=(-1.5, 1.5), depth=(0.0, 8.0), cells=(8, 3, 8))
    sizes = {"d_model": 16, "heads": 2, "layers": 1, "feedforward": 32, "slots": 3, "features": 16, "crop": 32}
    return EoRaS(EoRaSConfig(**sizes, bev=bev))


@seeded
def scanpath():
    sizes = {"d_model": 48, "max_grid": 10, "num_heads": 2, "enc_layers": 1, "dec_layers": 1, "d_ff": 32}
    return ObjectScanpathTransformer(OatConfig(**sizes, dropout=0.0, feature_dim=6))


@seeded
def brain():
    rois = {"lh": RoiMasks.from_labels(torch.tensor([1, 1, 2, 2, 0]), ["a", "b"])}
    return RoiQueryEncoder(RoiQueryConfig(feature_dim=16, d_model=16, num_heads=4, d_ff=32, dropout=0.0), rois)


@seeded
def pixpro():
    cells = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))
    return PixPro(CnnCells(cells, 12), PixProConfig(dim=8, hidden=16), total_steps=10)


@seeded
def headed():
    return HeadedEncoder(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), MLPHead(8, 8, 4))


MULTI = MultiViewConfig(dim=32, heads=2, depth=2, taps=(0, 1), head_dim=8, camera_depth=1)
SPECVIT = LolaSpecViTConfig(
    stem=(2, 4, 8), dims=(8, 16), depths=(1, 1), heads=(2, 4), lora_rank=2, num_classes=5, patch_size=7
)
STUDENT = StudentConfig(dim=32, depth=2, num_heads=2, last_heads=4, patch_size=8, drop_path=0.0)


def tasks(model, x, mask=None):
    """All dense outputs of a panorama, side by side."""
    found = model(x)
    return torch.cat([t.flatten(1) for t in found.main.values()], 1)


def amodal(model, x, mask=None):
    cameras = intrinsics_from_fov(1.2, 32, 32).to(x).expand(*x.shape[:2], 3, 3)
    return model(x, cameras).full


def search(model, x, mask=None):
    """Logits of the next object; where the objects stand and what is looked for follows from ``x``."""
    n = x.shape[1]
    places = torch.stack((torch.arange(n) // 3, torch.arange(n) % 3), -1).expand(len(x), -1, -1)
    past = (x[:, :3, :3] > 0).sum(-1) % n
    return model(positions=places, features=x, target=past[:, 0], fixations=past).logits


def views(model, x, mask=None):
    edges = torch.tensor([[0.0, 0, 0.6, 0.6], [0.1, 0.1, 0.9, 0.9]]).to(x)
    return torch.stack([model(a[None], a.flip(-1)[None], edges[:1], edges[1:]).loss for a in x])


def columns(model, x, mask=None):
    return model(x, (2, 3)).prediction["lh"]


ROWS = [
    state_row(
        "specvit", functools.partial(seeded(LolaSpecViT), SPECVIT), lambda m, x, mask=None: m(x),
        data=normal(2, 15, 7, 7), lora=("qkv",),
    ),
    state_row(
        "multiview", functools.partial(seeded(MultiViewTransformer), MULTI), lambda m, x, mask=None: m(x).depth,
        data=normal(2, 3, 3, 32, 32), lora=("first", "projections.0"),
        cannot={"bf16": "the heads run in float32, their weights are torch.bfloat16; use torch.autocast for the rest"},
    ),
    state_row("amodal", eoras, amodal, data=normal(2, 2, 3, 32, 32), lora=("features", "linear1"), rounding=1e-6),
    state_row("panorama", panorama, tasks, data=normal(2, 3, 32, 64), lora=("patch",)),
    state_row("scanpath", scanpath, search, data=normal(2, 5, 6), lora=("linear1", "query", "mix"), rounding=1e-6),
    state_row("brain_encoder", brain, columns, data=normal(2, 6, 16), lora=("value",)),
    state_row(
        "pixpro", pixpro, views, data=normal(2, 3, 16, 16), lora=("online.0.backbone.0", "online.1.0"),
        float32=True,
    ),
    state_row(
        "projection_head", headed, lambda m, x, mask=None: m(x).projection, data=normal(4, 6), lora=("encoder.0",)
    ),
    state_row(
        "unip", functools.partial(seeded(StudentViT), STUDENT), lambda m, x, mask=None: m(x),
        data=normal(2, 3, 32, 24), lora=("qkv",),
    ),
]  # fmt: skip
