"""Starting again through uv inside the workspace, a word on what to install outside; uv itself is not called."""

import subprocess
import sys

import pytest
from eff_embedded import launch

ARGV = ["run", "digits", "--folder", "a b"]


class Started(Exception):
    """Instead of the new program."""


@pytest.fixture
def light(monkeypatch, tmp_path):
    """An environment without marks of uv, in a folder that is no workspace; returns what was started."""
    for name in ("UV", "WORLD_SIZE", launch.MARK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    started = []

    def execve(path, words, env):
        started.append((path, words, env))
        raise Started

    monkeypatch.setattr(launch.os, "execve", execve)
    return started


def ensure(*modules):
    launch.ensure(modules, command="eff-train", argv=ARGV, extra="train", install="eff-train[recipes]")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "eff-workspace"\n')
    monkeypatch.setenv("UV", "/bin/uv")
    return tmp_path


def test_nothing_happens_where_all_is_there(light, workspace, capsys):
    ensure("json", "numpy")
    assert light == []
    assert capsys.readouterr() == ("", "")


def test_starts_again_with_the_extra(light, workspace, monkeypatch, capsys):
    (workspace / "sub").mkdir()
    monkeypatch.chdir(workspace / "sub")
    with pytest.raises(Started):
        ensure("json", "no_such_a", "no_such_b")
    ((path, words, env),) = light
    assert path == "/bin/uv"
    assert words == ["/bin/uv", "run", "--project", str(workspace), "--extra", "train", "eff-train", *ARGV]
    assert env[launch.MARK] == "1"
    again = "uv run --extra train eff-train run digits --folder 'a b'"
    assert capsys.readouterr() == ("", f"no_such_a, no_such_b not installed, starting again as: {again}\n")


def test_workspace_is_found_by_the_environment_too(light, workspace, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(Started):
        ensure("no_such_a")
    assert light[0][1][2:4] == ["--project", str(workspace)]


@pytest.mark.parametrize("case", ["no uv", "no workspace", "another project", "broken project"])
def test_says_what_to_install_elsewhere(case, light, workspace, monkeypatch):
    project = workspace / "pyproject.toml"
    if case == "no uv":
        monkeypatch.delenv("UV")
    elif case == "no workspace":
        project.unlink()
    else:
        project.write_text('[project]\nname = "mine"\n' if case == "another project" else "[[[")
    with pytest.raises(SystemExit) as stopped:
        ensure("no_such_a")
    assert stopped.value.code == (
        "eff-train: no_such_a not installed; get what this needs with: pip install 'eff-train[recipes]'"
    )
    assert light == []


def test_starts_again_only_once(light, workspace, monkeypatch):
    monkeypatch.setenv(launch.MARK, "1")
    with pytest.raises(SystemExit, match="no_such_a missing although the extra 'train' is installed"):
        ensure("no_such_a")
    assert light == []


def test_several_processes_do_not_install(light, workspace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="run once without torchrun: uv run --extra train eff-train run digits"):
        ensure("no_such_a")
    assert light == []


def test_the_file_imports_nothing_heavy():
    code = (
        "import sys; from eff_embedded import launch; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
