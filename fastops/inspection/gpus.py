"""What NVIDIA publishes about its GPUs: limits of each compute capability, size and speed of the cards.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the same figures are in
cuda_occupancy.h. Speeds: data sheets and architecture white papers, dense (no sparsity), boost clock, tensor cores
with fp32 accumulation, which GeForce cards run at half the rate of fp16 accumulation.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """Limits that all GPUs of one compute capability share.

    Attributes:
        number: 86 for sm_86.
        warps: resident warps of a multiprocessor.
        blocks: resident blocks of a multiprocessor.
        shared_bytes: shared memory of a multiprocessor.
        barriers: named barriers of a multiprocessor; None where they do not limit occupancy.
        registers: of a multiprocessor, and the most for a block.
        registers_per_thread: the most for a thread.
        tensor_memory_columns: of a multiprocessor (tcgen05); 0 where there is none.
    """

    number: int
    warps: int
    blocks: int
    shared_bytes: int
    barriers: int | None = None
    registers: int = 65536
    registers_per_thread: int = 256
    tensor_memory_columns: int = 0

    @property
    def name(self) -> str:
        """As compilers spell it: sm_86."""
        return f"sm_{self.number}"

    @property
    def shared_bytes_per_block(self) -> int:
        """The most a block may ask for: all of it but what the driver reserves for each block."""
        return self.shared_bytes - RESERVED_SHARED_BYTES


RESERVED_SHARED_BYTES = 1024
KIB = 1024

CAPABILITIES = {
    capability.number: capability
    for capability in (
        Capability(80, warps=64, blocks=32, shared_bytes=164 * KIB),
        Capability(86, warps=48, blocks=16, shared_bytes=100 * KIB),
        Capability(87, warps=48, blocks=16, shared_bytes=164 * KIB),
        Capability(89, warps=48, blocks=24, shared_bytes=100 * KIB),
        Capability(90, warps=64, blocks=32, shared_bytes=228 * KIB, barriers=64),
        Capability(100, warps=64, blocks=32, shared_bytes=228 * KIB, barriers=64, tensor_memory_columns=512),
        Capability(103, warps=64, blocks=32, shared_bytes=228 * KIB, barriers=64, tensor_memory_columns=512),
        Capability(120, warps=48, blocks=24, shared_bytes=100 * KIB, barriers=24),
        Capability(121, warps=48, blocks=24, shared_bytes=100 * KIB, barriers=24),
    )
}


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        name: as people call it.
        capability: 86 for sm_86.
        multiprocessors: how many are enabled.
        fp16: peak TFLOP/s with fp16 or bf16 operands on the tensor cores.
        tf32: likewise with fp32 operands rounded to TF32.
        fp32: peak TFLOP/s without tensor cores.
        gbytes_per_second: memory bandwidth.
    """

    name: str
    capability: int
    multiprocessors: int
    fp16: float
    tf32: float
    fp32: float
    gbytes_per_second: float

    def tflops(self, dtype: str) -> float:
        """Peak with operands of "fp16", "bf16", "tf32" or "fp32"."""
        return {"fp16": self.fp16, "bf16": self.fp16, "tf32": self.tf32, "fp32": self.fp32}[dtype]


