"""pytest plugin of `make matrix`: a sample of the tests."""

from __future__ import annotations

import zlib

import pytest

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
