"""What a user can ask for: frozen settings that travel as JSON, inside the pictures they gave too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eff_kernels.edit import Settings

PictureId = str
MAX_TEXT = 2000
MAX_SIDE = 2048
MAX_STEPS = 200
MAX_LAYERS = 8
MAX_COUNT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBox(Settings):
    """An object with its place.

    Attributes:
        prompt: What it is.
        box: Left, top, right, bottom as shares of the picture, from 0 to 1.
    """

    prompt: str
    box: tuple[float, float, float, float]

    def check(self) -> None:
        """The box lies on the picture."""
        _text("prompt", self.prompt)
        x0, y0, x1, y1 = self.box
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"box={self.box}; wanted left < right and top < bottom, all from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads(Settings):
    """Guidance away from damaged heads (`eff_guidance.head_guidance`).

    Attributes:
        weights: (layer, head, strength from 0 to 1); none is off.
        scale: How hard to push.
        window: First and last share of the steps.
    """

    weights: tuple[tuple[int, int, float], ...] = ()
    scale: float = 3.0
    window: tuple[float, float] = (0.0, 1.0)

    @property
    def acts(self) -> bool:
        """Whether they change anything."""
        return self.scale != 0 and any(strength for _, _, strength in self.weights)

    def check(self) -> None:
        """Ranges are possible."""
        _window("window", self.window)
        _within("scale", self.scale, -100, 100)
        if len({(layer, head) for layer, head, _ in self.weights}) != len(self.weights):
            raise ValueError("weights name a head twice")
        for layer, head, strength in self.weights:
            if layer < 0 or head < 0:
                raise ValueError(f"weights name layer {layer}, head {head}; they count from 0")
            _within("strength", strength, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style(Settings):
    """A learnt style (`eff_guidance.pokefusion`).

    Attributes:
        name: Folder of the adapter among the studio's styles; empty is none.
        strength: Factor.
    """

    name: str = ""
    strength: float = 1.0

    def check(self) -> None:
        """The name is a plain one."""
        if self.name and not all(c.isalnum() or c in "-_" for c in self.name):
            raise ValueError(f"style {self.name[:60]!r}; names have letters, digits, - and _ only")
        _within("strength", self.strength, 0, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Settings):
    """Pictures from a prompt.

    Attributes:
        prompt: What to draw; empty draws the layers.
        negative: What not to draw.
        seed: Picture number i is the one that ``seed + i`` gives alone.
        count: Pictures.
        steps: Evaluations of the model.
        guidance: Scale of classifier-free guidance.
        width: Points; 0 is the model's own size.
        height: Points; 0 is the model's own size.
        layers: Objects with places, from front to back.
        opacity: How strongly layers hold to their places, 0 to 1.
        heads: Guidance by heads.
        style: A learnt style.
        concepts: Folder of learnt concepts among the studio's; empty is none.
    """

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    count: int = 1
    steps: int = 20
    guidance: float = 4.0
    width: int = 0
    height: int = 0
    layers: tuple[LayerBox, ...] = ()
    opacity: float = 0.7
    heads: Heads = field(default_factory=Heads)
    style: Style = field(default_factory=Style)
    concepts: str = ""

    def check(self) -> None:
        """All within the server's limits."""
        _common(self)
        _within("opacity", self.opacity, 0, 1)
        Style(name=self.concepts)
        if len(self.layers) > MAX_LAYERS:
            raise ValueError(f"{len(self.layers)} layers; at most {MAX_LAYERS} are drawn")
        if not self.prompt.strip() and not self.layers:
            raise ValueError("prompt is empty and there are no layers; say what to draw")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value and not 64 <= value <= MAX_SIDE:
                raise ValueError(f"{name}={value}; wanted 64 to {MAX_SIDE} points, or 0 for the model's own size")
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"count={self.count}; wanted 1 to {MAX_COUNT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Insert(Settings):
    """A subject painted into a hole of a picture (`eff_guidance.context_brush`).

    Attributes:
        subject: The picture of the subject.
        target: The picture to paint into.
        mask: White where to paint, of the target's size.
        prompt: What the result shows.
        seed: Of the noise.
        steps: Evaluations of the model.
        guidance: Scale of classifier-free guidance.
        strength: How strongly the subject acts, 0 to 1.
    """

    subject: PictureId
    target: PictureId
    mask: PictureId
    prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    strength: float = 0.3

    def check(self) -> None:
        """All within the server's limits."""
        _common(self)
        _within("strength", self.strength, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Settings):
    """Where a phrase points to on a picture (`eff_guidance.refam`).

    Attributes:
        picture: The picture.
        phrase: What to find.
    """

    picture: PictureId
    phrase: str

    def check(self) -> None:
        """There is a phrase."""
        _text("phrase", self.phrase)
        if not self.phrase.strip():
            raise ValueError("phrase is empty; say what to find")


Work = Generate | Insert | Segment
KINDS: dict[str, type[Generate] | type[Insert] | type[Segment]] = {
    "generate": Generate,
    "insert": Insert,
    "segment": Segment,
}


def kind_of(work: Work) -> str:
    """The name of its kind."""
    return next(name for name, cls in KINDS.items() if isinstance(work, cls))


def pictures_of(work: Work) -> dict[str, PictureId]:
    """The stored pictures that a piece of work needs, by the name of their setting."""
    names = ("subject", "target", "mask", "picture")
    return {name: getattr(work, name) for name in names if hasattr(work, name)}


def described(work: Work) -> dict[str, Any]:
    """Kind and settings as JSON, as they are written into pictures; `read_work` takes them."""
    return {"kind": kind_of(work), "settings": work.to_dict()}


def read_work(kind: str, values: dict[str, Any]) -> Work:
    """Settings from JSON.

    Raises:
        ValueError: the kind is unknown, a value is unknown, missing or out of range.
        TypeError: a value is of another type.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind[:60]!r}; wanted one of {', '.join(KINDS)}")
    return KINDS[kind].from_dict(values)


def _common(work: Any) -> None:
    _text("prompt", work.prompt)
    if hasattr(work, "negative"):
        _text("negative", work.negative)
    if not 0 <= work.seed < 2**63:
        raise ValueError(f"seed={work.seed}; wanted 0 to 2^63 - 1")
    if not 1 <= work.steps <= MAX_STEPS:
        raise ValueError(f"steps={work.steps}; wanted 1 to {MAX_STEPS}")
    _within("guidance", work.guidance, 0, 100)


def _text(name: str, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_TEXT} are read")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} holds half a surrogate pair, which is no character")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value}; wanted {low} to {high}")


def _window(name: str, value: tuple[float, float]) -> None:
    if not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"{name}={value}; wanted 0 <= start <= stop <= 1")
