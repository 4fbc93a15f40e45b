"""`make mutation`: do the tests notice small faults in what decides which engine runs, and what is refused?

Each mutant is one such fault: a comparison turned, a condition negated, an integer off by one, a return value lost. It
lives in a forked process's memory only, where the tests named for its file run until one fails. Survivors are printed;
those that change nothing are listed in survivors.json with the reason. Exit code 1 where others survive, or where the
list is out of date. FILES names files or functions: `make mutation FILES="rnn_check _library.py:define"`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS = Path(__file__).with_name("survivors.json")
JOBS = int(os.environ.get("JOBS", "2"))
PATIENCE = 5  # times what the tests take without a fault; a mutant may loop for ever

DISPATCH = "tests/test_dispatch.py"
ATTENTION, RNN, CONV2D = (f"tests/test_dispatch_{op}.py" for op in ("attention", "rnn", "conv2d"))
CONTRACT = "tests/test_attention_contract.py"
TRANSFORMS = "tests/test_transforms.py"
CELLS = "tests/test_rnn_cell.py"
CELL_ERRORS = ("test_kinds_of_errors", "test_same_errors_as_torch", "test_explicit_choice_never_falls_back")
LOOKS = (
    "test_a_look_at_lengths_is_an_op_like_any_other",
    "test_stock_pytorch_goes_on_where_not_even_lengths_can_be_looked_at",
)
ARGUMENTS = "tests/test_attention_arguments.py"
# file, functions (none: all), and the tests that must notice, quickest first
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fastops/tuning/__init__.py": ((), (DISPATCH,)),
    "fastops/_env.py": (("interpreting", "index_of", "why_no_triton", "choose_impl"), (DISPATCH,)),
    "fastops/_library.py": (
        (),
        ("tests/test_library.py", TRANSFORMS, "tests/test_launch_failure.py", "tests/test_launch_failure_compiled.py"),
    ),
    "fastops/ops/attention_checks.py": (
        (),
        (
            ATTENTION,
            f"{CONTRACT}::test_errors_have_the_type_of_torch",
            f"{CONTRACT}::test_errors_of_what_torch_does_not_have",
            "tests/test_attention_packed.py::test_bad_arguments",
        ),
    ),
    "fastops/ops/attention.py": (
        ("why_not", "_engine", "facts"),
        (ATTENTION, TRANSFORMS, f"{CONTRACT}::test_vmap"),
    ),
    "fastops/ops/attention_arguments.py": ((), (ARGUMENTS,)),
    "fastops/ops/attention_reference.py": (("past", "visible_keys", "alibi_bias"), (ARGUMENTS,)),
    "fastops/ops/rnn_check.py": (
        (),
        (RNN, "tests/test_rnn.py::test_bad_input", "tests/test_rnn.py::test_lengths_as_the_kernels_read_them"),
    ),
    "fastops/ops/rnn.py": (("why_not", "_why_no_plan", "choose"), (RNN, TRANSFORMS)),
    "fastops/ops/rnn_reference.py": (("_packing_pays", "_stock_packed"), ("tests/test_rnn_packing.py",)),
    "fastops/ops/rnn_lengths.py": ((), tuple(f"tests/test_launch_failure.py::{test}" for test in LOOKS)),
    "fastops/ops/conv2d_relu.py": (("why_not",), (CONV2D, TRANSFORMS)),
    "fastops/ops/rnn_cell.py": (
        ("why_not", "choose", "_check"),
        (RNN, TRANSFORMS, *(f"{CELLS}::{test}" for test in CELL_ERRORS)),
    ),
    "fastops/ops/layer_norm_lstm.py": (("why_not", "choose"), (RNN, TRANSFORMS)),
    "fastops/nn/rnn.py": (
        ("_Recurrent._check_lengths", "_Recurrent._engine", "_Recurrent._wins"),
        (RNN, "tests/test_rnn_modules.py::test_bad_lengths"),
    ),
    "fastops/nn/rnn_sequences.py": ((), (RNN, "tests/test_rnn_modules.py::test_bad_lengths")),
    "fastops/nn/sequential.py": (
        ("groups", "why_not_plain", "why_not_its_class", "why_no_relu", "why_no_pool"),
        ("tests/test_accelerate_sequential.py", "tests/test_accelerate.py"),
    ),
    "fastops/nn/attention.py": (
        (
            "MultiheadAttention._why_torch",
            "MultiheadAttention._check",
            "attention_masks",
            "lengths_of",
            "refuse_triton",
        ),
        ("tests/test_attention_modules.py",),
    ),
    "fastops/nn/transformer.py": (("holds_causal",), ("tests/test_transformer_masks.py",)),
    "fastops/_accelerate/huggingface.py": (("why_not",), ("tests/test_accelerate_transformers.py",)),
    "fastops/_accelerate/plan.py": (
        ("why_not", "_why_not_names", "_why_not_sequential", "_why_not_weights", "_foreign"),
        ("tests/test_accelerate.py", "tests/test_accelerate_sequential.py"),
    ),
}

OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One fault: the tree of the whole file, and what it is in words."""

    file: str
    line: int
    label: str
    tree: ast.Module


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place. Texts are left alone: what an error says is compared where it matters."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[index] = OTHER[type(operator)]()
            yield changed
    elif isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = OTHER[type(node.op)]()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, (ast.If, ast.IfExp)) and isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
        changed = copy.deepcopy(node)
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        yield changed
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield from (ast.Constant(node.value + step) for step in (1, -1))
    elif isinstance(node, ast.Return) and node.value is not None:
        nothing = isinstance(node.value, ast.Constant) and node.value.value is None
        yield ast.Return(ast.Constant("mutant" if nothing else None))


