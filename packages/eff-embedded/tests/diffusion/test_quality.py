"""Scores the trained model again on a few prompts: what the record says must hold here too."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from eff_embedded.checkpoints import checkpoint
from eff_embedded.diffusion import TRANSFORMER, judged, load_collage_diffusion, pairs
from eff_embedded.judge import load_judge


@pytest.mark.slow
def test_pictures_follow_their_prompts() -> None:
    """Forty-eight pairs: within three standard errors of the recorded shares."""
    found = judged(load_collage_diffusion(), load_judge(), pairs(48, seed=1))
    assert found.placed is not None
    recorded = checkpoint(TRANSFORMER).record["scores"]
    for key, value in (("present", found.present), ("placed", found.placed)):
        share = recorded[key]["share"]
        assert value.share > share - 3 * (share * (1 - share) / 48) ** 0.5, key
