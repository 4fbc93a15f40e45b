"""What a machine does to a program: forks, caches that cannot be written or are corrupt, memory that runs out."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastops
from tests import sanitized
from tests.conftest import needs_kernels
from tests.contract_subjects import SUBJECTS

ROOT = Path(__file__).parent.parent
CALL = "import torch, fastops; x = torch.randn(1, 2, 5, 5); w = torch.randn(3, 2, 3, 3); "
CHECK = "assert torch.allclose(fastops.conv2d_relu(x, w, impl='triton'), fastops.conv2d_relu(x, w), atol=1e-5); "


def run(code, *, status=0, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@needs_kernels
def test_fork_after_import_and_after_a_first_call():
    run(
        CALL
        + textwrap.dedent("""
        import os, sys
        def same():
            return torch.allclose(fastops.conv2d_relu(x, w, impl='triton'), fastops.conv2d_relu(x, w), atol=1e-5)
        for _ in range(2):
            child = os.fork()
            if child == 0:
                os._exit(0 if same() else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert same()
        """),
        OMP_NUM_THREADS="1",  # a fork loses OpenMP's threads, and PyTorch's own convolution waits for them for ever
    )


@needs_kernels
@pytest.mark.parametrize("state", ["fresh", "no folder can be made", "garbage"])
def test_cache_folders(state, tmp_path):
    """Of Triton and of the inspector."""
    folder = tmp_path / "cache"
    if state == "no folder can be made":
        folder.write_text("a file")
    if state == "garbage":
        folder.mkdir()
        (folder / "CACHE").write_bytes(b"\0garbage")
    run(CALL + CHECK, TRITON_CACHE_DIR=str(folder), XDG_CACHE_HOME=str(folder))


@pytest.fixture(scope="module")
def compiled_caches():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton_cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_damaged_entries_of_the_triton_cache_are_compiled_anew(compiled_caches):
    damaged = {name: error for name, error in compiled_caches.items() if not name.startswith("read-only")}
    assert len(damaged) == 10
    assert not any(damaged.values()), damaged


def test_a_read_only_triton_cache_is_read_and_what_is_missing_there_is_named(compiled_caches):
    assert compiled_caches["read-only and whole"] is None
    for state in ("empty", "damaged"):
        message = compiled_caches[f"read-only and {state}"]
        assert message.startswith("LaunchFailed: fastops::bias_relu_forward: PermissionError"), message
        assert "FASTOPS_IMPL=torch avoids it" in message


@pytest.fixture
def sanitizer(tmp_path):
    """A compute-sanitizer that says what it was asked, and finds something with one tool."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "asked: $*"\n[ "$2" != racecheck ] || exit 9\n[ "$2" != synccheck ] || exit 3\n')
    fake.chmod(0o755)

    def sanitize(*tools, **environment):
        environment = {**os.environ, "COMPUTE_SANITIZER": str(fake), **environment}
        return subprocess.run(
            [sys.executable, str(ROOT / ".ci" / "sanitize"), *tools], capture_output=True, text=True, env=environment
        )

    return sanitize


def test_sanitize_runs_every_tool_and_tells_what_each_found(sanitizer):
    done = sanitizer(FASTOPS_SANITIZE_ANYWAY="1")
    assert done.returncode == 1
    assert done.stdout.count("sanitized.py") == 4
    for line in ("memcheck: clean", "racecheck: found errors", "initcheck: clean", "synccheck: did not finish"):
        assert f"sanitize: {line}" in done.stdout
    assert sanitizer("memcheck", FASTOPS_SANITIZE_ANYWAY="1").returncode == 0


@pytest.mark.slow
def test_what_the_sanitizer_watches_runs_and_takes_the_form_it_is_named_for(monkeypatch):
    """But for the persistent engine, whose programs cannot meet in the interpreter."""
    from fastops.kernels import conv2d

    forms = []
    choose_form = conv2d.choose_form
    monkeypatch.setattr(conv2d, "choose_form", lambda *facts: [forms.append(choose_form(*facts)), forms[-1]][1])
    names = []
    for name, call, given in sanitized.calls(torch.device("cpu")):
        names.append(name)
        if "persistent" in name:
            continue
        forms.clear()
        sanitized.backward(call, given)
        form = name.partition("conv2d_relu ")[2]
        if form and "torch" not in form:
            assert forms == [form] * (form != "hybrid")
    assert sum("persistent" in name for name in names) == 3
    assert len(names) == len(set(names)) > 2 * len(SUBJECTS)


def test_sanitize_says_what_is_missing(sanitizer):
    done = sanitizer(COMPUTE_SANITIZER="no-such-tool")
    assert done.returncode == 2
    assert "comes with the CUDA toolkit" in done.stderr
    if not torch.cuda.is_available():
        done = sanitizer()
        assert (done.returncode, done.stderr) == (2, "sanitize: no GPU that PyTorch can use\n")


@pytest.mark.gpu
def test_memory_that_runs_out_in_forward_breaks_nothing():
    from fastops import _library

    lstm = fastops.nn.LSTM(64, 64, impl="triton").cuda().half()
    x = torch.randn(4, 8, 64, device="cuda", dtype=torch.float16)
    expected = lstm(x)[0]
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            lstm(torch.empty(1, 1, 64, device="cuda", dtype=torch.float16).expand(2**20, 64, 64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not _library.BROKEN
    assert torch.equal(lstm(x)[0], expected)


@pytest.mark.gpu
def test_a_persistent_kernel_beside_one_that_fills_the_gpu():
    lstm = fastops.nn.LSTM(512, 512, impl="persistent").cuda().half()
    x = torch.randn(32, 64, 512, device="cuda", dtype=torch.float16)
    expected = lstm(x)[0]
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    with torch.cuda.stream(other):
        for _ in range(20):
            a @ a
    found = lstm(x)[0]
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
