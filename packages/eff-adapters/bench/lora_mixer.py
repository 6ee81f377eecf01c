"""Time of a decoding step with eight LoRA experts on SmolLM2: ``python packages/eff-adapters/bench/lora_mixer.py``.

In one run: the base; eff with one expert a sample ("hard") and with three of eight a token ("sparse"); PEFT with one
adapter a sample (``adapter_names``) and Arrow (three of eight); X-LoRA, which computes all tokens twice since it allows
no cache. The cache holds 128 tokens. float32, rank 16 on q, k, v and o, random factors.

What is counted is the processor time of one thread, which other programs on the machine disturb less than the clock.
"""

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import eff_adapters
import eff_kernels
import torch
from _times import take_times
from eff_adapters.lora_mixer import LoraMixerConfig, apply_lora_mixer
from eff_adapters.lora_mixer.peft_files import write_adapter
from eff_embedded.language import load_smollm2
from eff_kernels.testing import Recorder, same
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model

RESULTS = Path(__file__).parent / "results" / "lora_mixer.jsonl"
SOURCES = (
    Path(eff_adapters.__file__).parent / "lora_mixer",
    *(Path(eff_kernels.__file__).parent / p for p in ("ops/grouped_lora", "native/src/grouped_lora.c", "op.py")),
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS, RANK, TOP_K, CONTEXT = 8, 16, 3, 128


def write_adapters(model, folder: Path) -> dict[str, Path]:
    names = {}
    for number in range(EXPERTS):
        generator, weights = torch.Generator().manual_seed(number), {}
        for name, module in model.named_modules():
            if name.endswith(TARGETS):
                a = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
                weights[name] = a, 0.02 * torch.randn(module.out_features, RANK, generator=generator)
        settings = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(weights),
            "base_model_name_or_path": "SmolLM2-135M-Instruct", "task_type": "CAUSAL_LM",
        }  # fmt: skip
        names[f"e{number}"] = folder / f"e{number}"
        write_adapter(names[f"e{number}"], weights, settings)
    return names


class Step:
    """A decoding step: one token a row after a cache of ``CONTEXT`` tokens, which is cut back each time.

    `prepare` is what is done once for many steps; its time is not counted.
    """

    def __init__(self, model, ids: torch.Tensor, cache, **more) -> None:
        self.model, self.ids, self.more, self.cache = model, ids, more, copy.deepcopy(cache)

    def prepare(self) -> None:
        pass

    def __call__(self) -> torch.Tensor:
        out = self.model(
            input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **self.more
        ).logits
        self.cache.crop(-1)
        return out

    def exactly(self) -> torch.Tensor:
        """The same in float64, by the references of the ops, in the mode that `prepare` has set."""
        step = copy.copy(self)
        step.model, step.cache = copy.deepcopy(self.model).double(), copy.deepcopy(self.cache)
        for layer in step.cache.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        return Step.__call__(step)


class Routed(Step):
    def __init__(self, mixer, mode: str, ids: torch.Tensor, cache) -> None:
        super().__init__(mixer.model, ids, cache)
        self.mixer, self.mode = mixer, mode

    def prepare(self) -> None:
        self.mixer.set_mode(self.mode)

    def __call__(self) -> torch.Tensor:
        if self.mode != "hard":
            return super().__call__()
        with self.mixer.route(domain_ids=[i % EXPERTS for i in range(len(self.ids))]):
            return super().__call__()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--no-xlora", action="store_true", help="leave out X-LoRA")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    recorder = Recorder("lora_mixer", None if options.dry else RESULTS, sources=SOURCES)
    base, _ = load_smollm2(dtype=torch.float32)
    base.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapters = write_adapters(base, Path(folder))
        mixer = apply_lora_mixer(copy.deepcopy(base), LoraMixerConfig(top_k=TOP_K), experts=adapters)
        mixed = mixed_batch_of_peft(base, adapters)
        arrow = create_arrow_model(
            copy.deepcopy(base), [str(p) for p in adapters.values()], ArrowConfig(top_k=TOP_K, router_temperature=1.0)
        ).eval()
        ids = torch.randint(5, 40000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
        cache = base(ids, use_cache=True, logits_to_keep=1).past_key_values
        for batch in options.batches:
            decode(recorder, base, mixer, mixed, arrow, list(adapters), cache, batch, options.rounds)
        if not options.no_xlora:
            whole_prompt(recorder, base, mixer, adapters, ids, max(3, options.rounds // 2))
    print(recorder.table())


def mixed_batch_of_peft(base, adapters: dict[str, Path]):
    (first, path), *others = adapters.items()
    mixed = PeftModel.from_pretrained(copy.deepcopy(base), path, adapter_name=first)
    for name, path in others:
        mixed.load_adapter(path, adapter_name=name)
    return mixed.eval()


def decode(recorder, base, mixer, mixed, arrow, names, cache, batch: int, rounds: int) -> None:
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(batch)
    ids = torch.randint(5, 40000, (batch, 1), generator=torch.Generator().manual_seed(batch))
    calls = {
        "base": Step(base, ids, cache),
        "PEFT adapter_names": Step(mixed, ids, cache, adapter_names=[names[i % EXPERTS] for i in range(batch)]),
        "eff hard": Routed(mixer, "hard", ids, cache),
        "Arrow": Step(arrow, ids, cache),
        "eff sparse": Routed(mixer, "sparse", ids, cache),
    }
    calls["eff hard"].prepare()
    wanted, found = calls["PEFT adapter_names"](), calls["eff hard"]()
    error = float((found - wanted).norm() / wanted.norm())
    moved = float((wanted - calls["base"]()).norm() / wanted.norm())
    print(f"B={batch}: eff hard differs from PEFT's mixed batch by {error:.1e}, that from the base by {moved:.1e}")
    right = {}
    for name in ("base", "Arrow", "eff sparse"):
        calls[name].prepare()
        right[name] = same(calls[name](), calls[name].exactly(), tolerance=1e-4)
    right |= dict.fromkeys(("eff hard", "PEFT adapter_names"), error < 1e-4 < moved)  # one comparison, of the two
    take_times(recorder, f"B={batch}", "decode", calls, rounds, right, lambda name: calls[name].prepare())


def whole_prompt(recorder, base, mixer, adapters: dict[str, Path], ids: torch.Tensor, rounds: int) -> None:
    """X-LoRA refuses a cache: its step is that of the whole sequence."""
    plain = copy.deepcopy(base)
    plain.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=base.config.hidden_size,
        adapters={str(i): str(p) for i, p in enumerate(adapters.values())},  # PEFT knows them by number alone
        top_k_lora=TOP_K, layerwise_scalings=True,
    )  # fmt: skip
    xlora = get_peft_model(plain, config).eval()
    mixer.set_mode("sparse")
    calls = {
        "base": lambda: base(ids, use_cache=False),
        "X-LoRA": lambda: xlora(ids),
        "eff sparse": lambda: mixer.model(ids, use_cache=False),
    }
    models = {"base": base, "X-LoRA": xlora, "eff sparse": mixer.model}
    more = {name: {} if name == "X-LoRA" else {"use_cache": False} for name in models}
    right = {
        name: same(calls[name]().logits, copy.deepcopy(model).double()(ids, **more[name]).logits, tolerance=1e-4)
        for name, model in models.items()
    }
    print(f"as in float64: {right}")
    take_times(recorder, "B=1", f"all {CONTEXT} tokens", calls, rounds, right)


if __name__ == "__main__":
    main()
