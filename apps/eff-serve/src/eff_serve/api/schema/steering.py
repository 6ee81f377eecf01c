"""The field ``eff``: what this server does beyond the API of others: steering of attention, and a second look."""

from __future__ import annotations

from typing import Any

from eff_attention.contrastive_focus import CarveConfig
from eff_http import RequestModel, refuse
from eff_kernels.edit import Settings
from pydantic import PrivateAttr, model_validator

from eff_serve.engine.steering import CARVE, METHODS, Steering

Wanted = bool | dict[str, Any] | None
_METHODS: dict[str, type[Settings]] = {**METHODS, CARVE: CarveConfig}


class EffFields(RequestModel):
    """Methods that steer attention while this answer is made: true for a method's defaults, or its settings by name.

    ``act`` is for text, the others are for pictures: ``var``, ``vhr``, ``paint``, ``pai`` and, alone, ``carve``.
    Settings are those of eff-attention's ``ACTConfig``, ``VARConfig``, ``VHRConfig``, ``PAINTConfig``, ``PAIConfig``
    and ``CarveConfig``.
    """

    act: Wanted = None
    var: Wanted = None
    vhr: Wanted = None
    paint: Wanted = None
    pai: Wanted = None
    carve: Wanted = None
    _steering: Steering | None = PrivateAttr(default=None)
    _carve: CarveConfig | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _settings(self) -> EffFields:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        wanted = {name: {} if value is True else value for name, value in given.items() if value not in (None, False)}
        made: dict[str, Any] = {}
        for name, value in wanted.items():
            try:
                made[name] = _METHODS[name].from_dict(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise refuse(f"eff.{name}: {error}", name) from None
        self._carve = made.pop(CARVE, None)
        if self._carve is not None and made:
            raise refuse(f"eff: carve looks with the model as it is; leave out {', '.join(made)}")
        try:
            self._steering = Steering(**made) if made else None
        except ValueError as error:
            raise refuse(f"eff: {error}") from None
        return self

    @property
    def steering(self) -> Steering | None:
        """The settings for the engine; None where nothing is asked for."""
        return self._steering

    @property
    def second_look(self) -> CarveConfig | None:
        """Settings of the second look; None where it is not asked for."""
        return self._carve
