"""What can be inspected: every configuration that the library ships, and kernels of the user's own."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fnmatch
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastops.inspection import _source
from fastops.inspection.compile import InspectionError, dtype_of, parameters_of, triton_version
from fastops.kernels._static import StaticCase

# what `fastops inspect` shows when no kernel is named: each kernel in the forms that most calls run
MAIN = (
    "attention.*[*,fp16,dense,descriptors]",
    "attention.*[*,fp16,lengths,descriptors]",
    "attention.*[*,fp16,causal,descriptors]",
    "attention.*[*,fp16,lengths,pointers,sm_80]",
    "attention.*[256,fp16,padded,dropout,pointers,sm_80]",
    "attention.bias[64,*",
    "attention.delta[64,fp16,dense]",
    "attention.keys[fp16]",
    "conv2d.*,fp16]",
    "epilogue.*[channels_last,fp16]",
    "layer_norm_lstm.clamp_lengths[*",
    "layer_norm_lstm.small_*[H64,fp16]",
    "layer_norm_lstm.step_*[H512,fp16]",
    "rnn.*[LSTM,H512,D1,fp16,*",
    "rnn.*[GRU,H512,D1,fp16,*",
    "rnn.small_*[LSTM,H64,*",
    "rnn.step_*[LSTM,*",
    "rnn_cell.*",
)


def library_cases() -> list[StaticCase]:
    """Every shipped kernel configuration, in the order of modules and their lists.

    Raises:
        InspectionError: triton is missing, a kernel module cannot be imported, or two cases share a name and a target.
    """
    triton_version()
    import fastops.kernels

    cases: list[StaticCase] = []
    for found in pkgutil.iter_modules(fastops.kernels.__path__):
        if found.name.startswith("_"):
            continue
        name = f"fastops.kernels.{found.name}"
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise InspectionError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
        if hasattr(module, "static_cases"):
            # a module may pass on the list of its neighbour
            cases.extend(case for case in module.static_cases() if case not in cases)
    names = Counter((case.name, target) for case in cases for target in case.targets)
    if twice := sorted({name for (name, _), count in names.items() if count > 1}):
        raise InspectionError(f"two static cases have the same name and target: {', '.join(twice)}")
    return cases


def main_cases(cases: Sequence[StaticCase]) -> list[StaticCase]:
    """Those of the cases that MAIN names."""
    return [case for case in cases if any(_matches(case.name, pattern) for pattern in MAIN)]


def select(cases: Sequence[StaticCase], patterns: Iterable[str], dtype: str | None = None) -> list[StaticCase]:
    """The cases whose name contains, or as a whole matches, any pattern; all without patterns.

    Raises:
        InspectionError: a pattern, or the dtype, matches nothing.
    """
    chosen = list(cases)
    wanted = list(patterns)
    if wanted:
        for pattern in wanted:
            if not pattern.strip():
                raise InspectionError("an empty KERNEL names nothing; leave it out for all of them")
            if not any(_matches(case.name, pattern) for case in cases):
                raise InspectionError(_nothing_matches(pattern, [case.name for case in cases]))
        chosen = [case for case in cases if any(_matches(case.name, pattern) for pattern in wanted)]
    if dtype is not None:
        plain = plain_dtype(dtype)
        found = sorted({dtype_of(case) for case in chosen})
        chosen = [case for case in chosen if dtype_of(case) == plain]
        if not chosen:
            raise InspectionError(f"no such kernel takes {dtype}; there are {', '.join(found)}")
    return chosen


def _matches(name: str, pattern: str) -> bool:
    name, pattern = name.lower(), pattern.lower()
    # brackets are part of the names, not character classes
    return pattern in name or fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def _nothing_matches(pattern: str, names: list[str]) -> str:
    kernels = list(dict.fromkeys(name.partition("[")[0] for name in names))
    close = difflib.get_close_matches(pattern.partition("[")[0], kernels, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? The" if close else "the"
    return (
        f"no kernel matches {pattern!r}; {hint} library has {', '.join(kernels) or 'none'}; "
        "`--list` shows their configurations. A kernel of your own is given as path/to/file.py:kernel_name"
    )


def plain_dtype(text: str) -> str:
    """As Triton writes it: fp16 of float16 or torch.float16."""
    plain = text.lower().removeprefix("torch.")
    return {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}.get(plain, plain)


def user_cases(
    where: str,
    signature: str | Sequence[str] | Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int | None = None,
    num_stages: int | None = None,
    options: Mapping[str, Any] | None = None,
    grid: int | None = None,
    flops: float | None = None,
    bytes: float | None = None,
    kernel: Any = None,
) -> list[StaticCase]:
    """Cases for a kernel of the user: one, or for an `@triton.autotune`d one each of its configurations.

    Args:
        where: "file.py:kernel" or "package.module:kernel"; with `kernel` given, only a label.
        signature: types of the arguments that are not constexpr, in order or by name: "*fp16", "i32", "fp32",
            "tensordesc<fp16[64,64]>". ":16" after a type says that the value is a multiple of 16, ":1" that it is 1
            (what Triton's specialisation would find); pointers are taken to be aligned to 16 bytes.
        constexprs: values of the constexpr arguments.
        num_warps: as in a launch; by default 4, or what autotune says.
        num_stages: as in a launch; by default 3, or what autotune says.
        options: further compile options, e.g. {"num_ctas": 2}.
        grid: programs that are launched, for waves.
        flops: operations of that launch, for the roofline floor.
        bytes: least bytes it moves, likewise.
        kernel: the jit function itself.

    Raises:
        InspectionError: the kernel cannot be found, the signature does not fit it, or Triton has no such option.
    """
    triton_version()
    _check_options(options or {})
    if kernel is None:
        kernel = _load(where)
    names = parameters_of(kernel)
    name = _source.function_of(kernel).__name__
    cases = []
    for extra, warps, stages in _configurations(kernel, num_warps, num_stages):
        values = {**_defaults(kernel), **extra, **constexprs}
        types, ones, divisible = _bind(name, names, signature, values)
        values = {key: value for key, value in values.items() if key not in types} | dict.fromkeys(ones, 1)
        shown = {key: value for key, value in values.items() if key in constexprs or key in extra}
        if extra:
            shown |= {"num_warps": warps, "num_stages": stages}
        label = ",".join(f"{key}={value}" for key, value in shown.items())
        cases.append(
            StaticCase(
                name=f"{name}[{label}]",
                kernel=kernel,
                signature=types,
                constexprs=values,
                num_warps=warps,
                num_stages=stages,
                options=dict(options or {}),
                divisible_by_16=divisible,
                targets=(80, 86, 89, 90, 100, 120),
                grid=grid,
                flops=flops,
                bytes=bytes,
            )
        )
    return cases


def parse_constexprs(texts: Iterable[str], what: str = "constexpr", example: str = "BLOCK=128") -> dict[str, Any]:
    """{"BLOCK": 128, "DTYPE": tl.float16} of ["BLOCK=128", "DTYPE=tl.float16"]; several may share a text by commas."""
    found: dict[str, Any] = {}
    for text in texts:
        # a comma belongs to a value unless NAME= follows it
        for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not name.isidentifier():
                raise InspectionError(f"{what} {part!r}: expected NAME=VALUE, e.g. {example}")
            found[name] = _value(value)
    return found


def _check_options(options: Mapping[str, Any]) -> None:
    """Triton itself passes over an option that it does not know."""
    from triton.backends.nvidia.compiler import CUDAOptions

    known = [field.name for field in dataclasses.fields(CUDAOptions)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(known))}"
            raise InspectionError(f"Triton has no compile option {name!r}; {hint}")


def _value(text: str) -> Any:
    if match := re.fullmatch(r"(?:tl|triton\.language)\.(\w+)", text):
        import triton.language

        dtype = getattr(triton.language, match.group(1), None)
        if type(dtype).__name__ != "dtype":
            raise InspectionError(f"constexpr value {text!r}: triton.language has no dtype {match.group(1)}")
        return dtype
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _load(where: str) -> Any:
    place, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        raise InspectionError(f"{where!r}: expected path/to/file.py:kernel_name or package.module:kernel_name")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        kernels = [key for key, value in vars(module).items() if _source.is_kernel(value)]
        raise InspectionError(f"{place} has no {name!r}; its kernels are {', '.join(kernels) or 'none'}")
    kernel = getattr(module, name)
    if not _source.is_kernel(kernel):
        raise InspectionError(f"{name!r} in {place} is not decorated with @triton.jit")
    return kernel


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise InspectionError(f"there is no file {path}")
    loaded = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path)), None)
    if loaded is not None:
        return loaded
    # its neighbours can be imported, as when it is run
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InspectionError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InspectionError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _defaults(kernel: Any) -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(_source.function_of(kernel)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and "constexpr" in str(p.annotation)}


def _configurations(
    kernel: Any, num_warps: int | None, num_stages: int | None
) -> list[tuple[dict[str, Any], int, int]]:
    """(constexprs, warps, stages) of each autotune configuration under the decorators, or the one asked for."""
    while not hasattr(kernel, "configs") and _source.is_kernel(kernel):
        kernel = kernel.fn
    configurations = getattr(kernel, "configs", None)
    if not configurations:
        return [({}, num_warps or 4, num_stages or 3)]
    return [
        (dict(one.kwargs), num_warps or one.num_warps or 4, num_stages or one.num_stages or 3) for one in configurations
    ]


def _bind(
    kernel: str,
    names: list[str],
    signature: str | Sequence[str] | Mapping[str, str],
    constexprs: Mapping[str, Any],
) -> tuple[dict[str, str], list[str], tuple[str, ...]]:
    """Types by argument name, the arguments that are 1, and those that are multiples of 16."""
    if isinstance(signature, Mapping):
        given = dict(signature)
    else:
        parts = _split(signature) if isinstance(signature, str) else list(signature)
        if parts and all("=" in part for part in parts):
            given = {name.strip(): kind.strip() for name, _, kind in (part.partition("=") for part in parts)}
        else:
            open_names = [name for name in names if name not in constexprs]
            if len(parts) != len(open_names):
                raise InspectionError(
                    f"kernel {kernel}: --signature has {len(parts)} types, but {len(open_names)} arguments are not "
                    f"constexpr values: {', '.join(open_names)}"
                )
            given = dict(zip(open_names, parts, strict=True))
    types, ones, divisible = {}, [], []
    for name, text in given.items():
        kind, _, hint = text.strip().partition(":")
        if not _TYPE.fullmatch(kind) or hint not in ("", "1", "16"):
            raise InspectionError(
                f"kernel {kernel}: type {text!r} of {name}; expected e.g. *fp16, i32, i32:16, fp32, "
                "tensordesc<fp16[64,64]>"
            )
        if hint == "1":
            ones.append(name)
            continue
        types[name] = kind
        if hint == "16" or kind.startswith("*"):
            divisible.append(name)
    return types, ones, tuple(divisible)


_TYPE = re.compile(
    r"\*?k?(i1|i8|i16|i32|i64|u1|u8|u16|u32|u64|fp16|bf16|fp32|fp64|fp8\w+)|\*\*\w+|tensordesc<\w+\[[\d, ]+\].*>"
)


def _split(signature: str) -> list[str]:
    """Splits at commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[<]*[\]>])", signature) if part.strip()]
