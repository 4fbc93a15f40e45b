"""Every Python block of the README and the docs runs, and every link inside them leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks():
    """The blocks of a page run one after another in one namespace, as a reader would type them."""
    for page in PAGES:
        found = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
        if found:
            yield pytest.param(page, found, id=page.name)


@pytest.mark.parametrize(("page", "code"), list(blocks()))
def test_code_blocks_run(page, code, tmp_path, monkeypatch):
    if any("transformers" in block for block in code):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
