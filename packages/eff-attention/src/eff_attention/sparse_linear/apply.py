"""Put sparse-linear attention into a model, whatever library it comes from.

Every attention of transformers ("sdpa"), diffusers, timm, DINO and VGGT ends in one call of PyTorch's
``scaled_dot_product_attention``. Inside the chosen modules `SparseLinearAttention` answers it; projections, norms
and rotary embeddings of the host stay what they are, and so do its state_dict keys.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels import Handle, Report
from eff_kernels.edit import Where, fits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eff_attention.sparse_linear.config import SLAConfig
from eff_attention.sparse_linear.modules import SparseLinearAttention

NAME = "sla"
_FORMAT = "eff-sla-1"


class SLAHandle(Handle):
    """What `apply_sla` returns: ``remove()`` gives the model back, ``report`` lists what was changed and skipped."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def apply_sla(
    model: nn.Module,
    config: SLAConfig | None = None,
    *,
    targets: Where | None = None,
    exclude: Where = (),
    strict: bool = False,
) -> SLAHandle:
    """Let the self-attention of a model run sparse-linear.

    Each chosen module gets a child ``sla`` with the projection of the linear branch, and answers its own call of
    ``scaled_dot_product_attention`` with it. A module that makes no such call (``attn_implementation="eager"``) or has
    a causal mask raises when it runs, since otherwise nothing would have changed.

    Args:
        model: Any module.
        config: The settings, the same for all; `sla_modules` gives each layer's for other ones.
        targets: Pattern, patterns or predicate of the modules; by default those whose class is called
            "...Attention" and that hold no other such module.
        exclude: Patterns or predicate of modules to leave, such as "camera_head.*".
        strict: Whether a skipped module is an error.

    Returns:
        A handle with a report. Modules are skipped whose head dimension cannot be read or that attend to other tokens.

    Raises:
        ValueError: nothing was chosen, or a module has a child ``sla`` already.
    """
    report = Report("apply_sla")
    handle = SLAHandle(report)
    for name, module in _candidates(model, targets):
        if fits(exclude, name, module):
            report.skip(name, "excluded")
        elif getattr(module, "is_cross_attention", False):
            report.skip(name, "attends to other tokens than its own")
        elif (dim := head_dim(module)) is None:
            report.skip(name, f"the head dimension of {type(module).__name__} cannot be read")
        elif NAME in module._modules:
            handle.remove()
            raise ValueError(f"{name} has sparse-linear attention already; remove that first")
        else:
            _attach(handle, module, name, SparseLinearAttention(dim, config, device=_device(module)))
            report.change(name)
    if strict:
        if report.skipped:
            handle.remove()
        report.raise_if_skipped()
    if not report.changed:
        raise ValueError(f"no attention was found to change\n{report}")
    return handle


def sla_modules(model: nn.Module) -> Iterator[tuple[str, SparseLinearAttention]]:
    """Name of the host module and its sparse-linear attention, for each layer that has one."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinearAttention):
            yield name.removesuffix(NAME).removesuffix("."), module


def sla_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The projections of all layers, for an optimiser."""
    for _, module in sla_modules(model):
        yield from module.parameters()


def freeze_backbone(model: nn.Module) -> Handle:
    """Let only the projections require gradients; ``remove()`` restores what each parameter had."""
    handle = Handle()
    kept = {id(p) for p in sla_parameters(model)}
    for p in model.parameters():
        handle.on_remove(functools.partial(p.requires_grad_, p.requires_grad))
        p.requires_grad_(id(p) in kept)
    return handle


def save_sla(model: nn.Module, path: str | Path) -> None:
    """Write the projections and settings of all layers to one safetensors file.

    Raises:
        ValueError: the model has no sparse-linear attention.
    """
    from safetensors.torch import save_file

    layers = dict(sla_modules(model))
    if not layers:
        raise ValueError("the model has no sparse-linear attention to save")
    tensors = {f"{n}.{k}": t.contiguous() for n, m in layers.items() for k, t in m.state_dict().items()}
    settings = {n: m.config.to_dict() for n, m in layers.items()}
    save_file(tensors, path, {"format": _FORMAT, "config": json.dumps(settings)})


