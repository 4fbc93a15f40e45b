"""`fastops inspect` as a stranger would use it."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch

from fastops.__main__ import main
from fastops.inspection import InspectionError, catalog, compile_case, inspect, render
from fastops.inspection.gpus import find_target
from fastops.inspection.shapes import launches, parse_shape
from tests.test_inspection import product, product_kernel

KERNEL = """
import triton, triton.language as tl

@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, SCALE: tl.constexpr = 1.0):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, x * SCALE, mask=i < n)

@triton.autotune(configs=[triton.Config({"BLOCK": 128}, num_warps=2), triton.Config({"BLOCK": 512})], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)

@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), undefined_name)

def plain(x):
    return x
"""


@pytest.fixture
def kernels(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(KERNEL)
    return path


def fastops(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_kernel_of_the_user_as_table_json_and_markdown(kernels, tmp_path, capsys):
    one = f"{kernels}:add_kernel"
    arguments = (one, "--signature", "*fp16,*fp16,i32:16", "--constexpr", "BLOCK=1024", "-t", "RTX 3090,H100")
    launch = ("--grid", 1024, "--flops", 1e6, "--bytes", 4e6, "--json", tmp_path / "r.json", "--markdown", "-")
    code, out, _ = fastops(capsys, *arguments, *launch)
    assert code == 0
    assert out.splitlines()[0].startswith("| kernel | target | regs ")
    assert "RTX 3090 (sm_86)" in out
    stored = json.loads((tmp_path / "r.json").read_text())["kernels"]
    assert [kernel["capability"] for kernel in stored] == ["sm_86", "sm_90"]
    assert stored[0]["occupancy"]["fraction"] == 1.0
    assert stored[1]["floor_from_spec_sheet"] == {"seconds": pytest.approx(4e6 / 3350e9), "bound": "memory"}
    assert stored[0]["waves"]["waves"] == pytest.approx(1024 / (82 * 12))


def test_the_table_and_the_code(kernels, capsys):
    arguments = (f"{kernels}:add_kernel", "--signature", "*fp16,*fp16,i32", "--constexpr", "BLOCK=256", "-t", "sm_90")
    code, out, _ = fastops(capsys, *arguments)
    assert code == 0
    assert "add_kernel[BLOCK=256]" in out
    assert "fits" in out
    code, out, _ = fastops(capsys, *arguments, "--sass")
    assert "LDG" in out
    code, out, _ = fastops(capsys, *arguments, "--ptx")
    assert ".target sm_90a" in out


def test_autotuned_kernels_show_every_configuration(kernels, capsys):
    code, out, _ = fastops(capsys, f"{kernels}:tuned_kernel", "--signature", "*fp32,i32", "-t", "80")
    assert code == 0
    assert "BLOCK=128,num_warps=2" in out
    assert "BLOCK=512,num_warps=4" in out


def bad(capsys, *arguments):
    code, _, err = fastops(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    return err


def test_bad_input_is_one_clear_message(kernels, tmp_path, capsys):
    at = str(kernels)
    assert "undefined_name is not defined" in bad(
        capsys, f"{at}:broken_kernel", "--signature", "*fp16", "--constexpr", "BLOCK=16", "-t", "sm_90"
    )
    assert "its kernels are add_kernel, tuned_kernel, broken_kernel" in bad(capsys, f"{at}:nope", "--signature", "i32")
    assert "not decorated with @triton.jit" in bad(capsys, f"{at}:plain", "--signature", "i32")
    assert "needs --signature" in bad(capsys, f"{at}:add_kernel")
    assert "has 1 types, but 4 arguments" in bad(capsys, f"{at}:add_kernel", "--signature", "*fp16")
    assert "type 'float' of x_ptr" in bad(capsys, f"{at}:tuned_kernel", "--signature", "float,i32")
    assert "expected NAME=VALUE" in bad(capsys, f"{at}:add_kernel", "--signature", "i32", "--constexpr", "BLOCK")
    assert "no compile option 'num_cta'; did you mean num_ctas" in bad(
        capsys, f"{at}:tuned_kernel", "--signature", "*fp32,i32", "--option", "num_cta=2"
    )
    assert "--option 'num_ctas': expected NAME=VALUE, e.g. num_ctas=2" in bad(
        capsys, f"{at}:tuned_kernel", "--signature", "*fp32,i32", "--option", "num_ctas"
    )
    assert "there is no file" in bad(capsys, f"{tmp_path}/none.py:k", "--signature", "i32")
    assert "no kernel matches 'nonsense'" in bad(capsys, "nonsense")
    assert "unknown target 'GTX 1080'" in bad(
        capsys, f"{at}:tuned_kernel", "--signature", "*fp16,i32", "-t", "GTX 1080"
    )
    assert "an empty KERNEL" in bad(capsys, "")
    assert "give one of them" in bad(capsys, "--check", tmp_path, "--update", tmp_path)
    assert not list(tmp_path.glob("*.json"))
    assert "there is no folder" in bad(capsys, "--json", tmp_path / "none" / "r.json")
    assert "is a folder" in bad(capsys, "--markdown", tmp_path)
    assert "one after the other" in bad(capsys, "--json", "-", "--markdown", "-")
    assert "names no target" in bad(capsys, "epilogue", "-t", ",")
    assert "describe a kernel of your own" in bad(capsys, "epilogue", "--num-warps", "8")
    assert "'FOO9000'; give a capability" in bad(capsys, "epilogue", "-t", "FOO9000")
    assert "there is no snapshot" in bad(
        capsys, f"{at}:tuned_kernel", "--signature", "*fp32,i32", "-t", "80", "--check", tmp_path
    )
    assert "no such kernel takes fp8" in bad(capsys, "epilogue", "--dtype", "fp8")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    assert "cannot be imported: SyntaxError" in bad(capsys, f"{tmp_path}/syntax.py:f", "--signature", "i32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "none"), "there is no snapshot"),
        (("--check", "damaged.json"), "damaged.json cannot be read"),
        (("--update", "damaged.json"), "damaged.json cannot be read"),
        (("--update", "damaged.json/below"), "damaged.json is not a folder"),
        (("--update", "folder.json"), "folder.json is a folder"),
        (("--update", "locked/below/x"), f"nothing can be written into {os.sep}"),
        (("--check", "fine.json", "--json", "-"), "--check prints what changed: give --json and --markdown a FILE"),
        (("--update", "fine.json", "--sass", "--ptx"), "--update prints what changed: leave out --sass and --ptx"),
        (("--list", "--check", "fine.json"), "compiles nothing: leave out --check"),
        (("--list", "--json", "r.json"), "compiles nothing: leave out --json"),
        (("--grid", "1"), "--grid: only to describe a kernel of your own"),
        (("--flops", "1", "--bytes", "2"), "--flops and --bytes: only to describe a kernel of your own"),
        (("attention", "--shape", "1,2,64,64", "--bytes", "2"), "--bytes: only to describe a kernel of your own"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_compiles(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastops.inspection.cli._compile", lambda *_: pytest.fail("it compiles"))
    (tmp_path / "fine.json").write_text('{"triton": "3", "kernels": {}}')
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda place, _: place != tmp_path / "locked")  # root may write anywhere
    assert message in bad(capsys, *arguments)


@pytest.mark.parametrize(
    "wrong", [("--jobs", "0"), ("--jobs", "two"), ("--flops", "nan"), ("--bytes", "-1"), ("--bytes", "few")]
)
def test_numbers_that_are_none(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *wrong])
    assert stop.value.code == 2
    assert f"argument {wrong[0]}: expected a " in capsys.readouterr().err


def test_without_triton_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in bad(capsys, "attention")


def test_update_then_check_then_a_regression(kernels, tmp_path, capsys):
    snapshot = tmp_path / "budget.json"
    arguments = (f"{kernels}:add_kernel", "--signature", "*fp16,*fp16,i32", "-t", "sm_90", "--constexpr")
    assert fastops(capsys, *arguments, "BLOCK=256", "--update", snapshot)[0] == 0
    files = ("--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md")
    code, out, _ = fastops(capsys, *arguments, "BLOCK=256", "--check", snapshot, *files)
    assert (code, out.splitlines()[-1][:3]) == (0, "ok:")
    assert json.loads((tmp_path / "r.json").read_text())["kernels"]
    assert "add_kernel" in (tmp_path / "r.md").read_text()
    stored = json.loads(snapshot.read_text())
    stored["kernels"]["add_kernel[BLOCK=256]"]["sm_90"]["registers"] -= 4
    snapshot.write_text(json.dumps(stored))
    code, out, _ = fastops(capsys, *arguments, "BLOCK=256", "--check", snapshot)
    assert code == 1
    assert "WORSE add_kernel[BLOCK=256] sm_90: registers " in out
    assert "FAILED" in out


def test_list_and_explain(capsys):
    code, out, _ = fastops(capsys, "--list", "epilogue")
    assert code == 0
    assert "sm_90" in out
    assert "roofline floor" in fastops(capsys, "--explain")[1]


def test_inspect_takes_functions_and_names():
    (report,) = inspect(
        product_kernel,
        ["sm_90"],
        signature={"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp16", "N": "i32:16", "K": "i32:16"},
        constexprs={"BM": 128, "BN": 128, "BK": 64, "PREC": "ieee"},
        num_warps=8,
    )
    assert report.registers == compile_case(product(), 90).registers
    (capped,) = inspect(
        product_kernel,
        [90],
        signature="*fp16,*fp16,*fp16,i32:16,i32:16",
        constexprs={"BM": 128, "BN": 128, "BK": 64, "PREC": "ieee"},
        num_warps=8,
        num_stages=2,
        options={"maxnreg": 104},
    )
    assert (capped.num_stages, capped.registers <= 104 < report.registers) == (2, True)
    named = inspect("epilogue.bias_relu[", "sm_90", dtype="bf16", jobs=1)
    assert [report.name for report in named] == [
        "epilogue.bias_relu[channels_last,bf16]", "epilogue.bias_relu[contiguous,bf16]",
    ]  # fmt: skip
    with pytest.raises(InspectionError, match="needs a signature"):
        inspect(product_kernel)
    with pytest.raises(InspectionError, match="unknown target"):
        inspect(product(), ["Voodoo 2"])
    with pytest.raises(InspectionError, match=r"@triton\.jit"):
        inspect(torch.relu, signature="*fp16")


def test_selection_by_part_and_pattern():
    cases = [product(), product(dtype="bf16"), product(BM=64)]
    assert [c.name for c in catalog.select(cases, ["64X128"])] == [cases[2].name]
    assert catalog.select(cases, ["*bf16]"]) == [cases[1]]
    assert catalog.select(cases, [cases[0].name]) == [cases[0]]
    assert catalog.select(cases, [], "bfloat16") == [cases[1]]


def test_signatures_may_hold_descriptors():
    assert catalog._split("tensordesc<fp16[1,8,16]>, *fp32:16,i32") == ["tensordesc<fp16[1,8,16]>", "*fp32:16", "i32"]
    parsed = catalog.parse_constexprs(["A=1,B=(1, 2),C=tl.float16,D=ieee", "E=None", "F=1e-3"])
    assert str(parsed.pop("C")) == "fp16"
    assert parsed == {"A": 1, "B": (1, 2), "D": "ieee", "E": None, "F": 1e-3}


@pytest.mark.parametrize(
    ("op", "text", "message"),
    [
        ("attention", "1,2,3", "has 3 sizes"),
        ("attention", "1,2,3,four", "'four' is not a size"),
        ("attention", "B=1,H=2,S=3", "lacks D"),
        ("attention", "B=1,H=2,S=3,D=4,Q=5", "has no 'Q'"),
        ("attention", "B=1,H=2,S=0,D=4", "not a size"),
        ("attention", "B=1,H=2,S=-1,D=4", "not a size"),
        ("sort", "1", "needs one op"),
    ],
)
def test_bad_shapes(op, text, message):
    with pytest.raises(InspectionError, match=message):
        parse_shape(op, text)


def test_shapes_in_letters_and_in_order():
    assert parse_shape("attention", "4x16x4096x128") == parse_shape("attention", "4, 16, 4096, 128")
    assert parse_shape("attention", "4,16,4096,128") == {"B": 4, "H": 16, "S": 4096, "D": 128}
    assert parse_shape("conv2d", "n=8 c=3 h=224 k=64 r=11 stride=4 padding=2")["PADDING"] == 2


@pytest.mark.parametrize(
    ("op", "shape", "forward"),
    [
        pytest.param("conv2d", "N=8,C=64,H=28,K=64,R=3,PADDING=1", "conv2d_relu_forward", marks=pytest.mark.slow),
        pytest.param("lstm", "16,32,256", "rnn_forward", marks=pytest.mark.slow),
        pytest.param("lstm", "16,32,40", "rnn_forward", marks=pytest.mark.slow),
        ("attention", "2,4,1024,64", "attention_forward"),
    ],
)
def test_what_an_op_launches_is_found_without_a_gpu(op, shape, forward):
    targets = [find_target("RTX 3090"), find_target("H100")]
    kernels = {"16,32,256": "forward_kernel[", "16,32,40": "small_forward_kernel["}
    for target, found in zip(targets, launches(op, parse_shape(op, shape), "fp16", targets), strict=True):
        assert len(found) >= 2  # a backward too
        launched = {launched.name: launched for launched in found}[forward]
        assert launched.flops is not None
        assert launched.bytes > 0
        assert launched.cases
        assert all(case.grid and case.grid > 0 for case in launched.cases)
        assert all(case.targets == (target.capability.number,) for case in launched.cases)
        if op == "lstm":  # all steps in one launch by the engine that is made for this size
            (case,) = launched.cases
            assert case.name.startswith(kernels[shape])
        if op == "attention":
            (case,) = launched.cases
            assert launched.flops == 4 * 2 * 4 * 1024 * 1024 * 64
            assert case.grid == 2 * 4 * 1024 // case.constexprs["BLOCK_M"]
            assert not any(kind.startswith("tensordesc") for kind in case.signature.values()) or case.targets == (90,)


@pytest.mark.parametrize(
    ("launched_on", "yes", "no"),
    [
        ((80, 86, 90, 100), (80, 86, 87, 89, 90, 100, 103, 120), ()),
        ((90,), (90,), (80, 86, 89, 100, 120)),
        ((90, 100), (90, 100, 103), (80, 86, 89, 120)),
        ((80, 86), (86, 89, 120, 121), (90, 100)),
        ((90, 100, 120), (120, 121), (86, 89)),
        ((80,), (80,), (86, 89, 90, 120)),
        ((80, 86, 89, 90, 100, 120), (89, 120), (75,)),
    ],
)
def test_a_capability_without_cases_goes_by_another(launched_on, yes, no):
    case = product(targets=launched_on)
    assert [number for number in (*yes, *no) if case.launched_on(number)] == list(yes)


def test_targets_keep_to_where_a_kernel_is_launched(monkeypatch, capsys):
    cases = [product(BK=64, targets=(80, 86)), product(BK=32, targets=(90,))]
    monkeypatch.setattr(catalog, "library_cases", lambda: cases)
    code, out, _ = fastops(capsys, "--all", "-t", "sm_80,sm_89,sm_90", "--json", "-")
    assert code == 0
    found = [(one["name"], one["target"], one["launched"]) for one in json.loads(out)["kernels"]]
    everywhere, hopper = (case.name for case in cases)
    assert found == [(everywhere, 80, True), (everywhere, 89, True), (hopper, 90, True)]
    # asked for by name, a kernel is shown where it is not launched too, and marked so
    code, out, _ = fastops(capsys, hopper, "-t", "sm_80", "--json", "-")
    assert [(one["target"], one["launched"]) for one in json.loads(out)["kernels"]] == [(80, False)]


def test_without_a_name_the_main_configurations_are_shown_and_all_on_request(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(
        "fastops.inspection.cli._compile", lambda cases, *_: shown.append([c.name for c in cases]) or []
    )
    library = catalog.library_cases()
    main(["inspect", "-t", "sm_90"])
    assert f"{len(shown[0])} main configurations of {len(library)}" in capsys.readouterr().out
    main(["inspect", "-t", "sm_90", "--all"])
    assert "main configurations" not in capsys.readouterr().out
    assert 0 < len(shown[0]) < len(library) / 3
    assert shown[1] == [case.name for case in library]


def test_the_main_configurations_hold_every_kernel_on_each_of_its_targets():
    library = catalog.library_cases()
    for pattern in catalog.MAIN:
        assert any(catalog._matches(case.name, pattern) for case in library), pattern

    def kernels(cases):
        return {(id(case.kernel), target) for case in cases for target in case.targets if target in (80, 90)}

    assert kernels(catalog.main_cases(library)) == kernels(library)


def test_an_interrupted_command_and_a_shape_of_no_op(monkeypatch, capsys):
    for words in (["attention", "conv2d"], []):
        assert main(["inspect", *words, "--shape", "1,2,64,64"]) == 2
        assert "--shape takes one op of attention" in capsys.readouterr().err

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastops.inspection.cli._run", interrupted)
    assert main(["inspect", "--list"]) == 130
    assert capsys.readouterr().err == "fastops inspect: interrupted\n"


def test_floor_of_an_op_in_words():
    op = SimpleNamespace(name="attention", flops=2e12, bytes=3e9)
    memory = SimpleNamespace(name="copy", flops=None, bytes=3.35e9)
    h100 = find_target("H100")
    assert re.match(r"attention on .*: 3,000 MB, 2,000 GFLOP; floor .*H100", render.floor_note(op, "fp16", h100))
    assert re.match(r"copy on .*: 3,350 MB; floor .*\(.*\), from .*H100", render.floor_note(memory, "fp16", h100))


def test_times_have_three_digits_and_a_unit():
    times = {
        1.5e-7: "150 ns",
        2e-5: "20 us",
        9.9996e-4: "1000 us",
        1.234e-3: "1.23 ms",
        0.9996: "1000 ms",
        61.0: "61 s",
    }
    assert {seconds: render.duration(seconds) for seconds in times} == times
