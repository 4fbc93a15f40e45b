"""The only file that asks about the machine: GPU, Triton, interpreter, FASTOPS_IMPL.

Nothing here runs at import, imports triton or touches CUDA before it must.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import torch

MIN_CAPABILITY = (8, 0)


class KernelUnavailable(RuntimeError):
    """An engine was asked for by name and cannot run here; the message says why."""


# looked up once and without importing it; a constant, because torch.compile traces through the dispatch of every op
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "y", "yes"}


def capability(device_index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device (a constant to torch.compile)."""
    return torch.cuda.get_device_capability(device_index)


def device_name(device_index: int) -> str:
    """Marketing name of a CUDA device, the key of the tuning tables."""
    return torch.cuda.get_device_name(device_index)


def multiprocessors(device_index: int) -> int:
    """Number of streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def index_of(device: torch.device) -> int:
    """Index of a CUDA device, the current one where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts on this device; None where it is off."""
    # of other devices (meta) one may not ask, and stock PyTorch has an autocast of its own there, or none
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(x: torch.Tensor | None, dtype: torch.dtype) -> Any:
    """A tensor as autocast hands it on: floating point but float64 is cast."""
    return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, or None where they can."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton; Linux only)"
    if device.type == "cpu":
        if interpreting():
            return None
        return "the tensors are on the CPU, where Triton runs only interpreted (start Python with TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"Triton kernels need CUDA tensors, these are on '{device.type}'"
    if torch.version.hip is not None:
        return "fastops supports NVIDIA GPUs only, this PyTorch is built for ROCm"
    if interpreting():
        return None
    major, minor = capability(index_of(device))
    if (major, minor) < MIN_CAPABILITY:
        return f"the GPU is sm_{major}{minor}, fastops kernels need sm_80 or newer"
    return None


def able_gpu() -> torch.device | None:
    """This machine's GPU, where kernels run on it."""
    gpu = torch.device("cuda")
    return gpu if torch.cuda.is_available() and why_no_triton(gpu) is None else None


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What rows of every tuning table may ask of a GPU: its name, and its capability as a number, 90 for sm_90."""
    index = index_of(device)
    major, minor = capability(index)
    return {"gpu": device_name(index), "capability": 10 * major + minor}


def shown_gpu_facts() -> dict[str, Any]:
    """`gpu_facts` of the GPU that explanations are about: this machine's, else an H100."""
    gpu = able_gpu()
    return {"gpu": "NVIDIA H100 80GB HBM3", "capability": 90} if gpu is None else gpu_facts(gpu)


def choose_impl(impl: str, allowed: tuple[str, ...]) -> str:
    """The engine to use: `impl` itself, or for "auto" what FASTOPS_IMPL says, where the op has that engine."""
    if impl not in allowed:
        raise ValueError(f"impl must be one of {', '.join(map(repr, allowed))}, got {impl!r}")
    if impl == "auto" and (_ENCODED_IMPL in _ENVIRONMENT or torch.compiler.is_compiling()):
        wanted = os.environ.get("FASTOPS_IMPL", "")
        if wanted and wanted not in KNOWN_IMPLS:
            raise ValueError(f"FASTOPS_IMPL must be one of {', '.join(map(repr, KNOWN_IMPLS))}, got {wanted!r}")
        if wanted in allowed:
            return wanted
    return impl


# os.environ.get of a variable that is not set raises and catches a KeyError: 2 us, a tenth of a small layer on the CPU
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_ENCODED_IMPL: Any = "FASTOPS_IMPL" if _ENVIRONMENT is os.environ else os.fsencode("FASTOPS_IMPL")


def nothing_to_choose(impl: str, input: Any) -> bool:
    """Whether "auto" is stock PyTorch without further questions: a plain CPU tensor, eager, and no FASTOPS_IMPL.

    For calls so small that the questions themselves would be felt.
    """
    if impl != "auto" or torch.compiler.is_compiling():
        return False
    return type(input) is torch.Tensor and input.is_cpu and _ENCODED_IMPL not in _ENVIRONMENT


def may_read_values() -> bool:
    """Whether the numbers in a tensor may decide what runs: not while a graph is recorded, which would run with others.

    Under torch.compile, torch.jit.trace, and a dispatch mode, as torch.fx's make_fx is.
    """
    return not (torch.compiler.is_compiling() or jit_tracing() or torch._C._len_torch_dispatch_stack())


def jit_tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


KNOWN_IMPLS = ("auto", "triton", "hybrid", "persistent", "small", "step", "torch")


def report() -> dict[str, object]:
    """What `fastops env` prints: versions, GPUs, driver, interpreter."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    import fastops

    return {
        "fastops": fastops.__version__,
        "python": sys.version.split()[0],
        "platform": sys.platform,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "transformers": installed("transformers"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "driver": driver_version(),
        "gpus": gpus(),
        "interpreter": interpreting(),
        "FASTOPS_IMPL": os.environ.get("FASTOPS_IMPL"),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, capability, multiprocessors and memory of every CUDA device."""
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
        }
        for gpu in properties
    ]


def driver_version() -> str | None:
    """NVIDIA driver version as the kernel module reports it, without NVML."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)
