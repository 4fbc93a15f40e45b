"""`python -m bench env`."""

from __future__ import annotations

import argparse
import json

from bench import environment
from bench.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> int:
    """Print the environment as JSON."""
    try:
        print(json.dumps(environment.record(common.device(arguments.device)), indent=2))
    except common.CannotError as error:
        return common.fail(error)
    return 0
