"""What a forward has to be told and what is read from it: domains and padding in, probabilities of the routers out.

Nothing of it lies on the modules. A pass belongs to the thread that opened it, and to the modules of one model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from eff_kernels.edit import uncompiled
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RouteRecord:
    """One routed call: logits [N, E], tokens that count bool [N] or None, domains int64 [N] or None.

    Logits, for they are computed in any case: a layer under gradient checkpointing must compute the same in the forward
    and in the backward, where the pass may be closed.
    """

    logits: Tensor
    mask: Tensor | None
    domains: Tensor | None
    lost_gradient: bool

    @property
    def probs(self) -> Tensor:
        """Probabilities of the experts, [N, E]."""
        return self.logits.softmax(-1)


@dataclass(slots=True, eq=False)
class RoutePass:
    """An open ``with mixer.route(...)``.

    Attributes:
        names: The routed modules of the model, by module.
        domains: int64 [B] or [B, T], -1 for none; None if not given.
        mask: bool [B, T], False is padding; None if not given.
        records: By module name, of the latest forward.
        rows: `domains` for tokens of the shapes seen so far: all projections of a forward ask for the same.
    """

    names: Mapping[nn.Module, str]
    domains: Tensor | None = None
    mask: Tensor | None = None
    records: dict[str, RouteRecord] = field(default_factory=dict)
    rows: dict[tuple[torch.Size, torch.device], Tensor] = field(default_factory=dict)

    def record(self, module: nn.Module, logits: Tensor, lead: torch.Size, trains: bool) -> None:
        """Keep the logits [N, E] of a call whose tokens have the shape ``lead``."""
        if _in_backward():  # gradient checkpointing computes the layer again; the first call counts
            return
        mask = None if self.mask is None else per_token(self.mask, lead, "attention_mask")
        domains = None if self.domains is None else per_token(self.domains, lead, "domain_ids")
        self.records[self.names[module]] = RouteRecord(logits, mask, domains, trains and not logits.requires_grad)


_mine: ContextVar[tuple[RoutePass, ...]] = ContextVar("eff_lora_mixer_passes", default=())
_open: list[RoutePass] = []  # of all threads
_lock = threading.Lock()
_SHAPES = 8


@contextmanager
def opened(route: RoutePass) -> Iterator[RoutePass]:
    """Let the forwards of this thread see a pass."""
    token = _mine.set((*_mine.get(), route))
    with _lock:
        _open.append(route)
    try:
        yield route
    finally:
        with _lock:
            _open.remove(route)
        _mine.reset(token)


def current_pass(module: nn.Module) -> RoutePass | None:
    """The innermost open pass of this thread that the module belongs to."""
    # What a thread reads is its own: no compiled code may keep it.
    return uncompiled(_find)(module) if _open else None  # without one, torch.compile sees nothing but an empty list


def _find(module: nn.Module) -> RoutePass | None:
    held = _mine.get()
    if not held and _in_backward():
        # Checkpointed layers of a CUDA device are computed again by a thread of autograd's own.
        with _lock:
            held = tuple(r for r in _open if module in r.names)
        held = held if len(held) == 1 else ()
    return next((r for r in reversed(held) if module in r.names), None)


def domain_rows(route: RoutePass | None, lead: torch.Size, device: torch.device) -> Tensor:
    """The domain of each token, int64 [N, 1], for mode "hard".

    Raises:
        ValueError: there is no open pass, it has no domains, or they do not fit the tokens.
    """
    if route is None or route.domains is None:
        raise ValueError(
            "mode 'hard' needs the domain of each sample: run the model, and with gradient checkpointing the backward "
            "too, inside of `with mixer.route(domain_ids=...)`"
        )
    found = route.rows.get((lead, device))
    if found is None:
        found = per_token(route.domains, lead, "domain_ids").to(device)[:, None]
        if len(route.rows) >= _SHAPES:  # generation asks for few shapes; a long loop may ask for many
            route.rows.clear()
        route.rows[lead, device] = found
    return found


def per_token(values: Tensor, lead: torch.Size, name: str) -> Tensor:
    """Values [B] or [B, T] for tokens of the shape ``lead``, [N].

    Raises:
        ValueError: the shapes do not fit.
    """
    if values.dim() == 1 and len(lead) > 1 and values.shape[0] == lead[0]:
        return values.view(-1, *[1] * (len(lead) - 1)).expand(lead).reshape(-1)
    if values.shape == lead or (values.dim() > 1 and len(lead) == 1 and values.numel() == lead[0]):
        return values.reshape(-1)
    raise ValueError(
        f"{name} of shape {list(values.shape)} does not fit tokens of shape {list(lead)}; "
        "with a cache or beams, give what belongs to the tokens of this forward"
    )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
