"""How a kernel is named to another process, and what its machine code depends on."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def function_of(kernel: Any) -> Any:
    """The Python function under `@triton.jit`, `@triton.autotune` and `@triton.heuristics`."""
    while not inspect.isfunction(kernel):
        if not hasattr(kernel, "fn"):
            raise TypeError(f"expected a function decorated with @triton.jit, got {kernel!r}")
        kernel = kernel.fn
    return kernel


def is_kernel(value: Any) -> bool:
    """Whether it is something `@triton.jit` and its companions made."""
    return type(value).__module__.startswith("triton.") and hasattr(value, "fn")


def address(kernel: Any) -> dict[str, str | None]:
    """Module, file and name under which another process finds the kernel."""
    function = function_of(kernel)
    if "<locals>" in function.__qualname__:
        raise ValueError(f"kernel {function.__qualname__} is defined inside a function; define it at module level")
    return {
        "module": function.__module__,
        "file": inspect.getsourcefile(function),
        "name": function.__qualname__,
    }


def find(where: Mapping[str, Any]) -> Any:
    """What `address` described, imported or executed here."""
    value: Any = _module(where["module"], where["file"])
    for part in where["name"].split("."):
        value = getattr(value, part)
    return value


def _module(name: str, file: str) -> ModuleType:
    if name in sys.modules and name != "__main__":
        return sys.modules[name]
    spec = None if name == "__main__" else importlib.util.find_spec(name)
    if spec is not None and spec.origin and os.path.realpath(spec.origin) == os.path.realpath(file):
        return importlib.import_module(name)
    # a script, or a module that the caller loaded from a file
    alias = f"_inspected_{hashlib.sha256(file.encode()).hexdigest()[:16]}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]


def encode(name: str, value: Any) -> Any:
    """A constexpr value as JSON: numbers, strings, tuples, Triton dtypes and jit functions."""
    if type(value).__name__ == "constexpr":
        value = value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple": [encode(name, item) for item in value]}
    if is_kernel(value):
        return {"jit": address(value)}
    if type(value).__module__.startswith("triton.language") and type(value).__name__ == "dtype":
        return {"dtype": str(value)}
    raise TypeError(f"constexpr {name}={value!r}: expected a number, string, tuple, Triton dtype or jit function")


def decode(value: Any) -> Any:
    """The constexpr value that `encode` wrote."""
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(decode(item) for item in value["tuple"])
    if "dtype" in value:
        import triton.language

        return triton.language.dtype(value["dtype"])
    return find(value["jit"])


def digest(kernel: Any, constexprs: Mapping[str, Any]) -> str:
    """Hash of the source of a kernel, of every jit function it calls and of every global it reads."""
    found: dict[str, str] = {}
    for root in [kernel, *(value for value in constexprs.values() if is_kernel(value))]:
        _collect(function_of(root), found)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _collect(function: Any, found: dict[str, str]) -> None:
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    found[name] = source = textwrap.dedent(inspect.getsource(function))
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    for node in ast.walk(ast.parse(source)):
        value = _resolve(node, scope)
        if type(value).__name__ == "constexpr":
            value = value.value
        if is_kernel(value):
            called = function_of(value)
            if not called.__module__.startswith("triton."):  # its version stands for Triton's own library
                _collect(called, found)
        elif isinstance(value, bool):
            # a flag may say whether this process interprets, which the one that compiles never does: hash its source
            if isinstance(node, ast.Attribute):
                text = _definition(_resolve(node.value, scope).__name__, node.attr)
            else:
                text = _definition(function.__module__, ast.unparse(node))
            found[f"{name}:{ast.unparse(node)}"] = text or repr(value)
        elif isinstance(value, int | float | str | tuple):
            found[f"{name}:{ast.unparse(node)}"] = repr(value)


def _definition(module: str, name: str) -> str | None:
    """The statement that gives a global of a module its value, followed through `from other import name`."""
    for statement in _statements(getattr(sys.modules.get(module), "__file__", None)):
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            origin = next((alias.name for alias in statement.names if (alias.asname or alias.name) == name), None)
            if origin is not None:
                return _definition(statement.module, origin)
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.unparse(statement)
    return None


@functools.cache
def _statements(file: str | None) -> tuple[ast.stmt, ...]:
    try:
        return tuple(ast.parse(Path(file).read_text(encoding="utf-8")).body) if file else ()
    except (OSError, SyntaxError):
        return ()


def _resolve(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, scope)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None
