"""The report: one offline file, opened in a real browser; nothing from a result file becomes markup."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from bench import table
from bench.__main__ import main
from bench.cli import common
from bench.report import html, markdown
from tests.bench_document import HOSTILE, document

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=5000"


class Outline(HTMLParser):
    """Elements, and text per element."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open = dict(attributes).get("id", tag)

    def handle_data(self, data):
        self.texts[self.open] = self.texts.get(self.open, "") + data


def test_one_offline_file():
    text = html.render(document())
    assert len(text.encode()) < html.MOST_BYTES
    outside = [a for tag, a in Outline(text).found for key in ("src", "href") if key in a]
    assert outside == []
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_raw_data_is_inside_and_whole():
    made = document(rows=5)
    kept = json.loads(Outline(html.render(made)).texts["data"])
    assert kept["document"] == made
    assert kept["left_out"] == 0


def test_a_large_result_stays_under_the_limit_and_says_what_it_lacks():
    made = document(rows=200, samples=400)
    text = html.render(made)
    assert len(text.encode()) <= html.MOST_BYTES
    kept = json.loads(Outline(text).texts["data"])
    assert kept["left_out"] == 200 * 2 * 400
    assert len(kept["document"]["rows"]) == 200
    assert "samples_s" in made["rows"][0]["providers"]["sdpa"]  # the caller's data is untouched


def test_hostile_text_stays_text():
    text = html.render(document(hostile=HOSTILE))
    plain = html.render(document())
    tags = [tag for tag, _ in Outline(text).found]
    assert tags == [tag for tag, _ in Outline(plain).found]
    assert HOSTILE in json.loads(Outline(text).texts["data"])["document"]["env"]["machine"]
    assert "<img" not in markdown.render(document(hostile=HOSTILE))


def test_markdown_has_one_line_a_case_and_names_the_machine():
    made = document(rows=8, hostile="|\n<b>")
    lines = markdown.render(made).splitlines()
    cells = [line for line in lines if line.startswith("|")]
    assert len(cells) == 8 + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in cells} == {10}
    assert "Made-up GPU" in lines[0]


def test_tables_leave_out_what_no_row_has(capsys):
    """A CPU has no ceiling, and counts neither memory nor launches."""
    made = document(rows=2)
    for row in made["rows"]:
        for provider in row["providers"].values():
            for key in ("ceiling_pct", "peak_bytes", "launches"):
                provider.pop(key, None)
    assert "ceiling" not in markdown.render(made)
    table.print_rows(common.console(), made["rows"], every_arm=True)
    shown = capsys.readouterr().out
    assert "noise" in shown
    assert not {"ceiling", "memory", "launches"} & set(re.findall(r"\w+", shown))
    made["rows"][0]["providers"]["fastops"]["ceiling_pct"] = 40.0
    assert "| 40 % |" in markdown.render(made)
    assert "| - |" in markdown.render(made)


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    source = tmp_path / "r.json"
    source.write_text(json.dumps(document(rows=6, hostile="$x_{<b>")))
    assert main(["report", str(source), "-o", str(tmp_path / "r.md"), "--figures", str(tmp_path / "figures")]) == 0
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["speedup-dark.png", "speedup-dark.svg", "speedup-light.png", "speedup-light.svg"]
    assert all((tmp_path / "figures" / name).stat().st_size > 5000 for name in names)
    assert (tmp_path / "figures" / "speedup-light.svg").read_text().count("opacity: 0.5") == 6  # noise, row by row


def test_report_errors(tmp_path, capsys):
    source = tmp_path / "r.json"
    source.write_text(json.dumps(document(rows=1)))
    assert main(["report", str(source), "-o", str(tmp_path / "r.pdf")]) == 2
    assert ".html or .md" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing.json")]) == 2
    assert main(["report", str(source), "-o", str(source / "r.html")]) == 2
    assert "r.json" in capsys.readouterr().err


