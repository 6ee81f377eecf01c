"""What holds for every test: one thread, fixed seeds, and no silent absence of a promised GPU."""

import os
import random

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(1)
    if os.environ.get("EFF_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        pytest.exit("EFF_REQUIRE_GPU=1, but torch sees no CUDA or ROCm device", returncode=3)


@pytest.hookimpl(tryfirst=True)  # before "-m" chooses by the marks
def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            if any(isinstance(value, str) and value == "triton" for value in parameters.values()):
                item.add_marker(pytest.mark.gpu)  # kernels that run as they are
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    torch.manual_seed(0)
