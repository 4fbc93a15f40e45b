"""First lines matter: Triton decides to interpret when it is imported."""

import importlib.util
import os
import re
import sys
import time
import traceback

import torch

GPU = torch.cuda.is_available()
# without triton, or as `make matrix` asks for it, what a machine without kernels does is tested
KERNELS = importlib.util.find_spec("triton") is not None and os.environ.get("FASTOPS_TEST_KERNELS", "1") != "0"
if not GPU and KERNELS:
    os.environ["TRITON_INTERPRET"] = "1"
if not GPU or "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the suite runs on all cores already, one test process each

import pytest

import tests.interpreter  # noqa: F401  what its import does
from fastops import _env

if GPU:
    from bench.clocks import Capture

    torch.cuda.graph = Capture  # a capture that fails spoils no test after it


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    elif re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        items[:] = in_turns(items)


# time.time() after which no test begins, so that a run ends by itself and says what failed
UNTIL = float(os.environ.get("FASTOPS_TESTS_UNTIL", "inf"))
OUT_OF_TIME = "out of time"
LOST_CONTEXT = []  # the test after which every call to the GPU fails


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if LOST_CONTEXT and "PYTEST_XDIST_WORKER" in os.environ:
        print(f"the CUDA context was lost in {LOST_CONTEXT[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # nothing can run in this process any more; xdist starts another
    if time.time() > UNTIL:
        pytest.skip(OUT_OF_TIME)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    late = sum(isinstance(x.longrepr, tuple) and x.longrepr[2].endswith(OUT_OF_TIME) for x in skipped)
    if late:
        terminalreporter.write_line(f"not reached, {OUT_OF_TIME}: {late}")


def in_turns(items):
    """The first case of each test, then the second of each, and so on: a run that is cut off has seen all of them."""
    turns = {}
    order = []
    for index, item in enumerate(items):
        test = item.nodeid.partition("[")[0]
        order.append((turns.setdefault(test, 0), index, item))
        turns[test] += 1
    return [item for _, _, item in sorted(order, key=lambda entry: entry[:2])]


needs_kernels = pytest.mark.skipif(not KERNELS, reason="is about kernels alone")
NO_KERNELS = (
    "triton is not installed",
    "No module named 'triton'",
    "where Triton runs only interpreted",
    "0 active drivers",  # Triton itself, where a test calls a launcher
)
NO_GPU = "Torch not compiled with CUDA enabled"


def needs_a_kernel(error):
    """The reason for which a test that asks for a kernel by name fails where there is none, or None.

    By the errors alone, not by what is printed with them: a call under impl="auto" that raised would be a defect, and
    so would an import of triton outside of what runs kernels, or a wrong result near a refusal that was caught.
    """
    while error is not None:
        reason = refusal(error)
        if reason is not None or (isinstance(error, (AssertionError, ValueError)) and not expected_another(error)):
            return reason
        error = error.__cause__ or error.__context__
    return None


def expected_another(error):
    """Whether pytest.raises(match=...) met a refusal with another reason: the first reason here is what is missing."""
    return isinstance(error, AssertionError) and str(error).startswith("Regex pattern did not match")


def refusal(error):
    """The reason in this one error, if what it refuses was asked for by name."""
    text = str(error)
    if NO_GPU in text and launched_by_hand(error):
        return NO_GPU
    reason = next((reason for reason in NO_KERNELS if reason in text), None)
    if isinstance(error, _env.KernelUnavailable):
        return reason if re.search(r"impl='(?!auto|torch)\w+'|^strict: ", text) else None
    if isinstance(error, ImportError):
        importer = modules_of(error)[-1]
        return reason if importer.startswith(("fastops.kernels", "fastops.inspection", "tests", "test_")) else None
    return None if isinstance(error, AssertionError) else reason


def modules_of(error):
    """Where an error went through, innermost last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]


def launched_by_hand(error):
    """Whether a test called a launcher or a registered op itself, past all that chooses an engine."""
    functions = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("fastops.kernels.") for name in modules_of(error)) and "or_stock" not in functions


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if GPU and report.failed and not LOST_CONTEXT:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            LOST_CONTEXT.append(item.nodeid)
    if KERNELS or not report.failed:
        return
    reason = needs_a_kernel(call.excinfo.value)
    if reason is not None:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), None, f"needs a kernel: {reason}")


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


@pytest.fixture
def fp32_precision():
    """`fp32_precision(backend, value)` sets the precision of torch.backends' module; it is set back afterwards."""
    before = []

    def choose(backend, value):
        before.append((backend, backend.fp32_precision))
        backend.fp32_precision = value

    yield choose
    for backend, value in reversed(before):
        backend.fp32_precision = value


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100, as far as decisions can see; call it to have another one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTOPS_IMPL", raising=False)
    monkeypatch.setattr(_env, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)

    def choose(capability=(9, 0), name="NVIDIA H100 80GB HBM3", multiprocessors=132):
        monkeypatch.setattr(_env, "capability", lambda index: capability)
        monkeypatch.setattr(_env, "device_name", lambda index: name)
        monkeypatch.setattr(_env, "multiprocessors", lambda index: multiprocessors)

    choose()
    return choose
