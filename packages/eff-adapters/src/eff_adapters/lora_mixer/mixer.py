"""A mixture on a model: its modes, losses and numbers, its files, and its end."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from eff_kernels.edit import Handle, Report, replace_module
from torch import Tensor, nn

from eff_adapters.lora_mixer.config import LoraMixerConfig, Mode
from eff_adapters.lora_mixer.edit_experts import add_expert, remove_expert
from eff_adapters.lora_mixer.files import load_routers, save_lora_mixer
from eff_adapters.lora_mixer.layer import RoutedLoraLinear, Router
from eff_adapters.lora_mixer.losses import specialization_balance_loss
from eff_adapters.lora_mixer.passes import RoutePass, opened
from eff_adapters.lora_mixer.stats import RouteStats, route_stats

_STATE = "_eff_lora_mixer"
_latest: ContextVar[tuple[Any, RoutePass] | None] = ContextVar("eff_lora_mixer_latest", default=None)


class MixerLosses(NamedTuple):
    """Scalars of one forward.

    Attributes:
        total: The weighted sum, to add to the loss of a task.
        balance, entropy: Without weights, the means over the routed projections; entropy in nats.
        preserve: Without weight, the squared distance of held experts from their start.
    """

    total: Tensor
    balance: Tensor
    entropy: Tensor
    preserve: Tensor


@dataclass(slots=True)
class MixerState:
    """What a model remembers of its mixture, in copies and pickles too.

    Attributes:
        config: The settings.
        names: Of the experts, in order.
        settings: Of PEFT, by expert.
        trainable: Parameters of the base that had a gradient before.
    """

    config: LoraMixerConfig
    names: list[str]
    settings: dict[str, dict[str, Any]]
    trainable: frozenset[str]


class LoraMixer(Handle):
    """The mixture on a model; made by `apply_lora_mixer`, `load_lora_mixer`, or for a copy by its own constructor.

    Args:
        model: A model that has a mixture, such as a copy of the one that it was applied to.

    Raises:
        ValueError: the model has none.
    """

    def __init__(self, model: nn.Module, report: Report | None = None) -> None:
        super().__init__(report)
        if not hasattr(model, _STATE):
            raise ValueError(f"this {type(model).__name__} has no mixture; apply_lora_mixer makes one")
        self.model = model
        self._names: dict[nn.Module, str] | None = None  # to walk through a model takes a tenth of a decoding step
        self.on_remove(self._restore)

    @classmethod
    def install(
        cls, model: nn.Module, layers: Mapping[str, RoutedLoraLinear], state: MixerState, report: Report
    ) -> Self:
        """Put layers that are ready into a model."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            replace_module(model, name, layer)
        setattr(model, _STATE, state)
        mixer = cls(model, report)
        mixer.set_trainable(experts=state.config.expert_mode == "joint", routers=True)
        return mixer

    @property
    def state(self) -> MixerState:
        """What the model remembers of the mixture."""
        found: MixerState | None = getattr(self.model, _STATE, None)
        if found is None:
            raise ValueError("the mixture was removed from the model")
        return found

    @property
    def config(self) -> LoraMixerConfig:
        """The settings."""
        return self.state.config

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in order."""
        return tuple(self.state.names)

    @property
    def layers(self) -> dict[str, RoutedLoraLinear]:
        """The routed projections by name."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, RoutedLoraLinear)}

    @property
    def routers(self) -> dict[str, Router]:
        """The routers, each by the name of the first projection that has it."""
        found: dict[Router, str] = {}
        for name, layer in self.layers.items():
            found.setdefault(layer.router, name)
        return {name: router for router, name in found.items()}

    def set_mode(self, mode: Mode) -> None:
        """Choose the gates of all projections: "soft", "sparse" or "hard"; see `RoutedLoraLinear`."""
        for layer in self.layers.values():
            layer.set_mode(mode)

    def set_trainable(self, *, experts: bool | Sequence[str] | None = None, routers: bool | None = None) -> None:
        """Say what gets a gradient: all experts, none or those named; the routers or not. None leaves it as it is.

        Optimizers must be rebuilt after this, with `parameter_groups`.

        Raises:
            ValueError: no expert of that name.
        """
        if experts is not None:
            named = self.experts if experts is True else () if experts is False else tuple(experts)
            self.indices(named)
            for layer in self.layers.values():
                layer.train_experts([n in named for n in self.experts])
        if routers is not None:
            for router in self.routers.values():
                router.weight.requires_grad_(routers)

    def parameter_groups(self, *, expert_lr: float = 2e-4, router_lr: float = 1e-3) -> list[dict[str, Any]]:
        """Groups for an optimizer: what is trainable of experts and routers, without weight decay (rates are ours)."""
        factors = [f for layer in self.layers.values() for f in (layer.lora_A, layer.lora_B) if f.requires_grad]
        weights = [r.weight for r in self.routers.values() if r.weight.requires_grad]
        groups = ((factors, expert_lr, "experts"), (weights, router_lr, "routers"))
        return [{"params": p, "lr": lr, "weight_decay": 0.0, "name": name} for p, lr, name in groups if p]

    @contextmanager
    def route(
        self,
        *,
        domain_ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[RoutePass]:
        """Tell the forwards inside, in this thread, whose samples they see, and remember what the routers say.

        Args:
            domain_ids: The expert of each sample (its number or name; -1: none), [B], or of each token, [B, T]. Mode
                "hard" needs it; in the others `stats` counts by it.
            attention_mask: [B, T], 0 at padding, which no loss counts.

        Raises:
            ValueError: a domain that is no expert.
        """
        domains = None if domain_ids is None else self._domains(domain_ids)
        mask = None if attention_mask is None else attention_mask != 0
        if self._names is None:
            self._names = {m: n for n, m in self.layers.items()}
        found = RoutePass(self._names, domains, mask)
        with opened(found):
            _latest.set((weakref.ref(self.model), found))
            yield found

    def losses(self) -> MixerLosses:
        """The losses of the last forward inside of `route` in this thread.

        Under data parallel training each process balances its own tokens.

        Raises:
            RuntimeError: there was none, it ran in mode "hard" (where `preserve` is what there is), or reentrant
                gradient checkpointing has cut the routers off.
        """
        records = self._records()
        config = self.config
        if any(r.lost_gradient and torch.is_grad_enabled() for r in records.values()):
            raise RuntimeError(
                "the forward ran without gradients, as with reentrant checkpointing: this loss would teach nothing; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}, or no_grad to read numbers only"
            )
        found = [
            specialization_balance_loss(
                r.probs, r.mask, balance_coef=config.balance_coef, entropy_coef=config.entropy_coef,
                mode=config.entropy_mode, usage_k=config.usage_k, scale_balance=config.scale_balance,
            )
            for r in records.values()
        ]  # fmt: skip
        device = found[0].total.device
        total, balance, entropy = (torch.stack([v.to(device) for v in one]).mean() for one in zip(*found, strict=True))
        preserve = self.preservation().to(device)
        if config.preserve_coef:
            total = total + config.preserve_coef * preserve
        return MixerLosses(total, balance, entropy, preserve)

    def preservation(self) -> Tensor:
        """Sum over the held experts of the squared distance from where they started (``preserve_coef``), a scalar."""
        parts = [layer.distance() for layer in self.layers.values()]
        return torch.stack([p.to(parts[0].device) for p in parts]).sum()

    def stats(self) -> dict[str, RouteStats]:
        """Numbers of the last forward inside of `route` in this thread, by projection.

        Raises:
            RuntimeError: there was none with a router.
        """
        return {n: route_stats(r, len(self.experts), self.config.top_k) for n, r in self._records().items()}

    def indices(self, names: Sequence[str]) -> list[int]:
        """Numbers of experts.

        Raises:
            ValueError: no expert of that name.
        """
        if unknown := [n for n in names if n not in self.state.names]:
            raise ValueError(f"no expert {unknown[0]!r}; the experts are {self.state.names}")
        return [self.state.names.index(n) for n in names]

    def expert_weights(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors (a [r, in], b [out, r]) of one expert by projection, without padding; they share memory."""
        (index,) = self.indices([name])
        return {
            n: (
                layer.lora_A.detach()[index, : layer.ranks[index]],
                layer.lora_B.detach()[index, :, : layer.ranks[index]],
            )
            for n, layer in self.layers.items()
            if layer.ranks[index]
        }

    def add_expert(self, name: str, source: Any) -> None:
        """Add an expert, last in order, with new router rows; optimizers must be rebuilt.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `apply_lora_mixer`; nothing has changed then.
        """
        add_expert(self, name, source)

    def remove_expert(self, name: str) -> None:
        """Take an expert away. Projections that have no other are no longer routed; optimizers must be rebuilt.

        Raises:
            ValueError: no expert of that name, or too few would be left for ``top_k``; nothing has changed then.
        """
        remove_expert(self, name)
        self._names = None  # projections may be routed no more

    def save_pretrained(self, folder: str | Path) -> None:
        """Write each expert as a folder of PEFT, ``routers.safetensors``, and last ``mixer_config.json``."""
        save_lora_mixer(self, folder)

    def load_routers(self, file: str | Path) -> None:
        """Take routers from ``routers.safetensors`` of another mixture, such as one on another base of these sizes.

        Raises:
            ValueError: routers are missing, there are others, or shapes differ; nothing has changed then.
        """
        load_routers(self, file)

    def _records(self) -> dict[str, Any]:
        held = _latest.get()
        records = held[1].records if held is not None and held[0]() is self.model else {}
        if not records:
            raise RuntimeError(
                "no router has run: run the model inside of `with mixer.route():`, in mode 'soft' or 'sparse', in this "
                "thread, before asking for its losses or numbers"
            )
        return records

    def _domains(self, given: Tensor | Sequence[int] | Sequence[str]) -> Tensor:
        if not isinstance(given, Tensor):
            named = any(isinstance(v, str) for v in given)
            given = torch.tensor(self.indices([str(v) for v in given]) if named else list(given))
        if given.is_floating_point() or given.dim() not in (1, 2):
            raise ValueError(f"domain_ids must be whole numbers [B] or [B, T], got {given.dtype} {list(given.shape)}")
        if given.numel() and not (int(given.min()) >= -1 and int(given.max()) < len(self.experts)):
            raise ValueError(
                f"domain_ids must be from -1 (none) to {len(self.experts) - 1}, "
                f"got {int(given.min())} to {int(given.max())}"
            )
        return given.long()

    def _restore(self) -> None:
        self._names = None
        if not hasattr(self.model, _STATE):
            return
        trainable = self.state.trainable
        for name, layer in self.layers.items():
            replace_module(self.model, name, layer.base_layer)
        delattr(self.model, _STATE)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
