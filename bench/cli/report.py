"""`python -m bench report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cli import common
from bench.results import Unreadable, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("results", metavar="R.json", help="a file that `python -m bench run --json` wrote")
    parser.add_argument("-o", "--output", type=Path, help="report.html or report.md; default: R.html beside R.json")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also PNG and SVG figures, light and dark")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; exit 0, or 2 where the results cannot be read or the page not be written."""
    from bench.report import figures, html, markdown

    output = arguments.output or Path(arguments.results).with_suffix(".html")
    try:
        document = read(arguments.results)
        if output.suffix == ".md":
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(markdown.render(document), encoding="utf-8")
        elif output.suffix == ".html":
            html.write(document, output)
        else:
            raise common.CannotError(f"{output}: give a name that ends in .html or .md")
        written = [output]
        if arguments.figures:
            written += figures.write(document, arguments.figures)
    except (Unreadable, common.CannotError) as error:
        return common.fail(error)
    except ImportError as error:
        return common.fail(
            common.CannotError(f"figures need matplotlib: pip install 'fastops-triton[bench]' [{error}]")
        )
    except OSError as error:
        return common.fail(common.CannotError(f"{error.filename or output}: {error.strerror or error}"))
    for path in written:
        print(path)
    return 0