def test_empty_and_ratioless_results():
    for rows in ([], [document(rows=8)["rows"][7]]):
        made = {**document(rows=1), "rows": rows}
        assert "fastops benchmark" in html.render(made)
        assert markdown.render(made).count("\n|") >= 2


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")

    def run(page, *extra):
        folder = tmp_path_factory.mktemp("browser")
        path = folder / "report.html"
        path.write_text(page, encoding="utf-8")
        command = [BROWSER, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", *extra]
        result = subprocess.run([*command, path.as_uri()], capture_output=True, timeout=120, check=False)
        return result.stdout.decode("utf-8", "replace")

    return run


def test_a_browser_draws_it(browse, tmp_path):
    made = document()
    dom = Outline(browse(html.render(made), "--dump-dom", "--enable-logging=stderr"))
    tags = [tag for tag, _ in dom.found]
    ratios = sum(1 for row in made["rows"] if row["vs_best"])
    assert ("html", {"lang": "en", "data-ready": "true"}) in dom.found
    assert sum(attributes.get("class") == "case" for _, attributes in dom.found) == len(made["rows"])
    assert tags.count("circle") > 2 * ratios  # dots, roofline, lines
    assert tags.count("figure") >= 4
    assert "geometric mean" in dom.texts["verdict"]
    assert not any("NaN" in str(value) for _, attributes in dom.found for value in attributes.values())
    picture = tmp_path / "page.png"
    browse(html.render(made), f"--screenshot={picture}", "--window-size=1300,1600")
    assert picture.stat().st_size > 50_000


def test_a_column_without_any_value_is_left_out(browse):
    made = document()
    optional = ("% ceiling", "peak memory")
    dom = browse(html.render(made), "--dump-dom")
    assert all(f">{name}</button>" in dom for name in optional)
    for row in made["rows"]:
        for provider in row["providers"].values():
            provider.pop("peak_bytes", None)
            provider.pop("ceiling_pct", None)
    dom = browse(html.render(made), "--dump-dom")
    assert not any(f">{name}</button>" in dom for name in optional)
    assert ">TFLOP/s</button>" in dom
    assert 'colspan="5"' in dom  # the reason of a row without a ratio: all between mode and verdict


@pytest.mark.parametrize("peak_bytes", [None, 12345 * 2**20])
def test_the_table_fits_a_page_of_1200_pixels(browse, peak_bytes):
    made = document()
    for row in made["rows"]:
        for provider in row["providers"].values():
            provider["peak_bytes"] = peak_bytes
    measure = "document.title = document.querySelector('.scroll').scrollWidth"
    page = html.render(made).replace("</body>", f"<script>{measure}</script></body>")
    dom = browse(page, "--dump-dom", "--window-size=1200,1400")
    assert int(re.search(r"<title>(\d+)</title>", dom).group(1)) <= 1200 - 2 * 24  # the margins of the page


def test_the_page_names_every_command(browse):
    made = document(rows=1)
    made["env"] |= {
        "argv": ["bench", "run", "--resume"],
        "earlier_argv": [["bench", "run"], ["bench", "run", "-k", "x"]],
    }
    dom = browse(html.render(made), "--dump-dom")
    assert "<dt>command</dt><dd>bench run --resume</dd>" in dom
    assert "<dt>earlier commands</dt><dd>bench run; bench run -k x</dd>" in dom


def test_a_browser_runs_nothing_hostile(browse):
    dom = browse(html.render(document(hostile=HOSTILE)), "--dump-dom")
    assert "<title>fastops benchmark</title>" in dom
    outline = Outline(dom)
    assert ("html", {"lang": "en", "data-ready": "true"}) in outline.found
    assert all(tag != "img" for tag, _ in outline.found)


def test_a_browser_draws_an_empty_result(browse):
    dom = Outline(browse(html.render({**document(rows=1), "rows": []}), "--dump-dom"))
    assert ("html", {"lang": "en", "data-ready": "true"}) in dom.found