def load_sla(model: nn.Module, path: str | Path) -> SLAHandle:
    """Apply what `save_sla` wrote to a model that has none.

    Raises:
        ValueError: the file is not one of `save_sla`, or its layers are not those of the model.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != _FORMAT:
            raise ValueError(f"{path} holds no sparse-linear attention: format {meta.get('format')!r}")
        settings = {n: SLAConfig.from_dict(c) for n, c in json.loads(meta["config"]).items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    missing = sorted(set(settings) - {n for n, _ in model.named_modules()})
    if missing:
        raise ValueError(f"the model has no modules {missing}, which {path} is for")
    handle = apply_sla(model, targets=lambda name, module: name in settings)
    try:
        if handle.report.skipped:
            handle.report.raise_if_skipped()
        for name, module in sla_modules(model):
            module.config = settings[name]
            prefix = f"{name}."
            module.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    except Exception:
        handle.remove()
        raise
    return handle


def head_dim(module: nn.Module) -> int | None:
    """Features of one head of an attention module of any library, or None."""
    for name in ("head_dim", "attention_head_size", "dim_head"):
        if isinstance(value := getattr(module, name, None), int):
            return value
    heads = next((h for n in ("num_heads", "num_attention_heads", "heads") if (h := getattr(module, n, None))), None)
    if not isinstance(heads, int):
        return None
    if isinstance(inner := getattr(module, "inner_dim", None), int):
        return inner // heads
    for name, share in (("qkv", 3), ("to_q", 1), ("q_proj", 1), ("query", 1)):
        if isinstance(linear := getattr(module, name, None), nn.Linear):
            return linear.out_features // share // heads
    return None


def _candidates(model: nn.Module, targets: Where | None) -> list[tuple[str, nn.Module]]:
    named = list(model.named_modules())
    if targets is not None:
        return [(n, m) for n, m in named if fits(targets, n, m)]
    found = {m: n for n, m in named if type(m).__name__.endswith("Attention") and n.rpartition(".")[2] != NAME}
    return [(n, m) for m, n in found.items() if not any(c in found for c in m.modules() if c is not m)]


def _device(module: nn.Module) -> torch.device | None:
    first = next(module.parameters(), None)
    return None if first is None else first.device


class _Routed:
    """The forward of a host module: an object, so that copies and pickles of the host keep to their own weights."""

    def __init__(self, host: nn.Module, name: str) -> None:
        self.host, self.name, self.own = host, name, host.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.own if self.own is not None else functools.partial(type(self.host).forward, self.host)
        attention = self.host._modules[NAME]
        assert isinstance(attention, SparseLinearAttention)
        route = Route(attention, self.name)
        with route:
            out = forward(*args, **kwargs)
        if not route.used:
            raise RuntimeError(
                f"{self.name} ({type(self.host).__name__}) never called scaled_dot_product_attention, so that nothing "
                "of it was sparse; load the model with attn_implementation='sdpa', or exclude the module"
            )
        return out


def _attach(handle: Handle, host: nn.Module, name: str, attention: SparseLinearAttention) -> None:
    routed = _Routed(host, name)

    def restore() -> None:
        if routed.own is None:
            del host.forward
        else:
            host.forward = routed.own
        del host._modules[NAME]

    host.add_module(NAME, attention)
    host.forward = routed
    handle.on_remove(restore)


class Route(TorchFunctionMode):
    """Answers ``scaled_dot_product_attention`` with another attention as long as it is entered."""

    def __init__(self, attention: Callable[..., Tensor], name: str) -> None:
        super().__init__()
        self.attention, self.name, self.used = attention, name, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.used = True
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal:
            raise ValueError(f"{self.name} is causal; sparse-linear attention is not")
        if dropout_p:
            raise NotImplementedError(f"{self.name}: sparse-linear attention has no dropout, got {dropout_p}")
        if attn_mask is not None:
            attention = self.attention
            if not (isinstance(attention, SparseLinearAttention) and attention.config.fallback == "sdpa"):
                raise NotImplementedError(
                    f"{self.name}: sparse-linear attention takes no attention mask; give batches without padding, or "
                    "set fallback='sdpa' to run masked calls dense"
                )
            attention.ran = "masked"
            return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa)
        return self.attention(query, key, value, scale)
