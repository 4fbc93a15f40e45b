"""Compiling for GPUs that are not here: what the reports say of kernels whose machine code is known."""

import json

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastops.inspection import InspectionError, KernelReport, compile_case, compile_cases
from fastops.kernels._static import StaticCase


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rm[:, None] * K + (k + rk)[None, :])
        b = tl.load(b_ptr + (k + rk)[:, None] * N + rn[None, :])
        acc = tl.dot(a, b, acc, input_precision=PREC)
    tl.store(c_ptr + rm[:, None] * N + rn[None, :], acc.to(c_ptr.dtype.element_ty))


def product(BM=128, BN=128, BK=64, PREC="ieee", dtype="fp16", num_warps=8, **fields):
    pointers = ("a_ptr", "b_ptr", "c_ptr")
    return StaticCase(
        name=f"test.product[{BM}x{BN}x{BK},{dtype}]",
        kernel=product_kernel,
        signature=dict.fromkeys(pointers, f"*{dtype}") | {"N": "i32", "K": "i32"},
        constexprs={"BM": BM, "BN": BN, "BK": BK, "PREC": PREC},
        num_warps=num_warps,
        divisible_by_16=(*pointers, "N", "K"),
        **fields,
    )


@pytest.mark.parametrize(("target", "kind"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCMMA")])
def test_tensor_core_kind_and_main_loop(target, kind):
    report = compile_case(product(), target)
    assert report.error is None
    assert report.tensor_core == kind
    assert not report.spills
    assert report.stack_bytes == 0
    assert report.num_warps == 8
    assert report.shared_bytes >= 64 * 1024
    assert report.main_loop is not None
    assert report.main_loop.tensor_operations == {80: 64, 90: 4, 100: 4}[target]
    assert report.async_copies["LDGSTS"] > 0
    assert f"sm_{target}" in report.ptx
    assert "Function : product_kernel" in report.sass


def test_a_second_process_would_read_the_cache():
    first = compile_case(product(), 90)
    assert compile_case(product(), 90) == first
    assert KernelReport.from_json(first.to_json()) == first


def test_a_case_that_does_not_compile_says_why():
    report = compile_case(product(BK=48), 90)  # tl.arange needs a power of two
    assert report.error is not None
    assert "power of 2" in report.error
    with pytest.raises(ValueError, match="does not compile"):
        _ = report.sass


def test_names_of_arguments_are_checked():
    case = product()
    with pytest.raises(InspectionError, match="no argument FOO"):
        compile_case(StaticCase("t", case.kernel, case.signature, {**case.constexprs, "FOO": 1}))
    with pytest.raises(InspectionError, match=r"neither signature nor constexprs name PREC"):
        compile_case(StaticCase("t", case.kernel, case.signature, {"BM": 16, "BN": 16, "BK": 16}))


def test_reports_come_in_order_with_their_own_names():
    cases = [product(), product(dtype="bf16")]
    reports = compile_cases(cases, [90, 80], jobs=2)
    assert [(r.name, r.target) for r in reports] == [(c.name, t) for c in cases for t in (90, 80)]


def entries(folder):
    return sorted(path for path in (folder / "inspect").iterdir() if path.suffix == ".json")


def test_a_corrupt_cache_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPS_CACHE", str(tmp_path))
    case = product(BM=64, BN=64, BK=32, num_warps=4)
    first = compile_case(case, 80)
    (entry,) = entries(tmp_path)
    for text in ("{", "[]"):
        entry.write_text(text)
        assert compile_case(case, 80) == first
    for text in tmp_path.glob("inspect/*.sass.gz"):
        text.unlink()
    assert "Function : product_kernel" in compile_case(case, 80).sass


@pytest.mark.parametrize("damage", [lambda whole: whole[:-20], lambda _: b"", lambda whole: b"x" * len(whole)])
def test_a_damaged_text_is_named_and_then_compiled_anew(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPS_CACHE", str(tmp_path))
    case = product(BM=64, BN=64, BK=32, num_warps=4)
    first = compile_case(case, 80)
    (text,) = tmp_path.glob("inspect/*.ptx.gz")
    text.write_bytes(damage(text.read_bytes()))
    with pytest.raises(ValueError, match=rf"PTX of test.product.* is damaged .*{text.name}.*inspect it again"):
        _ = compile_case(case, 80).ptx
    again = compile_case(case, 80)
    assert again == first
    assert "mma.sync" in again.ptx


def test_where_no_cache_can_be_written_reports_live_as_long_as_the_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTOPS_CACHE", str(tmp_path / "file"))
    report = compile_case(product(BM=64, BN=64, BK=32, num_warps=4), 80)
    assert report.error is None
    assert "mma.sync" in report.ptx


def test_the_cache_key_follows_sources_helpers_and_globals(tmp_path):
    from fastops.inspection import _source
    from fastops.inspection.catalog import _import_file

    text = """
import triton, triton.language as tl
LIMIT = tl.constexpr(4)
@triton.jit
def helper(x):
    return x + 1
@triton.jit
def kernel(x_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(x_ptr + i, helper(tl.load(x_ptr + i)) * LIMIT)
"""
    text = text.replace("LIMIT = ", "FLAG = tl.constexpr(True)\nLIMIT = ").replace("* LIMIT", "* LIMIT + FLAG")
    variants = [text, text.replace("x + 1", "x + 2"), text.replace("constexpr(4)", "constexpr(5)")]
    variants += [text.replace("constexpr(True)", "constexpr(False)")]
    variants += [text.replace("tl.arange(0, B)", "tl.arange(0, B) + 1"), "\n\n# a comment\n" + text]
    digests = []
    for index, variant in enumerate(variants):
        (tmp_path / f"m{index}").mkdir()
        path = tmp_path / f"m{index}" / "module_of_kernels.py"
        path.write_text(variant)
        digests.append(_source.digest(_import_file(path).kernel, {}))
    assert len(set(digests)) == 5
    assert digests[0] == digests[5]  # comments elsewhere do not count


INTERPRETING = tl.constexpr(type(product_kernel).__name__ != "JITFunction")


@triton.jit
def asking_kernel(x_ptr):
    if INTERPRETING:
        tl.store(x_ptr, 1)
    else:
        tl.store(x_ptr, 2)


def test_a_flag_that_asks_whether_it_is_interpreted_does_not_spoil_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPS_CACHE", str(tmp_path))
    report = compile_case(StaticCase("t", asking_kernel, {"x_ptr": "*fp32"}, {}, num_warps=1), 80)
    assert report.error is None
    assert len(entries(tmp_path)) == 1
    assert "1073741824" in report.ptx or "0x40000000" in report.ptx  # 2.0, the compiled branch


def test_a_compiler_that_dies_takes_nothing_with_it(tmp_path):
    path = tmp_path / "deadly.py"
    path.write_text(
        "import os, sys, triton, triton.language as tl\n"
        "if getattr(sys.modules['__main__'].__spec__, 'name', '') == 'fastops.inspection._worker':\n"
        "    os.kill(os.getpid(), 11)\n"
        "@triton.jit\n"
        "def deadly_kernel(x_ptr):\n"
        "    tl.store(x_ptr, 0)\n"
    )
    from fastops.inspection.catalog import user_cases

    (deadly,) = user_cases(f"{path}:deadly_kernel", "*fp16", {})
    healthy = product()
    died, lived = compile_cases([deadly, healthy], [90], jobs=1)
    assert "signal 11" in died.error
    assert lived.error is None


def test_kernels_that_cannot_be_addressed_are_named():
    @triton.jit
    def local_kernel(x_ptr):
        tl.store(x_ptr, 0)

    with pytest.raises(InspectionError, match="defined inside a function"):
        compile_case(StaticCase("t", local_kernel, {"x_ptr": "*fp16"}, {}))
    case = product()
    with pytest.raises(InspectionError, match="expected a number, string"):
        compile_case(StaticCase("t", case.kernel, case.signature, {**case.constexprs, "PREC": object()}))


def test_nothing_to_do():
    assert compile_cases([], [90]) == []
    assert compile_cases([product()], []) == []


def test_constants_travel_to_another_process_and_back(tmp_path):
    import triton.language as tl

    from fastops.inspection import _source

    for value in (None, True, 3, 0.5, "ieee", (1, (2, "a")), tl.float16, product_kernel):
        assert _source.decode(json.loads(json.dumps(_source.encode("X", value)))) == value
    assert _source.encode("X", tl.constexpr(3)) == 3
    with pytest.raises(TypeError, match="constexpr X="):
        _source.encode("X", object())
    # a file that no module path reaches, and one that fails
    (tmp_path / "mine.py").write_text("VALUE = 5\n")
    (tmp_path / "fails.py").write_text("VALUE = 1 / 0\n")
    assert _source.find({"module": "__main__", "file": str(tmp_path / "mine.py"), "name": "VALUE"}) == 5
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            _source.find({"module": "__main__", "file": str(tmp_path / "fails.py"), "name": "VALUE"})
