"""`make matrix` and `make mutation`: what they do without running a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).parent.parent / ".ci" / "matrix.py"
MUTATION = MATRIX.with_name("mutation.py")


@pytest.mark.parametrize(
    ("argument", "code", "message"), [("--help", 0, "cells:\n  default "), ("x", 2, "arguments: x")]
)
def test_asked_for_help_it_runs_nothing(argument, code, message):
    environment = {**os.environ, "CELLS": "none"}  # had it begun, it would say that there is no such cell
    done = subprocess.run([sys.executable, MATRIX, argument], capture_output=True, text=True, env=environment)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "no cell" not in done.stderr


@pytest.mark.parametrize(
    ("argument", "code", "message"),
    [("-h", 0, "file:function"), ("--help", 0, "files:\n  fastops/"), ("-x", 2, "arguments: -x")],
)
def test_mutation_asked_for_help_mutates_nothing(argument, code, message):
    done = subprocess.run([sys.executable, MUTATION, argument], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "named like" not in done.stderr
