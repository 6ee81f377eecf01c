"""The rules of attention of one sequence in the decoder, and what they know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from eff_attention.grounded_attention import PAIConfig, PAINTConfig
from eff_attention.grounded_attention.functional import chosen
from eff_attention.grounded_attention.rule import PAINTKeeper, PAINTRule
from eff_attention.head_reinforcement import VHRConfig
from eff_attention.head_reinforcement.keeper import Measuring, VHRKeeper
from eff_attention.head_reinforcement.rule import VHRRule
from eff_attention.passes import Keeper, Pass
from eff_attention.sink_calibration import ACTConfig
from eff_attention.sink_calibration.frame import Pass as ACTPass
from eff_attention.sink_calibration.rule import ARGUMENT as ACT_ARGUMENT
from eff_attention.sink_calibration.rule import CalibrationRule
from eff_attention.sink_calibration.statistics import SinkCounts
from eff_attention.visual_sinks import VARConfig
from eff_attention.visual_sinks.functional import sink_mask
from eff_attention.visual_sinks.rule import VARRule
from eff_attention.visual_sinks.statistics import VARCounts
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, Role, TokenRoles, Tokens
from eff_kernels.edit.attention.stack import Entry, Stack
from torch import Tensor, nn

from eff_serve.engine.watch import PictureWatch

_NOWHERE = nn.Identity()  # calls name their module; the rules do not ask it anything
_VAR = Keeper.named("visual_sinks", None)


class Steered:
    """The rules of one sequence, and what they know of it.

    Args:
        num_layers: Layers of the decoder.
        prompt_length: Tokens of the prompt.
        places: Where pictures stand in it.
    """

    def __init__(self, num_layers: int, prompt_length: int, places: Tensor | None) -> None:
        self.prompt_length = prompt_length
        self._stacks = [Stack(f"layers.{i}", i) for i in range(num_layers)]
        self._role = torch.full((1, prompt_length), int(Role.TEXT), dtype=torch.int8)
        if places is not None:
            self._role[:, : int(places[0])] = int(Role.SYSTEM)
            self._role[:, places] = int(Role.PICTURE)
        self._states: dict[str, dict[Any, Any]] = {}
        # By method, what its passes over the prompt know from tokens start to end.
        self._notes: dict[str, Callable[[int, int], dict[str, Any]]] = {}
        self._watched: dict[int, tuple[tuple[int, ...], float]] = {}
        self._readers: set[int] = set()  # layers with a rule that looks at keys in every step
        self._pass: dict[str, Any] = {}
        self._roles: TokenRoles | None = None

    def add_act(self, config: ACTConfig, heads: dict[int, tuple[int, ...]]) -> None:
        """Calibrate these heads, by layer."""
        self._states[ACT_ARGUMENT] = {}
        rule = CalibrationRule(config, heads, SinkCounts())
        self._add(rule, heads)
        self._readers |= set(heads)

    def add_var(self, config: VARConfig, dims: tuple[int, ...], tau: float) -> None:
        """Redistribute attention to sinks, which are huge in these dimensions."""
        layers = config.layers(len(self._stacks))
        self._states[_VAR.argument] = {}
        self._add(VARRule(config, _VAR, VARCounts()), layers)
        self._watched = dict.fromkeys(layers, (dims, tau))

    def add_vhr(self, config: VHRConfig, without: dict[int, Tensor]) -> None:
        """Strengthen heads; ``without`` is what they give without the picture, by layer [1, H, D]."""
        keeper: VHRKeeper = VHRKeeper.named("head_reinforcement", None, config=config)
        self._states[keeper.argument] = {}
        self._add(VHRRule(keeper), config.chosen(len(self._stacks)))
        reference = Measuring(torch.tensor([True]), outputs=without)
        self._notes[keeper.argument] = lambda start, end: {"reference": reference}

    def add_raised(
        self, config: PAIConfig, saliency: Tensor | None, gains: tuple[tuple[float, ...], ...] | None
    ) -> None:
        """Raise attention to pictures: all of their tokens, or by PAINT those that ``saliency`` chooses."""
        keeper: PAINTKeeper = PAINTKeeper.named("grounded_attention", None, config=config)
        layers = config.layers(len(self._stacks))
        picture = self._role == int(Role.PICTURE)
        among = torch.stack([picture, torch.zeros_like(picture)])
        if isinstance(config, PAINTConfig):
            assert saliency is not None
            first, late = saliency  # [pictures, tokens] each
            among = torch.zeros_like(among)
            among[:, picture] = torch.stack([x.flatten() for x in chosen(first, late, None, config)])
        self._states[keeper.argument] = {}
        self._notes[keeper.argument] = lambda start, end: {"chosen": among[:, :, start:end]}
        self._add(PAINTRule(keeper, gains), layers)
        self._readers |= set(layers)

    def add_watch(self, watch: PictureWatch, layers: tuple[int, ...], places: Tensor) -> None:
        """Note what these layers attend to in the picture at ``places``."""
        watch.begin(layers, places)
        for layer in layers:
            self._stacks[layer].add(Entry(watch.note, observes=True))
        self._readers |= set(layers)

    def _add(self, rule: Any, layers: Iterable[int]) -> None:
        for layer in layers:
            stack = self._stacks[layer]
            stack.add(Entry(rule, order=float(len(stack.entries))))

    def begin(self, position: int, count: int) -> None:
        """Make ready for a pass over ``count`` tokens from ``position`` on."""
        end = position + count
        if self._role.shape[1] < end:
            more = self._role.new_full((1, end - self._role.shape[1]), int(Role.GENERATED))
            self._role = torch.cat([self._role, more], 1)
        queries, keys = _tokens(self._role[:, position:end]), _tokens(self._role[:, :end])
        self._roles = roles = TokenRoles(queries, keys, position, 0, self.prompt_length)
        prompt = position < self.prompt_length
        self._pass = {}
        for name, states in self._states.items():
            if name == ACT_ARGUMENT:
                self._pass[name] = ACTPass(states)
                continue
            now = self._pass[name] = Pass(states, roles, prompt)
            if prompt and name in self._notes:
                now.notes.update(self._notes[name](position, end))

    def watch(self, layer: int, hidden: Tensor) -> None:
        """Look at the hidden states [T, hidden] that enter a layer, for `begin`'s tokens."""
        found = self._watched.get(layer)
        if found is not None and self._pass[_VAR.argument].prompt:
            self._pass[_VAR.argument].notes[layer] = sink_mask(hidden[None], *found)

    def attend(
        self, layer: int, q: Tensor, out: Tensor, keys_and_values: Callable[[], tuple[Tensor, Tensor]], kv_heads: int
    ) -> Tensor:
        """A layer's output [T, H, D] under the rules.

        Args:
            layer: Its number.
            q: Queries [T, H, D] after the rotation.
            out: What the decoder's own kernel gave [T, H, D].
            keys_and_values: Gives all keys and values, [G, S, D] each; asked where a rule looks at them.
            kv_heads: Number G of key heads.
        """
        stack, roles = self._stacks[layer], self._roles
        assert roles is not None
        if not stack.entries:
            return out
        if self._reads(layer):
            k, v = keys_and_values()
        else:
            k = v = q.new_zeros(()).expand(kv_heads, roles.keys.role.shape[1], q.size(-1))
        call = AttentionCall(
            module=_NOWHERE,
            name=stack.name,
            layer=layer,
            q=q.transpose(0, 1)[None],
            k=k[None],
            v=v[None],
            scale=q.size(-1) ** -0.5,
            causal=True,
            offset=roles.position,
            roles=roles,
            extra=self._pass,
        )
        own = AttentionOutput(out.transpose(0, 1)[None])
        return stack.run(call, lambda _: own).out[0].transpose(0, 1)

    def _reads(self, layer: int) -> bool:
        """Whether a rule looks at keys and values in this pass: VHR never does, VAR where it knows of a sink."""
        if layer in self._readers:
            return True
        now = self._pass.get(_VAR.argument)
        if now is None or layer not in self._watched:
            return bool(self._roles is not None and not self._roles.position)
        state = now.states.get(layer)
        return bool(now.prompt or (state is not None and state.any_visual))


def _tokens(role: Tensor) -> Tokens:
    none = torch.full((), -1, dtype=torch.int32).expand(role.shape)
    return Tokens(role, none, none, none, none)
