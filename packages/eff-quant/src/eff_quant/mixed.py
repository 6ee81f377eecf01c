"""Several methods in one model: which layers get which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from eff_kernels.edit import fits
from torch import nn

from eff_quant.registry import config_from_dict, method_of
from eff_quant.settings import MethodSettings

Patterns = tuple[str, ...]


@dataclass(frozen=True)
class MixedConfig(MethodSettings):
    """Settings by layer: the first rule whose patterns take a layer in decides; a layer without a rule stays as it is.

    Attributes:
        rules: Pairs of patterns (see `eff_kernels.edit.matches`) and the settings of one method.

    Raises:
        ValueError: no rules, or a rule without patterns.
        TypeError: the settings of a rule belong to no method.
    """

    rules: tuple[tuple[Patterns, Any], ...]

    # The method's name in transformers, see `eff_quant.hf`.
    quant_method: ClassVar[str] = "eff_mixed"

    def __post_init__(self) -> None:
        rules = tuple(((p,) if isinstance(p, str) else p, config) for p, config in self.rules)
        object.__setattr__(self, "rules", rules)
        super().__post_init__()

    def check(self) -> None:
        """See the class."""
        if not self.rules:
            raise ValueError("a mixed config needs at least one rule, got none")
        for patterns, config in self.rules:
            if not patterns:
                raise ValueError(f"a rule with {config} has no patterns, so it would never apply")
            method_of(config)

    @property
    def plain(self) -> Any:
        """The config of the one method that all layers have, or these rules."""
        (patterns, first), *others = self.rules
        return first if not others and patterns == ("*",) else self

    def config_for(self, names: Sequence[str], module: nn.Module) -> Any:
        """The settings of the layer with these names, or None."""
        return next((c for patterns, c in self.rules if any(fits(patterns, n, module) for n in names)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as JSON types, with the format version and the method's name."""
        rules = [{"where": list(patterns), "config": config.to_dict()} for patterns, config in self.rules]
        return {**self._all_tags(), "version": self.version, "rules": rules}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild the rules from `to_dict`; errors are those of `eff_kernels.edit.Settings.from_dict`."""
        rules = [(r["where"], config_from_dict(r["config"])) for r in values.get("rules", ())]
        return super().from_dict({**values, "rules": rules})


def settings_from_dict(values: Mapping[str, Any]) -> Any:
    """Settings of a method or of several, from their ``to_dict``."""
    mixed = values.get("quant_method") == MixedConfig.quant_method
    return MixedConfig.from_dict(values) if mixed else config_from_dict(values)


def as_mixed(config: Any) -> MixedConfig:
    """Any accepted form of settings as rules: one config for all layers, a mapping from patterns to configs, rules.

    Raises:
        TypeError: a config belongs to no method.
        ValueError: see `MixedConfig`.
    """
    if isinstance(config, MixedConfig):
        return config
    if isinstance(config, Mapping):
        return MixedConfig(tuple(config.items()))
    return MixedConfig(((("*",), config),))
