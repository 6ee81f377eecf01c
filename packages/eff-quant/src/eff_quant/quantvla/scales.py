"""Attention temperature matching (ATM) and output head balancing (OHB): one scalar per head and one per layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eff_kernels.edit import Settings

from eff_quant.quantvla.moments import Spread
from eff_quant.quantvla.stats import AttentionStats, ModuleStats

# An output below this is no signal whose energy could be matched.
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True)
class ModuleScales:
    """Factors of one attention module: ``alpha`` for the queries of each head, ``beta`` for the output projection."""

    alpha: tuple[float, ...]
    beta: float


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """Factors by module name. One table belongs to one checkpoint and one layout."""

    modules: Mapping[str, ModuleScales]

    def save(self, path: str | Path) -> None:
        """Write JSON in the form of the paper's code: ``{module: {"all": [alpha, ...], "beta": beta}}``."""
        values = {name: {"all": list(m.alpha), "beta": m.beta} for name, m in self.modules.items()}
        Path(path).write_text(json.dumps(values, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> ScaleTable:
        """Read what `save` or the paper's code wrote.

        Raises:
            ValueError: an entry is not of that form, or a factor is not above 0 and finite.
        """
        values = json.loads(Path(path).read_text())
        return cls({name: _entry(path, name, value) for name, value in values.items()})


def _entry(path: str | Path, name: str, value: Any) -> ModuleScales:
    if not isinstance(value, dict) or not isinstance(value.get("all"), list) or not value["all"]:
        raise ValueError(f'{path}: {name} holds {value!r}, wanted {{"all": [alpha, ...], "beta": beta}}')
    alpha, beta = tuple(float(a) for a in value["all"]), float(value.get("beta", 1.0))
    if not all(math.isfinite(v) and v > 0 for v in (*alpha, beta)):
        raise ValueError(f"{path}: {name} has a factor that is not above 0 and finite: {alpha}, beta {beta}")
    return ModuleScales(alpha, beta)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleMatchConfig(Settings):
    """Limits of the factors; the defaults are those of the paper's code.

    Attributes:
        alpha_clip: Least and largest alpha.
        alpha_neutral: An alpha that is closer to 1 becomes 1.
        alpha_distance: How close is measured: ``"linear"`` |alpha - 1|, or ``"log"`` |log alpha| as in the paper's text
            (which has 0.03 and clips at exp(+-0.4)).
        beta_log_clip: Largest |log beta|.
        beta_neutral: A beta with a smaller |log beta| becomes 1.
        std: How the spread of logits is taken, see `collect_attention_stats`.
        sequential: In `calibrate_vla`: measure and correct one module after the other in the model's order, each with
            those before it corrected, which takes one more run of the student for each.
    """

    alpha_clip: tuple[float, float] = (0.7, 1.4)
    alpha_neutral: float = 0.02
    alpha_distance: Literal["linear", "log"] = "linear"
    beta_log_clip: float = 0.30
    beta_neutral: float = 0.03
    std: Spread = "global"
    sequential: bool = False

    def check(self) -> None:
        """See the class."""
        low, high = self.alpha_clip
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(f"alpha_clip={self.alpha_clip}; use a range above 0 that holds 1, such as (0.7, 1.4)")
        for name in ("alpha_neutral", "beta_log_clip", "beta_neutral"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; use a number of 0 or more")


def calibrate_scales(
    teacher: AttentionStats, student: AttentionStats, config: ScaleMatchConfig | None = None
) -> ScaleTable:
    """The factors that bring a quantised model's attention back to the spread and energy of its teacher's.

    alpha = clip(std_teacher / std_student) for each head; log beta = clip(log(rms_teacher / rms_student)).

    Args:
        teacher: Statistics of the model in full precision.
        student: Statistics of the quantised model, over the same batches and with the same seed.
        config: Limits.

    Raises:
        ValueError: the two are of different modules, heads or kinds of spread.
    """
    config = config or ScaleMatchConfig()
    if teacher.spread != student.spread:
        raise ValueError(
            f"the teacher's spread is {teacher.spread!r}, the student's {student.spread!r}; use one of them"
        )
    if other := sorted(teacher.modules.keys() ^ student.modules.keys()):
        raise ValueError(f"teacher and student were measured at different modules: {other} at one of them only")
    pairs = {name: (teacher.modules[name], student.modules[name]) for name in teacher.modules}
    return ScaleTable({name: _scales(name, t, s, config) for name, (t, s) in pairs.items()})


def _scales(name: str, teacher: ModuleStats, student: ModuleStats, config: ScaleMatchConfig) -> ModuleScales:
    if len(teacher.std) != len(student.std):
        raise ValueError(f"{name}: the teacher has {len(teacher.std)} heads, the student {len(student.std)}")
    alpha = (_alpha(t, s, config) for t, s in zip(teacher.std, student.std, strict=True))
    return ModuleScales(tuple(alpha), _beta(teacher.rms, student.rms, config))


def _alpha(teacher: float, student: float, config: ScaleMatchConfig) -> float:
    # The paper's code adds 1e-6 to the divisor, by which a head of almost equal logits gets a factor far from 1.
    if student < _NOTHING or teacher < _NOTHING:
        return 1.0
    low, high = config.alpha_clip
    alpha = min(max(teacher / student, low), high)
    distance = abs(alpha - 1) if config.alpha_distance == "linear" else abs(math.log(alpha))
    return 1.0 if distance < config.alpha_neutral else alpha


def _beta(teacher: float, student: float, config: ScaleMatchConfig) -> float:
    if student < _NOTHING or teacher < _NOTHING:
        return 1.0
    log = min(max(math.log(teacher / student), -config.beta_log_clip), config.beta_log_clip)
    return 1.0 if abs(log) < config.beta_neutral else math.exp(log)
