"""What `vision.py` compares with that is not trained by a recipe: classical methods, other libraries, exact theory.

Libraries that are not installed are left out: himalaya, lightly, multimatch_gaze, py360convert, pyequilib and
segmentation-models-pytorch.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from eff_train import registry
from eff_train.frame import torch_generator
from torch import Tensor

Lines = Iterator[dict[str, Any]]


def there(module: str) -> bool:
    """Whether a library is installed."""
    return importlib.util.find_spec(module) is not None


def specvit() -> Lines:
    """SVM and random forest, on a pixel's components and on the means of its patch, on the splits of the recipe."""
    from eff_vision.specvit import oa_aa_kappa
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.svm import SVC

    cls = registry.load("specvit")
    for split, share in (("block", 0.4), ("random", 0.1)):
        recipe = cls(cls.config_class(split=split, train=share))
        parts = recipe.training, recipe.patches(recipe.parts.test)
        cuts = [p.batch(torch.arange(len(p))) for p in parts]
        middle = cuts[0].size(-1) // 2
        for what in ("pixel", "patch mean"):
            x, y = (c[..., middle, middle] if what == "pixel" else c.mean((2, 3)) for c in cuts)
            for name, model in (("svm", SVC(C=100)), ("random forest", RandomForestClassifier(200, random_state=0))):
                began = time.process_time()
                found = model.fit(x.numpy(), parts[0].classes.numpy()).predict(y.numpy())
                score = oa_aa_kappa(parts[1].classes, torch.from_numpy(found), 16)
                yield {
                    "run": f"{name}, {what}, {split}", "seed": 0, "seconds": round(time.process_time() - began, 2),
                    "metrics": {"oa": score.oa, "aa": score.aa, "kappa": score.kappa},
                }  # fmt: skip


def brain_encoder() -> Lines:
    """Ridge with a penalty for each vertex (ours and himalaya's) on the simulated cortex, and on two recordings."""
    from eff_train.recipes.brain_encoder import regional
    from eff_vision.brain_encoder import RidgeEncoder

    cls = registry.load("brain-encoder")
    recipe = cls(cls.config_class())
    count = recipe.config.pictures
    x, y = recipe.features.flatten(1), recipe.cortex.responses
    alphas = tuple(10.0**i for i in range(1, 8))
    began = time.process_time()
    found = RidgeEncoder(alphas).fit(x[:count], y[:count]).predict(x[count:])
    yield _line("ridge, a penalty a vertex", began, regional(found.float(), y[count:], recipe.cortex))
    pooled = recipe.features.mean(1)
    began = time.process_time()
    found = RidgeEncoder(alphas).fit(pooled[:count], y[:count]).predict(pooled[count:])
    yield _line("ridge, mean of patches", began, regional(found.float(), y[count:], recipe.cortex))
    if there("himalaya"):
        from himalaya.kernel_ridge import KernelRidgeCV

        began = time.process_time()
        model = KernelRidgeCV(alphas=np.array(alphas), cv=5).fit(x[:count].numpy(), y[:count].numpy())
        guess = torch.as_tensor(model.predict(x[count:].numpy())).float()
        yield _line("himalaya, kernel ridge", began, regional(guess, y[count:], recipe.cortex))
    yield from recordings()