def places(function: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of every node whose change changes behaviour: not annotations, messages, docstrings."""
    waiting = [function]
    while waiting:
        parent = waiting.pop()
        for name, value in ast.iter_fields(parent):
            if name in {"annotation", "returns", "decorator_list", "type_comment"}:
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                    continue
                yield parent, name, index if isinstance(value, list) else None
                waiting.append(child)


def functions_of(file: str, only: tuple[str, ...]) -> tuple[ast.Module, list[tuple[ast.FunctionDef, str]]]:
    """The tree of a file, and its functions and methods with their names: those of `only`, or all.

    Raises:
        ValueError: `only` names a function that is not there.
    """
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [
        (node, f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name)
        for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    ]
    missing = set(only) - {name for _, name in functions}
    if missing:
        raise ValueError(f"{file} has no function {', '.join(sorted(missing))}")
    return tree, [(node, name) for node, name in functions if not only or name in only]


def mutants(file: str, only: tuple[str, ...]) -> list[Mutant]:
    """All faults of a file's functions, by line."""
    tree, functions = functions_of(file, only)
    found, labels = [], Counter[str]()
    for function, name in functions:
        for parent, field, index in list(places(function)):
            before = getattr(parent, field) if index is None else getattr(parent, field)[index]
            for after in faults(before):
                ast.copy_location(after, before)
                _put(parent, field, index, after)
                words = f"{name}: {_short(before)} -> {_short(after)}"
                labels[words] += 1
                label = words if labels[words] == 1 else f"{words} #{labels[words]}"
                found.append(Mutant(file, before.lineno, label, ast.fix_missing_locations(copy.deepcopy(tree))))
                _put(parent, field, index, before)
    return sorted(found, key=lambda mutant: mutant.line)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(node).split())


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a changed tree."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = ".".join(Path(mutant.file).with_suffix("").parts).removesuffix(".__init__")

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        folder = [str((ROOT / self.mutant.file).parent)] if self.mutant.file.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(
            fullname, ROOT / self.mutant.file, loader=self, submodule_search_locations=folder
        )

    def exec_module(self, module):
        exec(compile(self.mutant.tree, str(ROOT / self.mutant.file), "exec"), module.__dict__)


