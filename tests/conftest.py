"""First lines matter: Triton decides to interpret when it is imported."""

import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    if os.environ.get("FASTOPS_TEST_KERNELS", "1") != "0":  # `make matrix` also tests where no kernel can run
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # the suite runs on all cores already, one test process each

import pytest


def pytest_collection_modifyitems(items):
    if not GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty and new_empty give NaN (or the largest integer), so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return torch.device("cuda" if GPU else "cpu")