GPUS = (
    Gpu("A100", 80, 108, 312, 156, 19.5, 2039),
    Gpu("A100 40GB", 80, 108, 312, 156, 19.5, 1555),
    Gpu("A30", 80, 56, 165, 82, 10.3, 933),
    Gpu("A10", 86, 72, 125, 62.5, 31.2, 600),
    Gpu("A40", 86, 84, 149.7, 74.8, 37.4, 696),
    Gpu("RTX A6000", 86, 84, 154.8, 77.4, 38.7, 768),
    Gpu("RTX 3060", 86, 28, 25.5, 12.7, 12.7, 360),
    Gpu("RTX 3070", 86, 46, 40.6, 20.3, 20.3, 448),
    Gpu("RTX 3080", 86, 68, 59.5, 29.8, 29.8, 760),
    Gpu("RTX 3090", 86, 82, 71, 35.6, 35.6, 936),
    Gpu("RTX 3090 Ti", 86, 84, 80, 40, 40, 1008),
    Gpu("L4", 89, 58, 121, 60, 30.3, 300),
    Gpu("L40", 89, 142, 181, 90.5, 90.5, 864),
    Gpu("L40S", 89, 142, 362, 183, 91.6, 864),
    Gpu("RTX 6000 Ada", 89, 142, 364, 182, 91.1, 960),
    Gpu("RTX 4060", 89, 24, 30.2, 15.1, 15.1, 272),
    Gpu("RTX 4070", 89, 46, 58.3, 29.1, 29.1, 504),
    Gpu("RTX 4070 Ti", 89, 60, 80.2, 40.1, 40.1, 504),
    Gpu("RTX 4080", 89, 76, 97.5, 48.7, 48.7, 717),
    Gpu("RTX 4090", 89, 128, 165.2, 82.6, 82.6, 1008),
    Gpu("H100", 90, 132, 989, 494, 67, 3350),
    Gpu("H100 PCIe", 90, 114, 756, 378, 51, 2000),
    Gpu("H100 NVL", 90, 132, 835, 417, 60, 3900),
    Gpu("H200", 90, 132, 989, 494, 67, 4800),
    Gpu("GH200", 90, 132, 989, 494, 67, 4000),
    Gpu("B200", 100, 148, 2250, 1125, 75, 8000),
    Gpu("RTX 5070", 120, 48, 61.7, 30.9, 30.9, 672),
    Gpu("RTX 5070 Ti", 120, 70, 87.9, 43.9, 43.9, 896),
    Gpu("RTX 5080", 120, 84, 112.6, 56.3, 56.3, 960),
    Gpu("RTX 5090", 120, 170, 209.5, 104.8, 104.8, 1792),
    Gpu("RTX PRO 6000", 120, 188, 503.8, 251.9, 125, 1792),
)

# the card whose size stands for "sm_90" where only the capability was named
_TYPICAL = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200", 120: "RTX 5090"}
_NOISE = re.compile(r"\b(nvidia|geforce|tesla|gpu|sxm\d?|hbm\d?e?|80gb|141gb|96gb|24gb|10gb)\b")
_VARIANT = re.compile(r"\b(pcie|generation|blackwell|server|workstation|edition|480gb|48gb)\b")


@dataclass(frozen=True)
class Target:
    """What `--target` named: a capability, and a product where one was named or is typical."""

    capability: Capability
    gpu: Gpu | None
    by_name: bool

    @property
    def label(self) -> str:
        """The capability, sm_86, or "RTX 3090 (sm_86)" where the product was named."""
        if self.by_name and self.gpu is not None:
            return f"{self.gpu.name} ({self.capability.name})"
        return self.capability.name


def find_target(text: str) -> Target:
    """The target that "sm_86", "86", "8.6", "RTX 3090" or "NVIDIA GeForce RTX 3090" names; ValueError otherwise."""
    plain = " ".join(text.lower().replace("-", " ").replace("_", " ").split())
    if match := re.fullmatch(r"(?:sm ?)?(\d{1,2})\.?(\d)[af]?", plain):
        number = int(match.group(1) + match.group(2))
        if number in CAPABILITIES:
            gpu = next((gpu for gpu in GPUS if gpu.name == _TYPICAL.get(number)), None)
            return Target(CAPABILITIES[number], gpu, by_name=False)
        known = ", ".join(capability.name for capability in CAPABILITIES.values())
        raise ValueError(f"target {text!r}: no limits are known for sm_{number}; known: {known}")
    names = {_squeeze(gpu.name): gpu for gpu in GPUS}
    less = _NOISE.sub(" ", plain)
    wanted = _squeeze(less)
    # a variant with figures of its own before the product at large
    asked = (_squeeze(plain), wanted, "rtx" + wanted, _squeeze(_VARIANT.sub(" ", less)))
    found = next((names[name] for name in asked if name in names), None)
    if found is None:
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(names[name].name for name in close)}? Give" if close else "give"
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ValueError(f"unknown target {text!r}; {hint} a capability such as sm_86, or one of: {known}")
    return Target(CAPABILITIES[found.capability], found, by_name=True)


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
