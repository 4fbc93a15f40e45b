"""`python -m tests.triton_cache`: a kernel really compiled into Triton's cache on disk, which is then damaged.

A stand-in for the driver takes the compiled kernel and never runs it, so that neither a GPU nor the interpreter is
needed. Prints one JSON object: what was done to the cache, and the error that came of it or null.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastops.kernels import epilogue
from fastops.ops import conv2d_contract as ops


class Driver:
    """What Triton asks of a machine with an H100."""

    @property
    def utils(self):
        return self

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, name, kernel, shared, device):
        if not kernel.startswith(b"\x7fELF"):
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        return 1, 1, 0, 0, 1024

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments, **options: None


def call():
    """As the first call of a process: what is in memory is forgotten."""
    for kernel in vars(epilogue).values():
        if isinstance(kernel, triton.runtime.JITFunction):
            kernel.device_caches.clear()
    return ops.bias_relu_forward(torch.ones(1, 2, 4, 4), None)


def write(data, suffix, group=False):
    """Put these bytes (None: nothing at all) in place of the files of every entry that end so."""

    def damage(folder):
        found = [path for path in folder.glob(f"*/*{suffix}") if path.name.startswith("__grp__") == group]
        assert found
        for path in found:
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)

    return damage


DAMAGES = {
    "empty metadata": write(b"", ".json"),
    "truncated metadata": write(b'{"hash": "', ".json"),
    "metadata of another kind": write(b"[]", ".json"),
    "metadata without fields": write(b"{}", ".json"),
    "no metadata": write(None, ".json"),
    "a list of files that is none": write(b"\0garbage", ".json", group=True),
    "garbage in an intermediate form": write(b"\xff\xfe\0", ".ttir"),
    "empty machine code": write(b"", ".cubin"),
    "garbage for machine code": write(b"garbage", ".cubin"),
    "no machine code": write(None, ".cubin"),
}


@contextlib.contextmanager
def read_only(folder):
    """Nobody may write here, root included: it becomes another user, whom permissions bind."""
    places = [folder, *folder.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)


def attempt():
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    driver.set_active(Driver())
    errors = {}
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as empty:
        folder = Path(name)
        os.environ["TRITON_CACHE_DIR"] = name
        call()  # first, because another user may not read what Triton imports as late as this
        os.environ["TRITON_CACHE_DIR"] = empty
        with read_only(Path(empty)):
            errors["read-only and empty"] = attempt()
        os.environ["TRITON_CACHE_DIR"] = name
        intact = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        assert any(path.suffix == ".cubin" for path in intact)
        with read_only(folder):
            errors["read-only and whole"] = attempt()
        for name, damage in DAMAGES.items():
            damage(folder)
            errors[name] = attempt()
            for path in intact:  # mended on disk too, for the next process
                assert (folder / path).stat().st_size, f"{name}: {path} stays empty"
            call()
        write(b"", ".json")(folder)
        with read_only(folder):
            errors["read-only and damaged"] = attempt()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