def recordings() -> Lines:
    """The linear baseline where real recordings allow one: a nerve cell's rate from the sound, a region from others."""
    from eff_embedded.data import fmri_regions, grasshopper_neuron
    from eff_vision.brain_encoder import RidgeEncoder, pearson_columns

    for cell in (1, 2):
        began, train = time.process_time(), grasshopper_neuron(cell)
        step = round(train.rate * 0.001)
        loud = train.stimulus.abs()[: len(train.stimulus) // step * step].view(-1, step).mean(1)
        counts = torch.histc(train.spikes.float(), len(loud), 0.0, len(loud) * step / train.rate)
        rate = F.avg_pool1d(counts[None, None], 5, 1, 2)[0, 0]
        lags = F.pad(loud, (20, 0)).unfold(0, 21, 1)[: len(loud)]
        half = len(loud) // 2
        found = RidgeEncoder().fit(lags[:half], rate[:half, None]).predict(lags[half:])
        r = float(pearson_columns(found.float(), rate[half:, None])[0])
        yield _line(f"ridge, grasshopper's nerve cell {cell}", began, {"r": r})
    began, brain = time.process_time(), fmri_regions()
    values = (brain.values - brain.values.mean(0)) / brain.values.std(0)
    half, found = len(values) // 2, []
    for i in range(values.size(1)):
        rest = torch.cat((values[:, :i], values[:, i + 1 :]), 1)
        guess = RidgeEncoder().fit(rest[:half], values[:half, i : i + 1]).predict(rest[half:])
        found.append(float(pearson_columns(guess.float(), values[half:, i : i + 1])[0]))
    yield _line("ridge, a brain region from the 30 others", began, {"r": float(np.median(found))})


def projection_head() -> Lines:
    """The theory of linear heads: gradient descent against the closed form, layer by layer."""
    from eff_vision.projection_head import feature_weights, optimal_linear_weights, population_loss, population_minimum

    phi = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    sigma = torch.full_like(phi, 0.6)
    for seed in range(3):
        began, g = time.process_time(), torch.Generator().manual_seed(seed)
        layers = [0.02 * torch.randn(20, n, generator=g, dtype=torch.float64) for n in (5, 20)]
        for w in layers:
            w.requires_grad_()
        for _ in range(20_000):
            grads = torch.autograd.grad(population_loss(layers, phi, sigma), layers)
            with torch.no_grad():
                for w, d in zip(layers, grads, strict=True):
                    w -= 0.05 * d
        pre, post = feature_weights([w.detach() for w in layers])
        wanted = [optimal_linear_weights(phi, sigma, layer=i, depth=2) for i in (1, 2)]
        values = {
            "post_error": float((post - wanted[1]).abs().max()),
            "pre_error": float((pre / wanted[0] - 1).abs().max()),
            "loss_error": float(
                population_loss([w.detach() for w in layers], phi, sigma) - population_minimum(phi, sigma)
            ),
        }
        yield {**_line("theory, 20,000 steps", began, values), "seed": seed}


def pixpro() -> Lines:
    """Losses of lightly on the same numbers: value and time of ours beside theirs."""
    if not there("lightly"):
        return
    from eff_vision.pixpro import pixcontrast_loss, pixpro_loss
    from eff_vision.projection_head import nt_xent
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss

    g = torch_generator(0, 0)
    a, b = (torch.randn(24, 64, 64, generator=g) for _ in range(2))
    one = torch.eye(64, dtype=torch.bool).expand(24, -1, -1)
    flat = a.flatten(0, 1), b.flatten(0, 1)
    rows = a[:, 0], b[:, 0]
    # A cell whose one partner is the cell at its own place: ours reduce to lightly's, and to InfoNCE written out.
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "lightly: pixpro, one partner": (lambda: pixpro_loss(a, b, one) / 2, lambda: NegativeCosineSimilarity()(*flat)),
        "InfoNCE: pixcontrast, one partner": (
            lambda: pixcontrast_loss(a, b, one, tau=0.3),
            lambda: torch.stack([_info_nce(x, y, 0.3) for x, y in zip(a, b, strict=True)]).mean(),
        ),
        "lightly: nt-xent of pictures": (lambda: nt_xent(*rows, temperature=0.5), lambda: NTXentLoss(0.5)(*rows)),
    }  # fmt: skip
    for name, (ours, theirs) in pairs.items():
        began = time.process_time()
        seconds = [_best(f) for f in (ours, theirs)]
        values = {
            "ours": float(ours()),
            "theirs": float(theirs()),
            "ms": 1e3 * seconds[0],
            "theirs_ms": 1e3 * seconds[1],
        }
        yield _line(name, began, values)


def _info_nce(a: Tensor, b: Tensor, tau: float) -> Tensor:
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / tau
    return F.cross_entropy(logits, torch.arange(len(a)))


def unip() -> Lines:
    """The pattern of each layer of the embedded ViT on the recipe's pictures."""
    cls = registry.load("unip")
    recipe = cls(cls.config_class())
    began, profile = time.process_time(), recipe.profile
    for i, (nmi, entropy, distance) in enumerate(zip(profile.nmi, profile.entropy, profile.distance, strict=True), 1):
        values = {"information": nmi, "entropy": entropy, "distance": distance}
        yield {
            **_line(f"teacher, layer {i} ({profile.pattern[i - 1]})", began, values),
            "pictures": profile.num_pictures,
        }
    yield from smp()


def scanpath() -> Lines:
    """MultiMatch beside multimatch_gaze without its simplification, on paths of the simulated searcher."""
    if not there("multimatch_gaze"):
        return
    import multimatch_gaze
    from eff_vision.metrics import multimatch

    cls = registry.load("scanpath")
    recipe = cls(cls.config_class(test_layouts=20, test_paths=2))
    apart, began = [], time.process_time()
    for shelf, (a, b) in zip(*recipe.held_out, strict=True):
        if min(len(a), len(b)) < 3:
            continue
        points = shelf.positions.flip(-1).float() * 100 + 50
        records = [
            np.array(
                [(x, y, 0.2) for x, y in points[p].tolist()],
                dtype=[("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")],
            )
            for p in (a, b)
        ]
        theirs = multimatch_gaze.docomparison(*records, screensize=(600, 400))
        ours = multimatch(points[a], points[b], (600.0, 400.0))
        apart.append([abs(ours.shape - theirs[0]), abs(ours.direction - theirs[1]), abs(ours.length - theirs[2]),
                      abs(ours.position - theirs[3])])  # fmt: skip
    worst = np.nanmax(np.array(apart), 0)
    names = ("shape", "direction", "length", "position")
    yield _line("multimatch_gaze, largest difference", began, dict(zip(names, map(float, worst), strict=True)))


