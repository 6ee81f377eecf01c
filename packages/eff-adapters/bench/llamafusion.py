"""What picture tokens cost: ``nox -s bench -- adapters llamafusion``.

128 and 512 tokens through the decoder of SmolLM2-135M with a full second set of weights, without a cache: all text,
half of them a picture (gathered: each token through the weights of its own modality), all picture, and the same half
with both sets run on all tokens and the right result chosen. A picture of 256 tokens is the paper's. Every one has the
same mask. Processor time of one thread, float32.
"""

import argparse
import warnings
from pathlib import Path

import eff_adapters
import torch
from _times import take_times
from eff_adapters.llamafusion import ModalityTower, ModalityTowerConfig, add_modality_tower
from eff_adapters.llamafusion.routing import ModalityModule, current
from eff_embedded.language import load_smollm2
from eff_kernels.testing import Recorder

RESULTS = Path(__file__).parent / "results" / "llamafusion.jsonl"
SOURCES = (Path(eff_adapters.__file__).parent / "llamafusion",)


def both_and_choose(self, x):
    """`ModalityModule.forward` as a mask over two full results."""
    routing = current.get()
    if routing is None:
        return self.text(x)
    chosen = torch.zeros(x.shape[:2].numel(), dtype=torch.bool)
    chosen[routing.pictures] = True
    return torch.where(chosen.view(*x.shape[:2], *[1] * (x.dim() - 2)), self.picture(x), self.text(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=(128, 512), help="half of them are the picture")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    recorder = Recorder("llamafusion", None if options.dry else RESULTS, sources=SOURCES)
    model, _ = load_smollm2(dtype=torch.float32)
    torch.manual_seed(0)
    config = ModalityTowerConfig(
        boi_token_id=49152, eoi_token_id=49153, patchify="linear", latent_channels=3, latent_size=32,
        tokens_per_image=64,
    )  # fmt: skip
    tower = add_modality_tower(model.eval(), config)
    with torch.no_grad():
        for name, parameter in tower.picture_parameters().items():
            if name.startswith("tower."):  # or else all would give the same
                parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    for tokens in options.tokens:
        measure(recorder, tower, tokens, options.rounds)
    print(recorder.table("text alone"))


def measure(recorder: Recorder, tower: ModalityTower, tokens: int, rounds: int) -> None:
    first, picture = tokens // 4, tokens // 2
    embeds = 0.1 * torch.randn(1, tokens, 576)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[first : first + picture, first : first + picture] = True
    half = torch.zeros(1, tokens, dtype=torch.long)
    half[:, first : first + picture] = 1
    positions = torch.arange(tokens)[None]
    gathered = ModalityModule.forward

    @torch.no_grad()
    def run(kinds, forward=gathered):
        ModalityModule.forward = forward
        try:
            return tower.run(embeds, kinds, mask[None, None], positions, None).last_hidden_state
        finally:
            ModalityModule.forward = gathered

    calls = {
        "text alone": lambda: run(torch.zeros_like(half)),
        "half a picture, gathered": lambda: run(half),
        "picture alone": lambda: run(torch.ones_like(half)),
        "half a picture, both and choose": lambda: run(half, both_and_choose),
    }
    kept = calls["half a picture, gathered"]()
    right = float((kept - calls["half a picture, both and choose"]()).norm() / kept.norm()) < 1e-5
    moved = not torch.allclose(kept, calls["text alone"](), atol=1e-3)
    take_times(recorder, f"{tokens} tokens", "forward", calls, rounds, dict.fromkeys(calls, right and moved))


if __name__ == "__main__":
    main()
