"""The house rules that a machine can check: who imports whom, what importing costs, what is pinned where."""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# a package may import those before it in this order; unknown parts of fastops fail the test
FLOORS = {
    "_env": 0,
    "_library": 0,
    "_sequences": 0,
    "_triton_cache": 0,
    "tuning": 0,
    "kernels": 1,
    "ops": 2,
    "nn": 3,
    "integrations": 4,
    "accelerate": 5,
    "explain": 5,  # public names of fastops._accelerate
    "restore": 5,
    "accelerated": 5,
    "inspection": 6,
    "profiling": 6,
    "_env_cli": 6,
    "__main__": 7,
    "__init__": 7,
}


def floor_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    for name, floor in FLOORS.items():
        if part == name or (part.startswith("_") and part.lstrip("_") == name):
            return floor
    raise AssertionError(f"{module} has no floor in the house: add it to FLOORS, knowing where it belongs")


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}" if node.module == "fastops" else node.module
                yield full, node.lineno


@pytest.mark.parametrize("path", sorted((ROOT / "fastops").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_knowledge_flows_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for imported, line in imports_of(path):
        top = imported.split(".")[0]
        assert top not in {"models", "bench", "tests"}, f"{path}:{line} imports {imported}"
        if top == "fastops" and imported not in {"fastops", "fastops.__version__", "fastops.KernelUnavailable"}:
            assert floor_of(imported) <= floor_of(module), f"{path}:{line}: {module} must not import {imported}"


OUTSIDE_KERNELS = set((ROOT / "fastops").rglob("*.py")) - set((ROOT / "fastops" / "kernels").rglob("*.py"))


@pytest.mark.parametrize("path", sorted(OUTSIDE_KERNELS), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_kernels_import_triton_at_the_top(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        assert not any(name.split(".")[0] == "triton" for name in names), f"{path}:{node.lineno} imports triton"


TEST_FILES = sorted(set((ROOT / "tests").rglob("*.py")) - {ROOT / "tests" / "conftest.py"})


def changes_of_environment(statements):
    """Lines that change os.environ when a file is imported: not those of functions, nor of what is started by name."""
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        if isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test):
            continue
        if isinstance(statement, (ast.Assign, ast.AugAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (statement.lineno for target in targets if "environ" in ast.unparse(target))
        elif isinstance(statement, (ast.Expr, ast.Delete)) and re.search(r"environ[.[]", ast.unparse(statement)):
            yield statement.lineno
        for block in ("body", "orelse", "finalbody"):
            yield from changes_of_environment(getattr(statement, block, []))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_importing_tests_leaves_the_environment_alone(path):
    """Collecting one file would otherwise turn the interpreter on, or off, for the tests of all others."""
    lines = list(changes_of_environment(ast.parse(path.read_text(encoding="utf-8")).body))
    assert not lines or path.name == "__main__.py", f"{path} changes os.environ in lines {lines} when it is imported"


def run(code: str, **environment: str) -> str:
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_touches_neither_triton_nor_cuda():
    code = (
        "import sys, torch; before = set(sys.modules); import fastops; new = set(sys.modules) - before;"
        "late = {'triton', 'rich', 'transformers', 'matplotlib'};"
        "assert not late & {m.split('.')[0] for m in new}, late & new;"
        "assert not torch.cuda.is_initialized()"
    )
    run(code)


WITHOUT_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else find(name, package)
sys.meta_path.insert(0, Block())
import torch, fastops
"""


def test_without_triton_everything_is_stock_and_explicit_choices_say_why():
    code = (
        WITHOUT_TRITON
        + """
import torch.nn.functional as F
x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
assert torch.equal(fastops.conv2d_relu(x, w), F.relu(F.conv2d(x, w)))
q = torch.randn(1, 2, 5, 8)
assert torch.allclose(fastops.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
lstm = fastops.nn.LSTM(4, 6)
assert torch.equal(lstm(torch.randn(3, 2, 4))[0].isfinite(), torch.ones(3, 2, 6, dtype=torch.bool))
for call in (lambda: fastops.conv2d_relu(x, w, impl="triton"),
             lambda: fastops.scaled_dot_product_attention(q, q, q, impl="triton")):
    try:
        call()
    except fastops.KernelUnavailable as error:
        assert "triton" in str(error), error
    else:
        raise AssertionError("an explicit choice fell back silently")
print("ok")
"""
    )
    assert run(code, TRITON_INTERPRET="0").strip() == "ok"


def test_flop_formulas_register_whenever_the_counter_is_imported():
    for code in ("import fastops, torch.utils.flop_counter as c", "import torch.utils.flop_counter as c, fastops"):
        out = run(code + "; print(sum('fastops' in str(op) for op in c.flop_registry))")
        assert int(out) > 0


def test_env_command():
    facts = json.loads(run("import sys; from fastops.__main__ import main; sys.exit(main(['env', '--json']))"))
    assert facts["torch"]
    assert {"op", "example", "engine", "why"} <= set(facts["engines"][0])
    table = run("import sys; from fastops.__main__ import main; sys.exit(main(['env']))", COLUMNS="160")
    assert "import_ms" in table
    assert "conv2d_relu" in table


def test_pre_commit_runs_the_pinned_versions():
    pinned = dict(re.findall(r"^([a-z-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = dict(
        re.findall(r"/(ruff|mirrors-mypy).*\n\s+rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    )
    assert hooks["ruff"] == pinned["ruff"]
    assert hooks["mirrors-mypy"] == pinned["mypy"]


def test_public_names_are_few_and_documented():
    import fastops

    assert len(fastops.__all__) <= 25
    for name in fastops.__all__:
        value = getattr(fastops, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), f"fastops.{name} has no docstring"


def test_every_op_explains_itself_and_every_engine_is_known():
    """`fastops env` asks the ops that NAMES lists, FASTOPS_IMPL takes the engines of any."""
    from fastops import _env, ops

    files = (ROOT / "fastops" / "ops").glob("*.py")
    assert {file.stem for file in files if "\ndef explain_auto(" in file.read_text()} == set(ops.NAMES)
    assert {impl for module in ops.modules() for impl in module.IMPLS} == set(_env.KNOWN_IMPLS)


def test_everything_that_computes_is_fuzzed_and_every_op_is_measured():
    """What is new would be left out of both without a word."""
    import fastops
    from fastops import ops

    def words_in(folder):
        return set(re.findall(r"\w+", " ".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))))

    functions = {name for name in fastops.__all__ if inspect.isfunction(getattr(fastops, name))}
    tools = {"accelerate", "accelerated", "explain", "profile", "restore"}  # they compute nothing themselves
    assert tools <= set(fastops.__all__)
    assert (functions - tools) | set(fastops.nn.__all__) <= words_in(ROOT / "tests" / "fuzz")
    measured_as = {"layer_norm_lstm": "LayerNormLSTM"}
    assert {measured_as.get(name, name) for name in ops.NAMES} <= words_in(ROOT / "bench" / "workloads")


def test_what_is_mutated_is_there():
    """Functions that were renamed, and tests that moved, would drop out of `make mutation` without a word."""
    spec = importlib.util.spec_from_file_location("mutation", ROOT / ".ci" / "mutation.py")
    mutation = importlib.util.module_from_spec(spec)
    sys.modules["mutation"] = mutation  # for its dataclasses
    try:
        spec.loader.exec_module(mutation)
    finally:
        del sys.modules["mutation"]
    mutated = {}
    for file, (functions, tests) in mutation.TARGETS.items():
        mutated[file] = {name for _, name in mutation.functions_of(file, functions)[1]}
        for test in tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), test
    from fastops import ops

    for name in ops.NAMES:
        assert {"why_not", "choose"} & mutated[f"fastops/ops/{name}.py"], f"no test of {name}'s dispatch is doubted"
    for file, labels in json.loads(mutation.SURVIVORS.read_text(encoding="utf-8")).items():
        assert {label.split(":")[0] for label in labels} <= mutated[file]
    with pytest.raises(ValueError, match=r"rnn_check\.py has no function nonsense"):
        mutation.functions_of("fastops/ops/rnn_check.py", ("check", "nonsense"))
