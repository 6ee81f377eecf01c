"""The field ``eff``: what this server does beyond the API of others. So far that is steering of attention."""

from __future__ import annotations

from typing import Any

from eff_http import RequestModel, refuse
from pydantic import PrivateAttr, model_validator

from eff_serve.engine.steering import METHODS, Steering

Wanted = bool | dict[str, Any] | None


class EffFields(RequestModel):
    """Methods that steer attention while this answer is made: true for a method's defaults, or its settings by name.

    ``act`` is for text, the others are for pictures: ``var``, ``vhr``, ``paint`` and ``pai``. Settings are those of
    eff-attention's ``ACTConfig``, ``VARConfig``, ``VHRConfig``, ``PAINTConfig`` and ``PAIConfig``.
    """

    act: Wanted = None
    var: Wanted = None
    vhr: Wanted = None
    paint: Wanted = None
    pai: Wanted = None
    _steering: Steering | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _settings(self) -> EffFields:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        wanted = {name: {} if value is True else value for name, value in given.items() if value not in (None, False)}
        made: dict[str, Any] = {}
        for name, value in wanted.items():
            try:
                made[name] = METHODS[name].from_dict(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise refuse(f"eff.{name}: {error}", name) from None
        try:
            self._steering = Steering(**made) if made else None
        except ValueError as error:
            raise refuse(f"eff: {error}") from None
        return self

    @property
    def steering(self) -> Steering | None:
        """The settings for the engine; None where nothing is asked for."""
        return self._steering
