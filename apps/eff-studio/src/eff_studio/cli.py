"""The command line: ``eff-studio`` serves; generate, insert, segment, search-heads and learn do one thing and end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from eff_studio.engine import StudioModel

_COMMANDS = ("serve", "generate", "insert", "segment", "search-heads", "learn", "-h", "--help")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Which model, and where.

    Attributes:
        model: collage-diffusion, which is embedded, or a folder or name of an SD3 or FLUX pipeline of diffusers.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda ...
        threads: CPU threads; by default PyTorch's choice.
        data: Folder for jobs, pictures, styles and concepts; by default the user's data folder.
    """

    model: str = "collage-diffusion"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    data: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the studio."""
        if self.data is not None:
            return self.data
        from platformdirs import user_data_path

        return user_data_path("eff-studio", appauthor=False)

    def load(self) -> StudioModel:
        """Load it; a clear word and status 1 where that fails."""
        import torch

        from eff_studio.engine import load_model

        if self.threads is not None:
            if self.threads < 1:
                sys.exit(f"eff-studio: threads={self.threads}; wanted 1 or more")
            torch.set_num_threads(self.threads)
        try:
            return load_model(self.model, dtype=self.dtype, device=self.device, data=self.folder)
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"eff-studio: {self.model} cannot be loaded: {error}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """Serve the page and the API.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key_file: File with one API key a line; requests need one of them then.
        max_waiting: Most jobs in line; more are answered with 429.
        grace: Seconds that running answers get after SIGTERM; a job under way waits for the next start.
        replicas: Copies of the model, each in a process of its own, by Ray Serve (the extra "replicas"); so many jobs
            are done at a time.
        ray_address: Of a running Ray cluster to put them on, such as auto; by default they run on this machine.
    """

    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    host: str = "127.0.0.1"
    port: int = 8100
    api_key_file: Path | None = None
    max_waiting: int = 64
    grace: float = 5.0
    replicas: int = 1
    ray_address: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCommand:
    """Draw pictures.

    Attributes:
        prompt: What to draw.
        layout: JSON file with a list of {"prompt", "box": [left, top, right, bottom]} from front to back, shares of
            the picture.
        heads: JSON file that search-heads wrote.
        settings: JSON file with further settings of the API's kind "generate".
        seed: Picture number i is the one that seed + i gives alone; by default 0.
        count: Pictures; by default 1.
        steps: Evaluations of the model; by default 20.
        guidance: Scale of classifier-free guidance; by default 4.
        out: PNG file.
    """

    prompt: Annotated[str, tyro.conf.Positional] = ""
    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    layout: Path | None = None
    heads: Path | None = None
    settings: Path | None = None
    seed: int | None = None
    count: int | None = None
    steps: int | None = None
    guidance: float | None = None
    out: Path = Path("picture.png")

    def values(self) -> dict[str, Any]:
        """Settings of the API's kind "generate": those of the file, then what the command says."""
        found: dict[str, Any] = {} if self.settings is None else _json(self.settings, dict)
        given = {name: getattr(self, name) for name in ("seed", "count", "steps", "guidance")}
        found |= {name: value for name, value in given.items() if value is not None}
        if self.prompt:
            found["prompt"] = self.prompt
        if self.layout is not None:
            found["layers"] = _json(self.layout, list)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class InsertCommand:
    """Paint the subject of one picture into a hole of another.

    Attributes:
        subject: Picture of the subject.
        target: Picture to paint into.
        mask: Picture of the target's size, white where to paint.
        prompt: What the result shows.
        seed: Of the noise.
        steps: Evaluations of the model.
        strength: How strongly the subject acts, 0 to 1.
        out: PNG file.
    """

    subject: Annotated[Path, tyro.conf.Positional]
    target: Annotated[Path, tyro.conf.Positional]
    mask: Annotated[Path, tyro.conf.Positional]
    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    prompt: str = ""
    seed: int = 0
    steps: int = 20
    strength: float = 0.3
    out: Path = Path("picture.png")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentCommand:
    """Find what a phrase names on a picture: a heat map, a mask, the point and the box.

    Attributes:
        picture: The picture.
        phrase: What to find.
        out: PNG file; -1 is added for the heat map, -2 for the mask.
    """

    picture: Annotated[Path, tyro.conf.Positional]
    phrase: Annotated[str, tyro.conf.Positional]
    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    out: Path = Path("found.png")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchHeads:
    """Find the heads whose damage guides best; an interrupted search goes on.

    Attributes:
        prompts: What to draw.
        out: JSON file of the search.
        rounds: Rounds.
        heads: Heads chosen in each.
        seeds: Pictures a prompt.
        steps: Evaluations of the model a picture.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    out: Path = Path("heads.json")
    rounds: int = 1
    heads: int = 4
    seeds: int = 2
    steps: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Learn:
    """Learn the things on a picture as new words.

    Attributes:
        picture: The picture.
        words: New word and the known word that it starts as, such as "<rex>=dog"; one for each thing.
        name: Of the concepts in the studio; prompts use the new words.
        steps: Updates.
    """

    picture: Annotated[Path, tyro.conf.Positional]
    words: Annotated[tuple[str, ...], tyro.conf.Positional]
    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    name: str = "mine"
    steps: int = 200


def main(args: list[str] | None = None) -> None:
    """Entry point of ``eff-studio``."""
    given = sys.argv[1:] if args is None else args
    if not given or given[0] not in _COMMANDS:
        given = ["serve", *given]  # serving is what the bare command does
    commands: dict[str, Callable[..., int]] = {
        "serve": _serve,
        "generate": _generate,
        "insert": _insert,
        "segment": _segment,
        "search-heads": _search,
        "learn": _learn,
    }
    status: int = tyro.extras.subcommand_cli_from_dict(commands, args=given)
    if status:
        sys.exit(status)


def _serve(config: tyro.conf.OmitArgPrefixes[Serve]) -> int:
    """Serve the page and the API (what eff-studio does without a subcommand)."""
    from eff_studio.server import serve

    return serve(config)


def _generate(config: tyro.conf.OmitArgPrefixes[GenerateCommand]) -> int:
    """Draw pictures."""
    from eff_studio.terminal import do
    from eff_studio.work import read_work

    values = config.values()
    if config.heads is not None:
        from eff_guidance.head_guidance import HeadSet

        try:
            found = HeadSet.load(config.heads)
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"eff-studio: {config.heads} cannot be read: {error}")
        values["heads"] = {
            "weights": [[head.layer, head.head, found.config.strength] for head in found.best()],
            "scale": found.config.scale,
        }
    try:
        work = read_work("generate", values)
    except (ValueError, TypeError) as error:
        sys.exit(f"eff-studio: {error}")
    return do(config.model.load(), work, config.out)


def _insert(config: tyro.conf.OmitArgPrefixes[InsertCommand]) -> int:
    """Paint the subject of one picture into a hole of another."""
    from eff_studio.terminal import do
    from eff_studio.work import Insert

    try:
        work = Insert(
            subject="subject", target="target", mask="mask", prompt=config.prompt, seed=config.seed, steps=config.steps,
            strength=config.strength,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"eff-studio: {error}")
    files = {"subject": config.subject, "target": config.target, "mask": config.mask}
    return do(config.model.load(), work, config.out, files=files)


def _segment(config: tyro.conf.OmitArgPrefixes[SegmentCommand]) -> int:
    """Find what a phrase names on a picture."""
    from eff_studio.terminal import do
    from eff_studio.work import Segment

    try:
        work = Segment(picture="picture", phrase=config.phrase)
    except ValueError as error:
        sys.exit(f"eff-studio: {error}")
    return do(config.model.load(), work, config.out, files={"picture": config.picture})


def _search(config: tyro.conf.OmitArgPrefixes[SearchHeads]) -> int:
    """Find the heads whose damage guides best."""
    from eff_studio.search import search_heads

    return search_heads(
        config.model.load(), config.prompts, config.out, rounds=config.rounds, heads=config.heads, seeds=config.seeds,
        steps=config.steps,
    )  # fmt: skip


def _learn(config: tyro.conf.OmitArgPrefixes[Learn]) -> int:
    """Learn the things on a picture as new words."""
    from eff_studio.search import learn

    out = config.model.folder / "concepts" / config.name
    return learn(config.model.load(), config.picture, config.words, out, steps=config.steps)


def _json(path: Path, kind: type[Any]) -> Any:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"eff-studio: {path} cannot be read: {error}")
    if not isinstance(found, kind):
        sys.exit(f"eff-studio: {path} holds a {type(found).__name__}, wanted a {kind.__name__}")
    return found
