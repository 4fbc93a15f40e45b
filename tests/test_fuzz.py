"""A few random calls of every public op and module, always the same ones; `make fuzz` runs as many as you like."""

import pytest

pytest.importorskip("hypothesis")

from tests.fuzz import everything  # noqa: F401
from tests.fuzz.engine import PROPERTIES, run

EXAMPLES = 30
KERNEL_EXAMPLES = 5  # in the interpreter


@pytest.mark.parametrize("name", PROPERTIES)
def test_random_calls_agree_with_stock(name):
    slow_oracle = name == "layer_norm_lstm"
    kernels = slow_oracle or name.endswith("kernels") or name in ("sequential", "conv2d_modules")
    ends = run(name, KERNEL_EXAMPLES if kernels else EXAMPLES, seed=0)
    assert ends.get("same"), f"no case of {name} computed anything: {ends}"
