"""What is built is what belongs in it, and it works where nothing else is installed."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests import environments

ROOT = Path(__file__).parent.parent


def run(*command, cwd, fails=False, **variables):
    """A command with nothing of this process's Python in its environment."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON", "FASTOPS", "COVERAGE"))}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**inherited, "COLUMNS": "160", **variables},
        timeout=900,
    )
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def build(kind, source, folder):
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source)
    return next(folder.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("hatchling")
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """Built from the unpacked sdist, as an index would have it built."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def test_sdist_holds_what_git_tracks(unpacked):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    untracked = subprocess.run(
        ["git", "ls-files", "-z", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # files of a change that is not committed yet come and go
    known = {name for name in (tracked + untracked).split("\0") if name and (ROOT / name).exists()}
    inside = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert inside - {"PKG-INFO"} == {name for name in known if not name.startswith(".github/")}


def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not re.match(r"fastops_triton-[^/]*\.dist-info/", name)}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
        commands = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastops").rglob("*")
        if path.suffix in {".py", ".json", ".typed"} and "__pycache__" not in path.parts
    }
    assert inside == source
    assert {"fastops/py.typed", "fastops/tuning/rnn.json"} <= inside
    assert "fastops = fastops.__main__:main" in commands
    assert re.search(r"^License-Expression: MIT$", metadata, re.M)
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.M)


def test_metadata_is_fit_for_an_index(sdist, wheel):
    pytest.importorskip("twine")
    report = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT, NO_COLOR="1")
    assert report.count("PASSED") == 2


def test_the_readme_of_the_metadata_refers_to_nothing_that_is_not_there(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    text = metadata.partition("\n\n")[2]
    for block in re.findall(r"^```python\n.*?^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S):
        assert block in text
    assert [target for target in re.findall(r"\]\(([^)]*)\)", text) if not target.startswith("https://")] == []
    named = re.findall(r"\(`([\w/]+\.\w+)`\)|: `([\w/]+\.png)`", text)
    assert len(named) >= 10
    assert all((ROOT / (link or picture)).is_file() for link, picture in named)


def test_sdist_can_make_what_its_readme_promises(unpacked):
    for target in ("bench", "test", "lint", "inspect-matrix"):
        recipe = run("make", "--dry-run", target, cwd=unpacked)
        for script in re.findall(r"\.ci/[\w-]+", recipe):
            assert os.access(unpacked / script, os.X_OK) or f"sh {script}" in recipe, f"{script} is missing"
            assert (unpacked / script).is_file()


def installed(wheel, folder, packages):
    """An environment of these packages with the wheel in it; its interpreter."""
    python = environments.make(folder, packages)
    site = next(folder.glob("lib/python*/site-packages"))
    # --python names the environment that pip installs into
    pip = [sys.executable, "-m", "pip", "-q", "--python", python, "install"]
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    assert (site / "fastops" / "__init__.py").is_file()
    return python


@pytest.fixture(scope="module")
def minimal(wheel, tmp_path_factory):
    """The wheel and what its metadata requires, and what that requires: no extras."""
    pytest.importorskip("triton")
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    needs = [
        re.match(r"[\w.-]+", line).group()
        for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
        if "extra ==" not in line
    ]
    assert sorted(needs) == ["numpy", "rich", "torch", "triton"]
    return installed(wheel, tmp_path_factory.mktemp("minimal"), environments.required_by(*needs))


@pytest.fixture(scope="module")
def without_triton(wheel, tmp_path_factory):
    return installed(
        wheel, tmp_path_factory.mktemp("plain"), environments.required_by("torch", "numpy", "rich") - {"triton"}
    )


# one process an environment: importing torch is what costs
PRELUDE = """
import json, sys
from importlib.metadata import entry_points
import torch, fastops
(script,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "fastops")
command = script.load()
x, w, b = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
assert torch.equal(fastops.conv2d_relu(x, w, b), torch.relu(torch.nn.functional.conv2d(x, w, b)))
model = fastops.accelerate(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)))
assert model(x).shape == (2, 4, 3, 3)
assert str(fastops.explain(model))
assert fastops.nn.LSTM(4, 6)(torch.randn(3, 2, 4))[0].shape == (3, 2, 6)
assert command("profile --model torch.nn:Flatten --input 2x3x4 --steps 1 --warmup 0".split()) == 0
try:
    import fastops.integrations.transformers
except ImportError as error:
    print("hint:", error)
print("library:", fastops.__file__)
"""

WITH_TRITON = """
ours = fastops.conv2d_relu(x, w, b, impl="triton")
assert (ours - fastops.conv2d_relu(x, w, b, impl="torch")).abs().max() < 1e-4
assert command(["inspect", "--list"]) == 0
"""

WITHOUT_TRITON = """
try:
    fastops.conv2d_relu(x, w, b, impl="triton")
