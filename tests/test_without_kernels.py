"""Which failures count as "there are no kernels here": a refusal by name, not an error with one in its past."""

import pytest

from fastops._env import KernelUnavailable
from tests.conftest import needs_a_kernel

REFUSED = KernelUnavailable("impl='triton' is not available for conv2d_relu: triton is not installed")
UNNAMED = KernelUnavailable("conv2d_relu: triton is not installed")


def caught(error, cause=None, context=None):
    """The error as pytest sees it, raised from a cause or while another was handled."""
    try:
        if context is None:
            raise error from cause
        try:
            raise context
        except Exception:
            raise error  # noqa: B904  the context is what is meant
    except Exception as seen:
        return seen


@pytest.mark.parametrize(
    ("error", "skipped"),
    [
        (lambda: caught(REFUSED), True),
        (lambda: caught(UNNAMED), False),
        (lambda: caught(KernelUnavailable("strict: a layer stays stock: triton is not installed")), True),
        (lambda: caught(KernelUnavailable("impl='auto': triton is not installed")), False),
        (lambda: caught(RuntimeError("while compiling"), cause=caught(REFUSED)), True),
        (lambda: caught(RuntimeError("while compiling"), context=caught(REFUSED)), True),
        (lambda: caught(RuntimeError("while compiling"), cause=caught(UNNAMED)), False),
        (lambda: caught(AssertionError("assert 1 == 2"), context=caught(REFUSED)), False),
        (lambda: caught(AssertionError("Regex pattern did not match."), context=caught(REFUSED)), True),
        (lambda: caught(AssertionError("Regex pattern did not match."), context=caught(UNNAMED)), False),
        (lambda: caught(ValueError("num_warps"), cause=caught(REFUSED)), False),
        (lambda: caught(AssertionError("triton is not installed, it said")), False),
        (lambda: caught(ImportError("No module named 'triton'")), True),
    ],
)
def test_a_failure_is_a_skip_only_by_its_own_refusal(error, skipped):
    assert (needs_a_kernel(error()) is not None) is skipped


def test_an_import_of_triton_from_elsewhere_is_a_failure():
    source = {"__name__": "fastops.nn.conv"}
    with pytest.raises(ImportError) as seen:
        exec(compile("import triton_of_nobody", "conv.py", "exec"), source)
    assert needs_a_kernel(ImportError("No module named 'triton'").with_traceback(seen.value.__traceback__)) is None
