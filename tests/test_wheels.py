"""What a built wheel holds and says. Whether it works installed alone is the business of ``nox -s wheel``."""

import subprocess
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheels(root, all_members, tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """Build each member's wheel as a release does, without the workspace's sources."""
    out = tmp_path_factory.mktemp("wheels")
    opened = {}
    for m in all_members:
        command = ["uv", "build", "--wheel", "--no-sources", "--quiet", f"--package={m.name}", f"--out-dir={out}"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        opened[m.name] = zipfile.ZipFile(next(out.glob(f"{m.module}-*.whl")))
    return opened


def metadata(wheel: zipfile.ZipFile) -> HeaderParser:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return HeaderParser().parsestr(wheel.read(name).decode())


def test_metadata(member, wheels):
    meta = metadata(wheels[member.name])
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.11"
    assert "torch>=2.11" in meta.get_all("Requires-Dist")
    assert meta["Summary"].endswith(".")
    assert meta["Description-Content-Type"] == "text/markdown"
    assert len(meta.get_payload().strip().splitlines()) >= 10, "the README in the metadata is a stub"


def test_siblings_are_pinned_to_a_minor_range(member, wheels, all_members):
    """An eff-quant 0.1 must not be installed beside an eff-kernels 0.2, whose functions may have changed."""
    versions = {m.name: m.project["version"] for m in all_members}
    for requirement in metadata(wheels[member.name]).get_all("Requires-Dist"):
        name = requirement.split("[")[0].split(">")[0].strip()
        if name in versions and ";" not in requirement:
            major, minor = map(int, versions[name].split(".")[:2])
            assert f">={major}.{minor}" in requirement
            assert f"<{major}.{minor + 1}" in requirement


def test_wheel_ships_the_sources_and_nothing_else(member, wheels, files):
    names = {n for n in wheels[member.name].namelist() if ".dist-info/" not in n}
    tracked = {str(f.relative_to(member.folder / "src")) for f in files if f.is_relative_to(member.source)}
    assert tracked <= names, f"missing from the wheel: {sorted(tracked - names)}"
    assert f"{member.module}/py.typed" in names
    assert {Path(n).parts[0] for n in names} == {member.module}
    assert not [n for n in names if n.endswith((".so", ".pyc")) or "tests" in Path(n).parts]
    weights = [n for n in names if n.endswith(".safetensors")]
    assert all(n.startswith("eff_embedded/checkpoints/") for n in weights), "only eff-embedded ships weights"


def test_licence_text_is_in_the_wheel(member, wheels, root):
    wheel = wheels[member.name]
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(name) == (root / "LICENSE").read_bytes()


def test_kernels_ship_their_c_sources(wheels):
    assert [n for n in wheels["eff-kernels"].namelist() if n.startswith("eff_kernels/native/") and n.endswith(".c")]


def test_apps_are_private(member, wheels):
    """An app is not a library for others; the classifier keeps it out of the package index."""
    private = "Private :: Do Not Upload" in (metadata(wheels[member.name]).get_all("Classifier") or [])
    assert private == (member.folder.parent.name == "apps")
