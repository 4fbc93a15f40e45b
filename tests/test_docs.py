"""Every Python block of the README and the docs runs, every link leads somewhere, tables hold what they are of."""

import json
import re
from pathlib import Path

import pytest

import fastops
import fastops.inspection
import fastops.profiling
from bench import results
from fastops.inspection.render import duration
from fastops.kernels import rnn_plan
from fastops.ops import rnn

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


COLUMNS = {
    "shared bytes": "shared_bytes",
    "registers": "registers",
    "main loop": "loop",
    "tensor-core instructions in it": "loop_tensor_operations",
}


def static_rows():
    """Rows of tables that begin with the name of a compiled configuration."""
    for page in PAGES:
        header = []
        for line in page.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if cells and re.fullmatch(r"`[a-z0-9_]+\.[a-z0-9_]+\[[^`]+\]`", cells[0]):
                name = cells[0].strip("`")
                yield pytest.param(name, dict(zip(header, cells, strict=True)), id=f"{page.name}-{name}")
            elif cells and not set("".join(cells)) <= set("-: "):
                header = cells


@pytest.mark.parametrize(("name", "row"), list(static_rows()))
def test_static_figures_are_those_of_the_snapshot(name, row):
    snapshot = json.loads((ROOT / "tests" / "static" / "triton-3.7.1.json").read_text(encoding="utf-8"))["kernels"]
    target = re.search(r"sm_\d+", name)
    figures = snapshot[name][target.group() if target else "sm_90"]
    shown = {heading: row[heading] for heading in COLUMNS if heading in row}
    assert shown == {heading: f"{figures[COLUMNS[heading]]:,}" for heading in shown}
    assert shown


def measured_on_a_cpu():
    return results.read(max((ROOT / "bench" / "results" / "cpu").glob("*.json")))


def speed(row):
    versus = row["vs_best"]
    return f"{versus['ratio']:.3f}x [{versus['lo']:.3f}, {versus['hi']:.3f}]"


def test_times_in_the_readme_are_those_of_the_committed_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    document = measured_on_a_cpu()
    assert f"commit {document['env']['commit'][:7]}" in text
    wanted = []
    for row in document["rows"]:
        versus, providers = row["vs_best"], row["providers"]
        times = [duration(providers[versus[which]]["median_s"]) for which in ("best", "arm")]
        wanted.append(f"{row['mode']} | {times[0]} | {times[1]} | {speed(row)} | {row['verdict']} |")
    shown = [line.partition("| ")[2].partition("| ")[2] for line in text.splitlines() if re.search(r"x \[\d", line)]
    assert sorted(shown) == sorted(wanted)


def test_speeds_of_attention_with_lengths_are_those_of_the_committed_file():
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    rows = [row for row in measured_on_a_cpu()["rows"] if row["op"] == "attention" and row["shape"].get("fill")]
    wanted = [f"| up to {row['shape']['q_len']} | {row['shape']['heads']} | {speed(row)} |" for row in rows]
    assert sorted(line for line in text.splitlines() if re.search(r"x \[\d", line)) == sorted(wanted)
    for row in rows:
        assert (row["mode"], row["dtype"], row["shape"]["batch"], row["shape"]["fill"]) == ("infer", "fp32", 8, 0.5)


def hidden_sizes():
    """Rows of the table of limits: engine, modes, bytes of a number, {capability: largest H}."""
    text = (ROOT / "docs" / "rnn.md").read_text(encoding="utf-8")
    header, _, *rows = re.search(r"^\| largest H .*?(?=\n\n)", text, re.M | re.S).group().splitlines()
    targets = [[int(target) for target in re.findall(r"sm_(\d+)", cell)] for cell in header.split("|")[2:-1]]
    assert {target for column in targets for target in column} == set(rnn_plan.SHARED_BYTES)
    for row in rows:
        label, *cells = row.strip("|").split("|")
        engine, kinds, dtypes = re.fullmatch(r" (\w+): (.*) in (.*) ", label).groups()
        modes = [mode for mode in rnn_plan.GATES if mode.partition("_")[0] in kinds.split(", ")]
        sizes = {{"fp16": 2, "bf16": 2, "fp32": 4}[dtype] for dtype in dtypes.split(", ")}
        largest = {t: int(cell) for column, cell in zip(targets, cells, strict=True) for t in column}
        for size in sizes:
            yield from (pytest.param(engine, mode, size, largest, id=f"{engine}-{mode}-{size}") for mode in modes)


ROWS = list(hidden_sizes())


def test_the_limits_name_every_engine_mode_and_dtype():
    named = sorted(row.values[:3] for row in ROWS)
    assert named == sorted((e, m, size) for e in ("small", "persistent") for m in rnn_plan.GATES for size in (2, 4))
    text = (ROOT / "docs" / "rnn.md").read_text(encoding="utf-8")
    assert f"step: at most {rnn.MAX_STEP_BATCH:,} rows" in text
    assert f"H above {rnn.IEEE_HIDDEN} only" in text


@pytest.mark.parametrize(("engine", "mode", "itemsize", "largest"), ROWS)
def test_largest_hidden_sizes_are_those_of_the_plans(engine, mode, itemsize, largest):
    def fits(hidden, machine):
        for backward in (False, True):
            if engine == "small":
                plan = rnn_plan.small(mode, hidden, itemsize, machine, backward)
            else:
                plan = rnn_plan.persistent(mode, hidden, 64, 1, itemsize, machine, backward)
            if isinstance(plan, str):
                return False
        return True

    for target, limit in largest.items():
        machine = rnn_plan.Machine.of(target, multiprocessors=1024)
        sizes = range(1, 201) if engine == "small" else range(8, 1105, 8)
        assert [hidden for hidden in sizes if fits(hidden, machine)] == [h for h in sizes if h <= limit], target


def test_everything_public_is_on_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for module in (fastops, fastops.nn, fastops.inspection, fastops.profiling):
        missing = [name for name in module.__all__ if not re.search(rf"\b{name}\b", pages)]
        assert set(missing) <= {"__version__"}, f"{module.__name__}: no page names {missing}"


def test_every_environment_variable_is_explained():
    files = [path for place in ("fastops", "bench", "models", "tests") for path in (ROOT / place).rglob("*.py")]
    files += [path for path in (ROOT / ".ci").iterdir() if path.is_file()]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    read = set(re.findall(r"(?<![A-Z_])FASTOPS_[A-Z_]+[A-Z]", text))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert {"FASTOPS_IMPL", "FASTOPS_CACHE"} <= read <= explained
