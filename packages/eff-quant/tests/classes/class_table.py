"""One table of model classes x formats: what `quantize_`, saving, loading, generating and adapters give on each class.

A row is a class of transformers or diffusers with a tiny random configuration. What cannot be right in a cell is named
in the row with the text of the refusal, which is checked as well.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_quant import (
    FP4Config,
    FP8Config,
    Int8Config,
    W4A8Config,
    count_parameters,
    dequantize_,
    load,
    merge_lora,
    quantize_,
)
from eff_quant.layer import QuantizedLinear
from torch import Tensor, nn

FORMATS: dict[str, Any] = {
    # Otherwise outlier columns are those of a whole call, and a token's result depends on the others in it.
    "int8": Int8Config(per_token_outliers=True),
    "fp8": FP8Config(),
    "mxfp4": FP4Config(format="mxfp4"),
    "nvfp4": FP4Config(format="nvfp4"),
    "w4a8": W4A8Config(rotation="hadamard"),
}

# What rounding the weights may do to the outputs of models whose weights are all random: a bound on the relative error
# that a layer with wrong numbers breaks by far. The exact checks compare with the dequantised model.
FAR = {"int8": 0.1, "fp8": 0.4, "mxfp4": 1.2, "nvfp4": 1.2, "w4a8": 1.2}
# Beside the dequantised model: int8 and w4a8 round their activations to eight bits, the others leave them.
NEAR = {"int8": 0.1, "fp8": 1e-3, "mxfp4": 1e-3, "nvfp4": 1e-3, "w4a8": 0.1}


@dataclass(frozen=True, kw_only=True)
class ModelClass:
    """A row.

    Attributes:
        name: Of the class, in transformers or diffusers.
        kind: Heading of the page under which it stands.
        make: A tiny model, before it gets its random weights.
        inputs: ``inputs(seed)``: keyword arguments of the model.
        output: The tensor to look at, from what the model returns.
        prompt: Keyword arguments of ``generate``; None if the class does not generate.
        cannot: By (format or "*", step): a regular expression for the text of the refusal.
        without_adapter: Last parts of the names of layers to which PEFT itself adds none.
        note: What a reader of the page should know.
    """

    name: str
    kind: str
    make: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    output: Callable[[Any], Tensor]
    prompt: Callable[[], dict[str, Any]] | None = None
    cannot: Mapping[tuple[str, str], str] = field(default_factory=dict)
    without_adapter: tuple[str, ...] = ()
    note: str = ""

    def refusal(self, format: str, step: str) -> str | None:
        """The text with which a step is refused, or None."""
        return self.cannot.get((format, step), self.cannot.get(("*", step)))

    @functools.cached_property
    def model(self) -> Any:
        """A model in evaluation mode with weights that keep numbers about as large as they were; not to be changed."""
        torch.manual_seed(0)
        model = self.make().eval()
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim >= 2:
                fan = weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()
                nn.init.normal_(weight, std=fan**-0.5)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.normal_(bias, std=0.1)
        return model

    def fresh(self) -> Any:
        """A copy of the model."""
        return copy.deepcopy(self.model)

    @torch.no_grad()
    def run(self, model: Any, seed: int = 0) -> Tensor:
        """The output of a model."""
        return self.output(model(**self.inputs(seed))).float()

    @functools.cached_property
    def wanted(self) -> Tensor:
        """The output of the float model."""
        return self.run(self.model)


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative error."""
    return float((found - wanted).norm() / wanted.norm())


def same(a: nn.Module, b: nn.Module) -> None:
    """Two models hold the same bytes under the same names."""
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype, name
        assert torch.equal(raw(x[name]), raw(y[name])), name


