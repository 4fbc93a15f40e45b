"""Environments made of packages that are installed already: links instead of downloads."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path


def plain(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required_by(*names: str) -> set[str]:
    """These distributions and all that they require, extras left out, as far as installed here."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [plain(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(plain(requirement.name))
    return found


def everything_but(*left_out: str) -> set[str]:
    """All distributions here but these and fastops itself."""
    return {plain(one.name) for one in distributions()} - {plain(name) for name in left_out} - {"fastops-triton"}


def make(folder: Path, packages: Iterable[str]) -> Path:
    """A virtual environment that holds exactly these distributions, as links; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in packages:
        for source in _top_level(distribution(name)):
            target = site / source.name
            if not target.exists():
                os.symlink(source, target)
    return folder / "bin" / "python"


def _top_level(package: Distribution) -> set[Path]:
    """The files and folders of site-packages that a distribution consists of."""
    root = Path(str(package.locate_file("")))
    names = {file.parts[0] for file in package.files or ()}
    return {root / name for name in names if name not in {"..", "__pycache__"} and (root / name).exists()}
