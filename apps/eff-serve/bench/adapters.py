"""Decoding with many LoRA adapters over one model: ``nox -s bench -- serve adapters``.

Eight adapters of rank 16 on q, k, v and o with random factors, and a mixture of three of eight a token, over the
embedded model in int8. One step of a batch of 1, 8 and 32 behind 64 tokens: without adapters, all rows with one, each
row with its own, and all with the mixture; also with the weights as they are stored ("float"). In the same run PEFT's
mixed batch, each row with its own adapter (``adapter_names``), on transformers' model in float32. Also the memory of
the weights, and the time to load and take away one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import eff_kernels
import torch
from eff_adapters.lora_mixer import LoraMixerConfig, apply_lora_mixer
from eff_adapters.lora_mixer.peft_files import write_adapter
from eff_embedded.language import load_smollm2, smollm2_folder
from eff_kernels.testing import Provider, Recorder, same
from eff_serve.engine.decoder import PAGE, Decoder
from peft import PeftModel

RESULTS = Path(__file__).parent / "results" / "adapters.jsonl"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS, RANK, CONTEXT = 8, 16, 64


def write_all(folder: Path) -> dict[str, Path]:
    """Eight folders of adapters and one of their mixture."""
    model, _ = load_smollm2(dtype=torch.float32)
    names = {}
    for number in range(EXPERTS):
        generator, weights = torch.Generator().manual_seed(number), {}
        for name, module in model.named_modules():
            if name.endswith(TARGETS):
                a = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
                weights[name] = a, 0.02 * torch.randn(module.out_features, RANK, generator=generator)
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(weights)}
        names[f"e{number}"] = folder / f"e{number}"
        write_adapter(names[f"e{number}"], weights, settings)
    torch.manual_seed(0)
    mixer = apply_lora_mixer(model, LoraMixerConfig(top_k=3), experts=dict(names))
    mixer.save_pretrained(folder / "mix")
    return {**names, "mix": folder / "mix"}


class Mixed:
    """PEFT's mixed batch: one step of transformers' model behind a cache that is cut back after it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        model, _ = load_smollm2(dtype=torch.float32)
        (first, path), *others = folders.items()
        self.model = PeftModel.from_pretrained(model, path, adapter_name=first)
        for name, path in others:
            self.model.load_adapter(path, adapter_name=name)
        self.model.eval()
        self.names = list(folders)

    @torch.no_grad()
    def prepare(self, ids):
        base = self.model.get_base_model()
        with self.model.disable_adapter():
            cache = base(ids, use_cache=True, logits_to_keep=1).past_key_values
        cache.crop(-1)  # the last token is the step's

        @torch.no_grad()
        def step(numbers):
            names = ["__base__" if n < 0 else self.names[n] for n in numbers]
            out = self.model(ids[:, -1:], past_key_values=cache, use_cache=True, adapter_names=names).logits[:, -1]
            cache.crop(-1)
            return out

        return step


class Server:
    """The decoder with all adapters loaded, each sequence with its own pages.

    Attributes:
        about: Memory of the weights, and times to load and take away an adapter.
    """

    def __init__(self, folders: dict[str, Path], most: int, quantize: str | None) -> None:
        width = -(-(CONTEXT + 1) // PAGE)
        self.decoder = decoder = Decoder(smollm2_folder(), quantize=quantize, num_pages=most * width)
        self.table = torch.arange(most * width).view(most, width)
        plain = decoder.weight_bytes
        decoder.load_adapters(folders)
        held = decoder.weight_bytes - plain
        begun = time.perf_counter()
        decoder.adapters.load("more", folders["e0"])
        loading = time.perf_counter() - begun
        begun = time.perf_counter()
        decoder.adapters.unload("more")
        taking = time.perf_counter() - begun
        mib = {"base_mib": plain / 2**20, "adapters_and_mixture_mib": held / 2**20}
        self.about = {**mib, "load_ms": loading * 1e3, "unload_ms": taking * 1e3}

    def prepare(self, ids):
        """A step of the last tokens behind all others; with the adapters of its rows, or none."""
        batch = len(ids)
        for row, pages in zip(ids, self.table, strict=False):
            self.decoder.prefill(row, 0, pages)
        tokens, positions = ids[:, -1], torch.full((batch,), CONTEXT)
        table = self.table[:batch].to(torch.int32)

        def step(numbers, rows=slice(None)):
            chosen = None if numbers is None else numbers[rows]
            return self.decoder.decode(tokens[rows], positions[rows], table[rows], adapters=chosen)

        return step


def ours(step, name: str, numbers: torch.Tensor | None, batch: int) -> Provider:
    """One of the server's steps, right if each row is as alone and adapters change the answer."""

    def check():
        last = slice(batch - 1, batch)
        alone = same(step(numbers)[last], step(numbers, last), tolerance=1e-4)
        return alone and (numbers is None or not same(step(numbers), step(None), tolerance=1e-3))

    return Provider(name, lambda _: step(numbers), check=check)


def theirs(step, each: list[int]) -> Provider:
    """PEFT's mixed batch, right if it is neither the base nor one adapter for all."""

    def check():
        one = same(step(each)[:1], step([each[0]] * len(each))[:1], tolerance=1e-4)
        return one and not same(step(each), step([-1] * len(each)), tolerance=1e-3)

    return Provider("PEFT, an adapter a row", lambda _: step(each), check=check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--no-record", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources = (Path(__file__).parents[1] / "src", Path(eff_kernels.__file__).parent)
    recorder = Recorder("adapters", None if arguments.no_record else RESULTS, sources=sources)
    most = max(arguments.batches)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_all(Path(folder))
        int8, floats = Server(paths, most, "int8"), Server(paths, most, None)
        mixed = Mixed({name: path for name, path in paths.items() if name != "mix"})
    for name, server in (("int8", int8), ("float", floats)):
        print(name, json.dumps({n: round(v, 1) for n, v in server.about.items()}))
    for batch in arguments.batches:
        ids = torch.randint(5, 40000, (batch, CONTEXT), generator=torch.Generator().manual_seed(batch))
        each = torch.arange(batch) % EXPERTS
        step, wide = int8.prepare(ids), floats.prepare(ids)
        mixture = torch.full((batch,), int8.decoder.adapters.get("mix").number)
        providers = [
            ours(step, "no adapter", None, batch),
            ours(step, "one adapter", torch.zeros_like(each), batch),
            ours(step, "an adapter a row", each, batch),
            ours(step, "mixture, 3 of 8 a token", mixture, batch),
            ours(wide, "float, no adapter", None, batch),
            ours(wide, "float, an adapter a row", each, batch),
            theirs(mixed.prepare(ids), each.tolist()),
        ]
        recorder.run(f"B={batch}", providers, mode="decode", rounds=arguments.rounds)
    print(recorder.table("no adapter"))


if __name__ == "__main__":
    main()
