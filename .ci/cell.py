"""pytest plugin of `make matrix`: a sample of the tests, and what a test means where no kernel can run."""

from __future__ import annotations

import os
import zlib

import pytest

KERNELS = os.environ.get("FASTOPS_TEST_KERNELS", "1") != "0"
WHOLE = ("test_house.py",)  # quick, and about the versions themselves


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, default=1, metavar="N", help="run one test in N, chosen by its name")
    parser.addoption("--sample-name", default="", metavar="NAME", help="another sample for another name")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    one_in, name = config.getoption("--sample"), config.getoption("--sample-name")

    def chosen(item):
        return item.path.name in WHOLE or zlib.crc32(f"{name}{item.nodeid}".encode()) % one_in == 0

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Without kernels, a test that asks for one by name must be told so; it cannot be told anything else."""
    outcome = yield
    if KERNELS or call.excinfo is None or call.excinfo.typename != "KernelUnavailable":
        return
    message = str(call.excinfo.value)
    if "triton is not installed" in message or "where Triton runs only interpreted" in message:
        report = outcome.get_result()
        report.outcome = "skipped"
        report.longrepr = (str(item.path), None, f"needs a kernel: {message}")
