"""Look into a language model: position-bias writes a page about how much each position counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """Write a page: masks as graphs, rollout against theory, decay, the first token's weight in each layer.

    Attributes:
        model: Folder in transformers' layout, or name on the hub; by default the embedded SmolLM2-135M-Instruct.
        texts: File with plain text to read; by default the help that comes with Python.
        length: Tokens of each text.
        num_texts: How many texts are cut from it.
        residual: Share of the residual stream, from 0 to below 1.
        out: HTML file to write.
        record: JSON file to write the figures to.
    """

    model: str | None = None
    texts: Path | None = None
    length: int = 256
    num_texts: int = 4
    residual: float = 0.5
    out: Path = Path("position-bias.html")
    record: Path | None = None


KINDS = ("position-bias",)


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train analyse position-bias [options]`` and print where the page is."""
    words = list(argv)
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write("usage: eff-train analyse position-bias [-h] [OPTIONS]\n")
        return 0
    if not words or words[0] not in KINDS:
        from eff_train.errors import Refused

        raise Refused(f"name what to look at: {', '.join(KINDS)}" + (f"; got {words[0]!r}" if words else ""))
    args = tyro.cli(PositionBias, args=words[1:], prog="eff-train analyse position-bias")
    from eff_train.commands._common import need

    need(["eff_attention", "transformers"], ["analyse", *argv])
    from eff_attention.position_bias import position_bias_report

    from eff_train.errors import refusing

    with refusing():
        model, tokenizer, name = _load(args.model)
        report = position_bias_report(model, _texts(args, tokenizer), name=name, residual=args.residual)
        report.write_html(args.out)
        if args.record is not None:
            report.save(args.record)
    sys.stdout.write(f"{args.out}\n")
    return 0


def _load(model: str | None) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is None:
        from eff_embedded.language import SMOLLM2_NAME, smollm2_folder

        folder, name = str(smollm2_folder()), SMOLLM2_NAME
    else:
        folder, name = model, Path(model).name
    return AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder), name


def _texts(args: PositionBias, tokenizer: Any) -> list[Tensor]:
    """Pieces of one length, each as the tokenizer begins a text."""
    import torch

    if args.length < 8 or args.num_texts < 1:
        raise ValueError(f"length={args.length}, num_texts={args.num_texts}; use at least 8 and 1")
    if args.texts is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = args.texts.read_text(encoding="utf-8")
    # A token is a character or more, so no more text is needed than this.
    words = text[: args.length * args.num_texts * 16]
    begin = tokenizer("")["input_ids"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    step = args.length - len(begin)
    if len(ids) < step * args.num_texts:
        raise ValueError(
            f"the text has {len(ids)} tokens; {args.num_texts} texts of {args.length} need {step * args.num_texts}"
        )
    pieces = [begin + ids[i * step : (i + 1) * step] for i in range(args.num_texts)]
    return [torch.tensor(piece) for piece in pieces]