def start(mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[int, Path]:
    """A child that runs the tests with this fault; its process id and its log. Exit code 0: nobody noticed."""
    handle, log = tempfile.mkstemp(prefix="mutant")
    child = os.fork()
    if child:
        os.close(handle)
        return child, Path(log)
    os.setsid()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    try:
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, Finder(mutant))
        quiet = ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-x", "--tb=line", "-m", "not gpu and not slow"]
        code = int(pytest.main([*quiet, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int, deadline: float) -> int | None:
    """The exit code, None while it runs. A child past the deadline is killed, which is a code of its own."""
    done, status = os.waitpid(child, os.WNOHANG)
    if not done and time.monotonic() > deadline:
        os.killpg(child, signal.SIGKILL)
        done, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if done else None


def survivors_of(found: list[Mutant], tests: tuple[str, ...]) -> list[Mutant]:
    """Those that no test notices. RuntimeError where the tests fail without any fault."""
    begin = time.monotonic()
    child, log = start(None, tests)
    while (code := ended(child, begin + 900)) is None:
        time.sleep(0.02)
    if code != 0:
        raise RuntimeError(f"the tests {' '.join(tests)} fail without a fault:\n{log.read_text()[-3000:]}")
    log.unlink()
    limit = PATIENCE * (time.monotonic() - begin) + 30
    alive: list[Mutant] = []
    running: list[tuple[Mutant, int, Path, float]] = []
    waiting = list(reversed(found))
    while waiting or running:
        while waiting and len(running) < JOBS:
            mutant = waiting.pop()
            running.append((mutant, *start(mutant, tests), time.monotonic() + limit))
        for one in list(running):
            mutant, child, log, deadline = one
            code = ended(child, deadline)
            if code is None:
                continue
            running.remove(one)
            log.unlink()
            if code == 0:
                alive.append(mutant)
        time.sleep(0.02)
    return sorted(alive, key=lambda mutant: mutant.line)


def main(arguments: list[str]) -> int:
    """Run, report, and compare with the list of explained survivors."""
    usage = argparse.ArgumentParser(
        usage='make mutation [FILES="..."]',
        description=__doc__,
        epilog="files:\n" + "\n".join(f"  {file}" for file in TARGETS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usage.add_argument("wanted", nargs="*", metavar="FILE", help="part of a file's name, or file:function; none: all")
    wanted = usage.parse_args(arguments).wanted
    os.chdir(ROOT)
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT)]
    import hypothesis  # noqa: F401  what every child would import again
    import numpy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    explained: dict[str, dict[str, str]] = json.loads(SURVIVORS.read_text(encoding="utf-8"))
    total = unexplained = stale = 0
    for word in wanted:
        if not any(word.partition(":")[0] in file for file in TARGETS):
            print(f"no file to mutate is named like {word!r}; there are {', '.join(TARGETS)}", file=sys.stderr)
            return 2
    for file, (functions, tests) in TARGETS.items():
        words = [word for word in wanted if word.partition(":")[0] in file]
        if wanted and not words:
            continue
        only = {word.partition(":")[2] for word in words} - {""}
        try:
            found = mutants(file, tuple(only) or functions)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        known = {label for label in explained.get(file, {}) if not only or label.split(":")[0] in only}
        alive = survivors_of(found, tests)
        new = [mutant for mutant in alive if mutant.label not in known]
        gone = known - {mutant.label for mutant in alive}
        print(
            f"{file}: {len(found)} mutants, {len(alive)} survive, {len(alive) - len(new)} of them explained", flush=True
        )
        for mutant in new:
            print(f"  survives  {file}:{mutant.line} {mutant.label}", flush=True)
        for label in sorted(gone):
            print(f"  is caught, or no more: remove it from {SURVIVORS.name}: {label}", flush=True)
        total, unexplained, stale = total + len(found), unexplained + len(new), stale + len(gone)
    print(f"{total} mutants, {unexplained} survive without an explanation")
    return 1 if unexplained or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