except fastops.KernelUnavailable as error:
    print("hint:", error)
for arguments in ("inspect --list", "inspect conv2d", "inspect attention --shape 1,2,64,64"):
    assert command(arguments.split()) == 2
"""


def test_library_works_where_only_requirements_are_installed(minimal, tmp_path):
    said = run(minimal, "-c", PRELUDE + WITH_TRITON, cwd=tmp_path, TRITON_INTERPRET="1")
    assert f"library: {minimal.parent.parent}" in said
    assert "step:" in said  # the profile
    assert said.count("conv2d.") > 10  # the list
    assert re.search(r"hint: .*pip install .*fastops-triton\[hf\]", said)


def test_without_triton_everything_answers(without_triton, tmp_path):
    said = run(without_triton, "-c", PRELUDE + WITHOUT_TRITON, cwd=tmp_path)
    assert f"library: {without_triton.parent.parent}" in said
    assert re.search(r"hint: .*triton is not installed \(pip install triton; Linux only\)", said)
    assert len(re.findall(r"fastops inspect: .*triton", said)) == 3


@pytest.mark.slow
def test_commands_run_in_both_environments(minimal, without_triton, tmp_path):
    for python, has_triton in ((minimal, True), (without_triton, False)):
        fastops = python.parent / "fastops"
        facts = json.loads(run(fastops, "env", "--json", cwd=tmp_path))
        assert (facts["triton"] is not None) == has_triton
        assert facts["transformers"] is None
        assert "conv2d_relu" in run(fastops, "env", cwd=tmp_path)
        run(fastops, "inspect", "--list", cwd=tmp_path, fails=not has_triton)
        assert "usage: python -m bench" in run(python, "-m", "bench", "--help", cwd=ROOT)
        assert "usage: python -m models.train" in run(python, "-m", "models.train", "--help", cwd=ROOT)


@pytest.mark.slow
def test_wheel_installs_from_an_index_into_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel, "-c", ROOT / "constraints.txt", cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    run(python, "-c", PRELUDE + WITH_TRITON, cwd=tmp_path, TRITON_INTERPRET="1")
    run(python.parent / "fastops", "env", cwd=tmp_path)
    assert "attention" in run(python.parent / "fastops", "inspect", "--list", cwd=tmp_path)


def parsers(path, parser):
    """Every parser of a command line with the words that lead to it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(f"{path} {name}", inner)


def command_lines():
    for main in ("fastops.__main__", "bench.__main__"):
        for name, (module, summary) in importlib.import_module(main).COMMANDS.items():
            parser = argparse.ArgumentParser(description=summary)
            importlib.import_module(module).add_arguments(parser)
            yield from parsers(f"{main.split('.')[0]} {name}", parser)
    yield from parsers("models.train", importlib.import_module("models.train").parser())


def test_every_option_explains_itself():
    pytest.importorskip("triton")
    pytest.importorskip("rich")
    checked = 0
    for path, parser in command_lines():
        assert parser.description, f"{path} does not say what it does"
        for action in parser._actions:
            label = "/".join(action.option_strings) or action.dest
            assert action.help not in (None, "", argparse.SUPPRESS), f"{path}: {label} has no help text"
            checked += 1
        assert parser.format_help()  # a stray % in a help text fails here
    assert checked > 60


def test_help_lists_the_commands(capsys):
    for name in ("fastops", "bench"):
        main = importlib.import_module(f"{name}.__main__")
        with pytest.raises(SystemExit, match="0"):
            main.main(["--help"])
        text = capsys.readouterr().out
        for command, (_, summary) in main.COMMANDS.items():
            assert command in text
            assert summary.split()[0] in text


PRETENDED_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo made >>"$MADE"
elif [ "$1 $2" = "-m pip" ]; then
    exit "${PIP_ENDS_WITH:-0}"
fi
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_an_installation_that_was_stopped_starts_anew(tmp_path):
    """And one that was whole is kept, whatever a later call of pip ends with."""
    python, made = tmp_path / "python3", tmp_path / "made"
    python.write_text(PRETENDED_PYTHON)
    python.chmod(0o755)
    names = {
        "PYTHON": str(python),
        "VENV": str(tmp_path / "venv"),
        "EXTRAS": "dev",
        "CONSTRAINTS": "",
        "MADE": str(made),
    }
    for ends_with, environments_made in ((1, 1), (0, 2), (0, 2), (1, 2), (0, 2)):
        done = subprocess.run(
            ["sh", ROOT / ".ci" / "install"],
            env={**os.environ, **names, "PIP_ENDS_WITH": str(ends_with)},
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert done.returncode == ends_with, done.stderr
        assert made.read_text().count("made") == environments_made
