"""`python -m bench ceilings`."""

from __future__ import annotations

import argparse
import json

import torch

from bench import ceilings
from bench.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--again", action="store_true", help="measure again, also where a cached result exists")


def run(arguments: argparse.Namespace) -> int:
    """Print the ceilings as JSON."""
    if not torch.cuda.is_available():
        return common.fail(common.CannotError("ceilings are measured on a GPU, and PyTorch sees none here"))
    device = common.device(None)
    if arguments.again:
        found = ceilings.measure(device)
        ceilings.store(ceilings.cache_path(device), found)
    else:
        found = ceilings.load(device)
    print(json.dumps(found, indent=2))
    return 0
