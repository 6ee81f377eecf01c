"""The experts of a mixture as codes: the module that stands where transformers had one of stacked parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Self

import torch
from eff_kernels.edit import uncompiled
from torch import Tensor, nn

from eff_quant.buffers import as_integers, dtype_after
from eff_quant.experts.launch import ExpertProduct, one_launch, sort
from eff_quant.experts.route import combine, grouped, route
from eff_quant.experts.stack import Form, Stack
from eff_quant.layer import StackedCodes, WeightView
from eff_quant.linears import carry_hooks
from eff_quant.stacked import matrices, matrix_shapes, refusal, stacks_of

# What belongs to the old module itself and not to its place in the model: hooks are carried over apart.
_OWN = ("_parameters", "_buffers", "_modules", "forward", "_old_forward", "_hf_hook")


class QuantizedExperts(nn.Module):
    """Experts whose matrices are codes: each token reads those of the experts that it is sent to, and no others.

    It takes the place of a module with stacked 3-D parameters (Mixtral, Qwen-MoE, gpt-oss, DeepSeek and the other
    classes of transformers' experts interface), gates as its class does, and keeps its attributes, biases and inner
    modules. Each matrix is held as a layer of the method holds its weight, with an axis for the experts in front: the
    buffers ``gate_up_proj_weight`` int8 [E, N, K] and ``gate_up_proj_SCB`` [E, N] of int8, and so on, are the state
    dict. Codes get no gradient; inputs, routing weights and biases do. Moving or casting quantises nothing.

    ``experts.gate_up_proj`` is the float weight that a stack stands for, in the shape that the class has for it (see
    `eff_quant.layer.WeightView`); a float weight that is assigned is quantised.

    Attributes:
        quantization: Settings of the method.
        source: Class of the module whose place this takes.
        forms: How the matrices of each stack are held, by name.
    """

    # transformers has nothing to initialise here
    _is_hf_initialized = True

    num_experts: int
    is_transposed: bool
    has_bias: bool
    quantization: Any
    source: Any
    forms: dict[str, Form]
    dtype: torch.dtype
    parameter_order: tuple[str, ...]

    @classmethod
    def empty_like(cls, module: nn.Module, config: Any, *, device: torch.device | str | None = None) -> Self:
        """Unfilled experts for the place of ``module``, on its device unless one is named.

        Raises:
            TypeError: this is not a module of stacked experts, or of a kind that cannot be held as codes.
        """
        if reason := refusal(module):
            raise TypeError(f"cannot quantise a {type(module).__name__}: it {reason}")
        new = cls()
        stacks = stacks_of(module)
        first = next(iter(stacks.values()))
        for name, value in module.__dict__.items():
            if name not in _OWN:
                new.__dict__[name] = value
        new.__dict__["_parameters"] = {n: p for n, p in module._parameters.items() if n not in stacks}
        new.__dict__["_buffers"] = dict(module._buffers)
        new.__dict__["_modules"] = dict(module._modules)
        new.quantization, new.source, new.dtype = config, type(module), first.dtype
        new.parameter_order = tuple(module._parameters)
        new.forms = {name: Form(n, k, config, first.dtype) for name, (n, k) in matrix_shapes(module).items()}
        for name, form in new.forms.items():
            for stored, tensor in form.empty(new.num_experts, device or first.device).items():
                new.register_buffer(f"{name}_{stored}", tensor)
        carry_hooks(module, new)
        return new

    @classmethod
    def from_experts(cls, module: nn.Module, config: Any) -> Self:
        """Quantise a module of stacked experts, which is left as it was; biases, inner modules and hooks are shared.

        Raises:
            TypeError: see `empty_like`.
            ValueError: a weight holds inf or NaN; the message names the stack and the expert.
        """
        new = cls.empty_like(module, config, device="meta")
        for name, weight in stacks_of(module).items():
            new.fill(name, weight)
        return new

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a module of the class that was there, with dequantised weights, in float32 by default."""
        module: nn.Module = self.source.__new__(self.source)
        codes = self._code_names()
        for name, value in self.__dict__.items():
            if name not in (*_OWN, "quantization", "source", "forms", "dtype", "parameter_order"):
                module.__dict__[name] = value
        floats: dict[str, Any] = {
            n: nn.Parameter(Stack(self, n).dequantize(dtype or torch.float32)) for n in self.forms
        }
        held = {**floats, **self._parameters}
        order = [n for n in self.parameter_order if n in held]
        module.__dict__["_parameters"] = {n: held[n] for n in dict.fromkeys((*order, *held))}
        module.__dict__["_buffers"] = {n: t for n, t in self._buffers.items() if n not in codes}
        module.__dict__["_modules"] = dict(self._modules)
        carry_hooks(self, module)
        return module

    def float_shapes(self) -> dict[str, tuple[int, ...]]:
        """The float weights that a checkpoint has for these experts, by the last part of their names."""
        return {name: Stack(self, name).weight_shape for name in self.forms}

    def quantized(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The buffers, by name, that hold another float weight of a stack, in the orientation of the class."""
        try:
            new = self.forms[name].quantize(matrices(self, weight))
        except ValueError as error:
            raise ValueError(f"{name}, {error}") from error
        return {f"{name}_{stored}": tensor for stored, tensor in new.items()}

    def fill(self, name: str, weight: Tensor) -> None:
        """Quantise a float weight into a stack."""
        for buffer, tensor in self.quantized(name, weight).items():
            setattr(self, buffer, tensor)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a stack holds, by names in files."""
        held = self._buffers
        return {s: t for s in self.forms[name].names.values() if (t := held[f"{name}_{s}"]) is not None}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send tokens through their experts.

        Args:
            hidden_states: [T, H].
            top_k_index: Experts of each token, [T, k]; numbers from ``num_experts`` on stand for none.
            top_k_weights: Of each choice, [T, k].

        Returns:
            [T, H], sum of the weighted outputs of each token's experts.
        """
        result: Tensor = uncompiled(self._run)(hidden_states, top_k_index, top_k_weights)
        return result

    def _run(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if one_launch(hidden, self.quantization):
            stacks = {name: codes for name in self.forms if (codes := self._stacked(name)) is not None}
            if len(stacks) == len(self.forms):
                return self._run_at_once(hidden, ids, weights, stacks)
        order, runs = route(ids, self.num_experts)
        if not runs:
            return torch.zeros_like(hidden)
        y = self._chain(hidden[order // ids.shape[1]], lambda name, x: grouped(x, runs, self._product(name)))
        return combine(y, order, weights).to(hidden.dtype)

    def _run_at_once(self, hidden: Tensor, ids: Tensor, weights: Tensor, stacks: Mapping[str, StackedCodes]) -> Tensor:
        order, offsets = sort(ids, self.num_experts)

        def product(name: str, x: Tensor) -> Tensor:
            bias = self._parameters[f"{name}_bias"] if self.has_bias else None
            dtype = self.quantization.out_dtype or x.dtype
            result: Tensor = ExpertProduct.apply(x, bias, stacks[name], offsets, dtype)
            return result

        y = self._chain(hidden[order // max(ids.shape[1], 1)], product)
        return combine(y, order, weights.masked_fill(ids >= self.num_experts, 0)).to(hidden.dtype)

    def _chain(self, x: Tensor, product: Callable[[str, Tensor], Tensor]) -> Tensor:
        """What experts make of their sorted rows."""
        for name in self.forms:
            x = product(name, x)
            if name != "down_proj":
                x = self.source._apply_gate(self, x) if name == "gate_up_proj" else self.act_fn(x)
        return self.post_expert_norm(x) if getattr(self, "has_post_expert_norm", False) else x

    def _stacked(self, name: str) -> StackedCodes | None:
        """How one kernel reads a stack; None if there is none for the settings."""
        form, held = self.forms[name], self.tensors(name)
        return form.layer.stacked({own: held[stored] for own, stored in form.names.items()}, form.config)

    def _product(self, name: str) -> Callable[[int, Tensor], Tensor]:
        form, tensors = self.forms[name], self.tensors(name)
        bias = self._parameters[f"{name}_bias"] if self.has_bias else None
        return lambda expert, x: form.multiply(x, tensors, expert, None if bias is None else bias[expert])

    def _code_names(self) -> list[str]:
        """The buffers that hold the stacks; others came with the module."""
        return [f"{name}_{stored}" for name, form in self.forms.items() for stored in form.names.values()]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return next(iter(self.tensors("down_proj").values())).device

    @property
    def num_hidden_parameters(self) -> int:
        """How many weights the codes stand for."""
        return sum(self.num_experts * n * k for n, k in (form.like.weight_shape for form in self.forms.values()))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of `nn.Module`: biases and what inner modules have.

        Raises:
            ValueError: PEFT asks, and its ``target_parameters`` names a stack of codes.
        """
        refuse_adapters(self.forms, sys._getframe(1))
        return super().named_parameters(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("forms", ()) and name not in self._buffers:
            return WeightView(Stack(self, name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("forms", ()) and isinstance(value, Tensor):
            Stack(self, name).set_weight(value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = dtype_after(fn, self.dtype, self.device)
        with as_integers(self, self._code_names()):
            super()._apply(fn, recurse)
        return self

    def check_entries(self, name: str, entries: Mapping[str, Tensor]) -> None:
        """Check what a checkpoint holds for these experts, by names in the state dict.

        Raises:
            KeyError: a tensor is missing.
            TypeError: a wrong dtype, or float weights.
            ValueError: a wrong shape or value.
        """
        for stack, form in self.forms.items():
            if stack in entries:
                found = entries[stack].dtype
                raise TypeError(
                    f"{name}: the checkpoint holds {stack} in {found}, wanted codes; quantise after loading"
                )
            held = {stored: entries.get(f"{stack}_{stored}") for stored in form.names.values()}
            form.check(f"{name}.{stack}", held, self.num_experts)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        entries = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        biases = {f"{name}_bias" for name in self.forms}
        if any(key.startswith(tuple(self.forms)) for key in entries.keys() - biases):
            self.check_entries(prefix.removesuffix(".") or "the experts", entries)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        shapes = ", ".join(f"{n}={list(Stack(self, n).weight_shape)}" for n in self.forms)
        return f"{self.source.__name__}: {shapes}, {self.quantization}"


def refuse_adapters(stacks: Iterable[str], caller: FrameType) -> None:
    """Raise ValueError if PEFT looks here for a parameter that is codes now.

    PEFT walks through the parameters of each module to find those of ``target_parameters``, and says nothing of one
    that is missing as long as any other is there. Who asks is the one thing that tells its search from other calls.

    Args:
        stacks: Names of the stacks.
        caller: Frame of the function that asks.
    """
    if caller.f_code.co_name != "_inject_parameters" or not caller.f_globals["__name__"].startswith("peft."):
        return
    config, name = caller.f_locals["peft_config"], caller.f_locals["module_name"]
    for stack in stacks:
        for target in config.target_parameters or ():
            if f".{name}.{stack}".endswith(f".{target}"):
                raise ValueError(
                    f"target_parameters has {target!r}, but {name}.{stack} holds codes, which have no such adapters; "
                    "leave these experts in float (skip) or make them float again (dequantize_)"
                )


def check_no_experts(model: nn.Module, what: str) -> None:
    """Raise ValueError if a model has quantised experts, which a format of other libraries does not hold as we do."""
    name = next((n for n, m in model.named_modules() if isinstance(m, QuantizedExperts)), None)
    if name is not None:
        raise ValueError(
            f"{name} holds stacked experts in our own form, which {what} does not read; use save_pretrained, "
            "or leave the experts out with skip"
        )