def mtpano() -> Lines:
    """Pictures cut out of a panorama whose colours are known exactly in each direction: largest error, and time."""
    from eff_vision.geometry import (
        erp_rays,
        erp_to_perspective,
        intrinsics_from_fov,
        pixel_rays,
        rotation_from_yaw_pitch,
    )

    height, side, fov = 512, 256, math.pi / 2

    def colours(ray: Tensor) -> Tensor:
        x, y, z = ray.unbind(-1)
        return torch.stack((x * y + z, y * y - x, x * z * z + y), -3) / 4 + 0.5

    panorama = colours(erp_rays(height, 2 * height))
    rays = F.normalize(pixel_rays(intrinsics_from_fov(fov, side, side), side, side), dim=-1)
    array = panorama.movedim(0, -1).contiguous().numpy()
    for yaw, pitch in ((0.0, 0.0), (0.7, 0.3), (-2.9, -1.2)):
        turn = rotation_from_yaw_pitch(yaw, pitch)
        exact = colours(rays @ turn.T)
        ways: dict[str, Callable[[], Tensor]] = {
            "ours": lambda turn=turn: erp_to_perspective(panorama[None], turn, fov, side, side)[0]
        }
        if there("py360convert"):
            from py360convert import e2p

            degrees = math.degrees(yaw), math.degrees(pitch)
            ways["py360convert"] = lambda d=degrees: torch.from_numpy(
                e2p(array, math.degrees(fov), *d, (side, side), mode="bilinear")
            ).movedim(-1, 0)
        if there("equilib"):
            from equilib import equi2pers

            # Its yaw turns to the left and its pitch downwards, as the errors of the other signs show.
            rotation = [{"roll": 0.0, "pitch": -pitch, "yaw": -yaw}]
            ways["pyequilib"] = lambda r=rotation: equi2pers(
                panorama[None], r, side, side, math.degrees(fov), mode="bilinear"
            )[0]
        for name, way in ways.items():
            began, found = time.process_time(), way()
            values = {"error": float((found - exact).abs().max()), "ms": 1e3 * _best(way)}
            yield _line(f"{name}, turned by {yaw:g} and {pitch:g}", began, values)


def smp() -> Lines:
    """Dice loss and pyramid decoder of segmentation-models-pytorch on the same numbers."""
    if not there("segmentation_models_pytorch"):
        return
    from eff_vision.panorama.losses import segmentation_loss
    from eff_vision.unip import LastLayerFPN
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.losses import DiceLoss

    g, dim, classes = torch_generator(0, 1), 96, 6
    logits = torch.randn(4, classes, 64, 64, generator=g)
    target = torch.randint(0, classes, (4, 64, 64), generator=g)
    theirs = DiceLoss("multiclass", smooth=1e-6, ignore_index=255)
    pair: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: segmentation_loss(logits, target),
        "theirs": lambda: F.cross_entropy(logits, target) + theirs(logits, target),
    }
    began, values = time.process_time(), {name: float(way()) for name, way in pair.items()}
    values |= {"ms": 1e3 * _best(pair["ours"]), "theirs_ms": 1e3 * _best(pair["theirs"])}
    yield _line("segmentation-models-pytorch: cross-entropy and dice", began, values)
    pyramid, maps = LastLayerFPN(dim).eval(), torch.randn(2, dim, 16, 16, generator=g)
    decoder = FPNDecoder([dim] * 5, encoder_depth=5, pyramid_channels=dim, segmentation_channels=dim).eval()
    with torch.no_grad():
        levels = pyramid(maps)
        finest = F.interpolate(levels[0], scale_factor=2.0)
        began, made = time.process_time(), decoder([finest, finest, *levels])
        values = {
            "pyramid_ms": 1e3 * _best(lambda: pyramid(maps)[0]),
            "theirs_ms": 1e3 * _best(lambda: decoder([finest, finest, *levels])),
            "rows": float(made.size(-2)),
            "theirs_weights": float(sum(p.numel() for p in decoder.parameters())),
        }
    yield _line("segmentation-models-pytorch: its decoder reads our pyramid", began, values)


def _line(name: str, began: float, values: dict[str, float]) -> dict[str, Any]:
    return {"run": name, "seed": 0, "seconds": round(time.process_time() - began, 2), "metrics": values}


def _best(call: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(10):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


PEERS: dict[str, Callable[[], Lines]] = {
    "specvit": specvit,
    "brain-encoder": brain_encoder,
    "projection-head": projection_head,
    "pixpro": pixpro,
    "unip": unip,
    "scanpath": scanpath,
    "mtpano": mtpano,
}