class Cell:
    """One class in one format; the quantised model is made once."""

    def __init__(self, row: ModelClass, format: str, folder: Any) -> None:
        self.row, self.format, self.config, self.folder = row, format, FORMATS[format], folder

    @functools.cached_property
    def model(self) -> Any:
        """The quantised model; not to be changed."""
        model = self.row.fresh()
        self.report = quantize_(model, self.config)
        return model

    def in_place(self) -> None:
        """Outputs are those of the dequantised model, heads stay float, and parameters count as before."""
        row, model = self.row, self.model
        found = row.run(model)
        assert self.report.changed
        assert all(e.reason for e in self.report.skipped)
        assert 0 < distance(found, row.wanted) < FAR[self.format]
        heads = {n for n, m in row.model.named_modules() if n in ("score", "classifier", "lm_head", "qa_outputs")}
        assert not heads & layers(model).keys()
        assert count_parameters(model) == model.num_parameters() == row.model.num_parameters()
        plain = copy.deepcopy(model)
        dequantize_(plain)
        assert not layers(plain)
        assert distance(found, row.run(plain)) < NEAR[self.format]

    def save_and_load(self) -> None:
        """A saved model is loaded with the same bytes, by `load` and by ``from_pretrained``, and answers the same."""
        self.model.save_pretrained(self.folder / "quantised")
        again = load(self.folder / "quantised").eval()
        same(again, self.model)
        assert torch.equal(self.row.run(again), self.row.run(self.model))
        same(type(self.model).from_pretrained(self.folder / "quantised"), self.model)

    def while_loading(self) -> None:
        """Quantising float weights as they are read gives the bytes of quantising in place."""
        self.row.model.save_pretrained(self.folder / "float")
        same(load(self.folder / "float", self.config), self.model)

    def generate(self) -> None:
        """With a cache and without, a model generates the same tokens."""
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        prompt = self.row.prompt()
        found = self.model.generate(**prompt, **options)
        assert found.shape[1] >= 4
        assert torch.equal(self.model.generate(**prompt, **options, use_cache=False), found)

    def lora(self) -> None:
        """Gradients of adapters on all layers are those on the dequantised model; a step changes adapters alone."""
        import peft

        adapted = self._adapted(self.model, peft)
        plain = copy.deepcopy(self.model)
        dequantize_(plain)
        plain = self._adapted(plain, peft)
        found, wanted = (self._gradients(m) for m in (adapted, plain))
        assert found.keys() == wanted.keys()
        reached = {n for n, g in wanted.items() if g.norm() > 0}
        assert len(reached) > 0.5 * len(wanted)
        assert reached == {n for n, g in found.items() if g.norm() > 0}
        whole = [torch.cat([g[n].flatten() for n in wanted]) for g in (found, wanted)]
        assert distance(*whole) < 5 * NEAR[self.format]
        before = {n: t.clone() for n, t in adapted.state_dict().items()}
        trained = [p for p in adapted.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=0.1).step()
        for name, tensor in adapted.state_dict().items():
            moved = not torch.equal(raw(tensor), raw(before[name]))
            assert moved == (name in reached), name

    def merge(self) -> None:
        """Merging quantises base plus update again, by `merge_lora` and by PEFT itself, and answers nearly the same."""
        import peft

        adapted = self._adapted(self.model, peft)
        parts = {n: m for n, m in adapted.named_modules() if hasattr(m, "base_layer")}
        assert parts.keys() == {f"base_model.model.{name}" for name in self._targets()}
        wanted = {}
        for name, part in parts.items():
            base, delta = part.base_layer, part.get_delta_weight("default").detach()
            total = base.dequantize(torch.float32) + delta
            wanted[name.removeprefix("base_model.model.")] = base.requantized_tensors(total)
        theirs = copy.deepcopy(adapted).merge_and_unload()
        ours, report = merge_lora(adapted)
        assert len(report.changed) == len(parts)
        for merged in (ours, theirs):
            for name, layer in layers(merged).items():
                if name not in wanted:  # without an adapter
                    assert torch.equal(raw(layer.dequantize()), raw(layers(self.model)[name].dequantize())), name
                    continue
                for leaf, tensor in wanted[name].items():
                    assert torch.equal(raw(getattr(layer, leaf)), raw(tensor)), name

    def _targets(self) -> list[str]:
        return sorted(n for n in layers(self.model) if n.rpartition(".")[2] not in self.row.without_adapter)

    def _adapted(self, model: Any, peft: Any) -> Any:
        """A copy of a model with the same random adapters on all layers that are quantised."""
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=self._targets())
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.05)
        return adapted.eval()

    def _gradients(self, adapted: Any) -> dict[str, Tensor]:
        out = self.row.output(adapted(**self.row.inputs(1))).float()
        # Some outputs have a fixed length, which has no gradient.
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        named = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}


STEPS = ("in_place", "save_and_load", "while_loading", "generate", "lora", "merge")


def load_rows() -> list[ModelClass]:
    """All rows."""
    import class_rows_diffusion
    import class_rows_media
    import class_rows_text

    return [*class_rows_text.ROWS, *class_rows_media.ROWS, *class_rows_diffusion.ROWS]
