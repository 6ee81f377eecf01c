"""Zero-shot object detectors of transformers as detectors here."""

from __future__ import annotations

from typing import Any

import torch


class ZeroShotDetector:
    """A zero-shot object detector of transformers: Grounding DINO, OWL-ViT, OWLv2, OmDet and their like.

    Args:
        model: From ``AutoModelForZeroShotObjectDetection``, in evaluation mode.
        processor: Its processor.
        threshold: Lowest score of a box; 0.35 is usual for Grounding DINO, 0.1 for OWL-ViT.
        text_threshold: For Grounding DINO, lowest score of the words of a box.
        template: What is asked for each name; "a photo of a {}" for OWL-ViT.
        batch_size: Names asked at once.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        threshold: float = 0.35,
        text_threshold: float = 0.25,
        template: str = "{}",
        batch_size: int = 16,
    ) -> None:
        if not hasattr(processor, "post_process_grounded_object_detection"):
            raise TypeError(f"{type(processor).__name__} is not the processor of a zero-shot object detector")
        if "{}" not in template:
            raise ValueError(f"template={template!r}; use a text with {{}} where the name goes")
        self.model, self.processor = model, processor
        self.threshold, self.text_threshold = threshold, text_threshold
        self.template, self.batch_size = template, batch_size
        self._dino = "GroundingDino" in type(processor).__name__

    @torch.no_grad()
    def __call__(self, image: Any, names: list[str]) -> dict[str, bool]:
        """Whether each name has at least one box; each is asked by itself, so that words do not run together."""
        found: dict[str, bool] = {}
        for first in range(0, len(names), self.batch_size):
            some = names[first : first + self.batch_size]
            asked = [[self.template.format(name.lower())] for name in some]
            padding = {"padding": True} if self._dino else {}  # others pad each text to their full length
            inputs = self.processor(images=[image] * len(some), text=asked, return_tensors="pt", **padding)
            inputs = inputs.to(next(self.model.parameters()).device)
            out = self.model(**inputs)
            size = [(image.height, image.width)] * len(some)
            more = self._more(inputs, asked)
            boxes = self.processor.post_process_grounded_object_detection(
                out, threshold=self.threshold, target_sizes=size, **more
            )
            found |= {name: len(each["scores"]) > 0 for name, each in zip(some, boxes, strict=True)}
        return found

    def _more(self, inputs: Any, asked: list[list[str]]) -> dict[str, Any]:
        if self._dino:
            return {"input_ids": inputs["input_ids"], "text_threshold": self.text_threshold}
        return {"text_labels": asked}
