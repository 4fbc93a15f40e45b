"""Attention at the borders: torch's semantics and errors, compile, export, opcheck, autocast, engines, empty inputs."""

import copy
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastops
from fastops.ops import attention as op
from fastops.ops import attention_reference
from fastops.ops.attention_ops import backward_op, forward_op

sdpa = fastops.scaled_dot_product_attention


def trio(*leading, Sq=5, Sk=7, D=16, dtype=torch.float32, grad=False):
    shapes = ((*leading, Sq, D), (*leading, Sk, D), (*leading, Sk, D))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


LEADING = [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 2)]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_any_leading_dimensions(leading, impl):
    q, k, v = trio(*leading)
    for mask in (None, torch.rand(5, 7) > 0.3, torch.rand(*leading, 5, 7)):
        out, lse = sdpa(q, k, v, mask, impl=impl, return_lse=True)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-4, atol=1e-5)
        assert lse.shape == out.shape[:-1]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_broadcast_batches_and_heads(impl):
    q, k, v = trio(2, 4)
    for a, b, c in ((q, k[:1], v[:1]), (q, k[:, :1], v[:, :1]), (q[:1], k, v), (q, k[0], v[0]), (q[:, :1], k, v)):
        want = F.scaled_dot_product_attention(a, b, c)
        torch.testing.assert_close(sdpa(a, b, c, impl=impl), want, rtol=1e-4, atol=1e-5)
    for a, b, c in ((q, k[:, :2], v[:, :2]), (q, k[:, :2], v[:, :1]), (q[0], k[0, :2], v[0, :2])):
        want = F.scaled_dot_product_attention(a, b, c, enable_gqa=True)
        torch.testing.assert_close(sdpa(a, b, c, enable_gqa=True, impl=impl), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("sizes", [((), (3,), (3,)), ((), (3,), ()), ((), (), (3,)), ((), (2, 1), (3,))])
def test_what_has_no_heads_broadcasts_over_those_of_others(sizes, impl):
    q, k, v = (torch.randn(*size, length, 16) for size, length in zip(sizes, (5, 7, 7), strict=True))
    out, lse = sdpa(q, k, v, return_lse=True, impl=impl)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    want = (q @ k.mT / 4).logsumexp(-1).expand(out.shape[:-1])
    torch.testing.assert_close(lse, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("value", [-1e9, 1e5])
def test_a_single_precision_mask_is_not_rounded_to_half(value, impl):
    q, k, v = trio(2, 3, dtype=torch.float16)
    mask = torch.full((5, 7), value)
    want = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(sdpa(q, k, v, mask, impl=impl), want, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_keys_and_values_of_different_head_counts(impl):
    q, k, v = trio(1, 6, grad=True)
    k, v = k.detach()[:, :2].requires_grad_(), v.detach()[:, :3].requires_grad_()
    results = []
    for f, options in ((sdpa, {"impl": impl}), (F.scaled_dot_product_attention, {})):
        out = f(q, k, v, enable_gqa=True, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_masks_of_fewer_dimensions_than_the_batch(impl):
    q, k, v = trio(2, 3, 2)
    for mask in (torch.rand(3, 1, 5, 7) > 0.3, torch.rand(2, 1, 1, 5, 7) > 0.3, torch.randn(3, 2, 1, 7)):
        want = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(sdpa(q, k, v, mask, impl=impl), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_numbers_in_the_forms_torch_takes(impl):
    q, k, v = trio(2, 2)
    for scale in (True, torch.tensor(0.5)):
        want = F.scaled_dot_product_attention(q, k, v, scale=scale)
        torch.testing.assert_close(sdpa(q, k, v, scale=scale, impl=impl), want, rtol=1e-4, atol=1e-5)
    assert (sdpa(q, k, v, dropout_p=True, impl=impl) == 0).all()
    bias = torch.randn(7, requires_grad=True)  # torch refuses one dimension where nothing is to be differentiated
    want = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(sdpa(q, k, v, bias, impl=impl), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_lengths_out_of_range_are_cut(impl):
    q, k, v = trio(4, 1, Sq=7, grad=True)
    wild, tame = torch.tensor([2**40, -(2**40), 2**31, -3]), torch.tensor([7, 0, 7, 0])
    results = []
    for n in (wild, tame):
        out = sdpa(q, k, v, key_lengths=n, query_lengths=n, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_lengths_where_tensors_broadcast_or_have_no_heads(impl):
    q, k, v = trio(3, 2)
    n = torch.tensor([7, 0, 2])
    torch.testing.assert_close(
        sdpa(q[:1], k, v[:, :1], key_lengths=n, impl=impl),
        sdpa(q[:1].expand_as(q), k, v[:, :1].expand_as(v), key_lengths=n, impl="torch"),
        rtol=1e-4,
        atol=1e-5,
    )
    out, lse = sdpa(*(x[0, 0] for x in (q, k, v)), key_lengths=torch.tensor(4), return_lse=True, impl=impl)
    assert out.shape == (5, 16)
    assert lse.shape == (5,)
    want = F.scaled_dot_product_attention(q[0, 0], k[0, 0, :4], v[0, 0, :4])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_two_dimensional_lengths_follow_the_leading_dimensions():
    q, k, v = trio(2, 3, 2)
    lengths = torch.randint(0, 8, (2, 3))
    ours, stock = (sdpa(q, k, v, key_lengths=lengths, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (2, 0, 5, 7)], ids=str)
@pytest.mark.parametrize("gqa", [False, True], ids=["", "gqa"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_empty(sizes, gqa, impl):
    B, H, Sq, Sk = sizes
    q, k, v = trio(B, H, Sq=Sq, Sk=Sk, grad=True)
    out, lse = sdpa(q, k, v, enable_gqa=gqa, impl=impl, return_lse=True)
    assert out.shape == (B, H, Sq, 16)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


SAME_ERROR = {
    "dtype": lambda f: f(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8).half(), torch.zeros(2, 3, 4, 8)),
    "rank": lambda f: f(torch.zeros(8), torch.zeros(8), torch.zeros(8)),
    "mask dtype": lambda f: f(*trio(2, 3), torch.zeros(5, 7, dtype=torch.int32)),
    "mask double": lambda f: f(*trio(2, 3), torch.zeros(5, 7).double()),
    "mask shape": lambda f: f(*trio(2, 3), torch.zeros(5, 6)),
    "mask rank": lambda f: f(*trio(2, 3), torch.zeros(7)),
    "mask too large": lambda f: f(*trio(2, 3), torch.zeros(4, 2, 3, 5, 7)),
    "heads": lambda f: f(torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)),
    "gqa": lambda f: f(torch.zeros(2, 4, 5, 8), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8), enable_gqa=True),
    "batch": lambda f: f(torch.zeros(2, 4, 5, 8), torch.zeros(3, 4, 5, 8), torch.zeros(3, 4, 5, 8)),
    "head dim": lambda f: f(torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 4), torch.zeros(2, 4, 5, 8)),
    "p above": lambda f: f(*trio(2, 3), dropout_p=1.5),
    "p below": lambda f: f(*trio(2, 3), dropout_p=-0.5),
    "list": lambda f: f([1.0], torch.zeros(2, 8), torch.zeros(2, 8)),
    "mask list": lambda f: f(*trio(2, 3), [True]),
    "scale": lambda f: f(*trio(2, 3), scale="x"),
    "device": lambda f: f(torch.zeros(2, 8), torch.zeros(2, 8, device="meta"), torch.zeros(2, 8)),
    "integers": lambda f: f(*(x.int() for x in trio(2, 3))),
    "complex": lambda f: f(*(x.to(torch.complex64) for x in trio(2, 3))),
    "gqa without heads": lambda f: f(*trio(), enable_gqa=True),
    "scale of many": lambda f: f(*trio(2, 3), scale=torch.ones(2)),
    "nan dropout": lambda f: f(*trio(2, 3), dropout_p=math.nan),
    "number for a causal flag": lambda f: f(*trio(2, 3), is_causal=1),
    "tensor for a causal flag": lambda f: f(*trio(2, 3), is_causal=torch.tensor(True)),
    "number for a gqa flag": lambda f: f(*trio(2, 4), enable_gqa=1),
}


@pytest.mark.parametrize("name", SAME_ERROR)
def test_errors_have_the_type_of_torch(name):
    call = SAME_ERROR[name]
    with pytest.raises(Exception) as stock:  # noqa: PT011
        call(F.scaled_dot_product_attention)
    for impl in ("auto", "triton", "torch"):
        with pytest.raises(type(stock.value)) as ours:
            call(lambda *args, impl=impl, **options: sdpa(*args, impl=impl, **options))
        assert type(ours.value) is type(stock.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"key_lengths": torch.zeros(3, dtype=torch.int32)}, RuntimeError, r"key_lengths must have shape \(2,\)"),
        ({"key_lengths": torch.zeros(2)}, RuntimeError, "key_lengths must be an integer tensor"),
        ({"query_lengths": [1, 2]}, TypeError, "query_lengths"),
        ({"window": 3}, TypeError, "window"),
        ({"window": (-2, 0)}, ValueError, "window"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": math.inf}, ValueError, "softcap"),
        ({"softcap": math.nan}, ValueError, "softcap"),
        ({"alibi_slopes": torch.zeros(4)}, RuntimeError, "alibi_slopes must have shape"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
    ids=str,
)
def test_errors_of_what_torch_does_not_have(options, error, words):
    with pytest.raises(error, match=words):
        sdpa(*trio(2, 3), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: sdpa(q.double(), k.double(), v.double(), impl="triton"), "float64"),
        (lambda q, k, v: sdpa(q, k, v[..., :8], impl="triton"), "head dim of value"),
        (lambda q, k, v: sdpa(q, k, v, scale=-1.0, impl="triton"), "positive scale"),
        (lambda q, k, v: sdpa(*(x.repeat(1, 1, 1, 17) for x in (q, k, v)), impl="triton"), "head dims 1 to 256"),
        (lambda q, k, v: sdpa(q, k, v, alibi_slopes=torch.ones(3, requires_grad=True), impl="triton"), "alibi_slopes"),
    ],
)
def test_an_explicit_engine_says_why_it_cannot(change, words):
    with pytest.raises(fastops.KernelUnavailable, match=words):
        change(*trio(2, 3))


def test_cpu_lengths_do_not_pay_for_padding():
    """Keys past a length are not even touched: the stock call gets slices."""
    q, k, v = trio(3, 1, Sq=512, Sk=512, D=64)
    lengths = torch.tensor([512, 0, 192])
    with FlopCounterMode(display=False) as sliced:
        sdpa(q, k, v, key_lengths=lengths)
    with FlopCounterMode(display=False) as whole:
        F.scaled_dot_product_attention(q, k, v)
    assert sliced.get_total_flops() * 3 * 512 == whole.get_total_flops() * 704


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_cpu_slices_equal_the_mask(masked, monkeypatch):
    q, k, v = trio(4, 2, grad=True)
    mask = {None: None, "bool": torch.rand(4, 1, 5, 7) > 0.2, "float": torch.randn(5, 1)}[masked]
    lengths = {"key_lengths": torch.tensor([7, 3, 3, 0]), "query_lengths": torch.tensor([5, 2, 2, 5])}
    results = []
    for worth in (0, 10**12):
        monkeypatch.setattr(attention_reference, "WORTH_A_CALL", worth)
        out = sdpa(q, k, v, mask, alibi_slopes=torch.rand(2).fill_(0.3), **lengths, impl="torch")
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all((x[3] == 0).all() for x in results[0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["triton", pytest.param("torch", marks=pytest.mark.slow)])
def test_compile_in_one_graph(impl, dynamic):
    def loss(q, k, v, n, mask):
        a = sdpa(q, k, v, key_lengths=n, is_causal=True, impl=impl)
        return (a + sdpa(q, k, v, mask, window=(3, 1), softcap=4.0, impl=impl)).pow(2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for Sq in (5, 6) if dynamic else (5,):
        q, k, v = trio(2, 2, Sq=Sq, grad=True)
        given = (q, k, v, torch.tensor([7, 2]), torch.randn(2, 1, Sq, 7, requires_grad=True))
        wanted = (q, k, v, given[4])
        eager, traced = (torch.autograd.grad(f(*given), wanted) for f in (loss, compiled))
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_vmap(impl):
    x, n = torch.randn(2, 1, 1, 4, 16, requires_grad=True), torch.tensor([[4], [2]])

    def attend(x, n):
        return sdpa(x, x, x, key_lengths=n, is_causal=True, impl=impl)

    results = []
    for out in (torch.vmap(attend)(x, n), torch.stack([attend(a, b) for a, b in zip(x, n, strict=True)])):
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "auto", "torch"])
def test_fake_tensors_are_not_read(impl):
    with FakeTensorMode():
        q, k, v = trio(2, 2)
        for return_lse in (False, True):
            out = sdpa(q, k, v, key_lengths=torch.tensor([7, 2]), return_lse=return_lse, impl=impl)
            assert (out[0] if return_lse else out).shape == (2, 2, 5, 16)


def test_compiled_dropout_runs_in_one_graph_and_differs_by_call():
    q, k, v = trio(1, 2, Sq=16, Sk=32)
    compiled = torch.compile(lambda *x: sdpa(*x, dropout_p=0.5, impl="triton"), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(q, k, v), compiled(q, k, v))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, n):
            return sdpa(q, k, v, key_lengths=n, impl="triton")

    given = (*trio(2, 2), torch.tensor([7, 2]))
    program = torch.export.export(Model(), given)
    torch.testing.assert_close(program.module()(*given), Model()(*given))


def arguments(mask=None, p=0.0, packed=False):
    if packed:
        q, k, v = (torch.randn(n, 2, 16) for n in (5, 7, 7))
        offsets = (torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 7], dtype=torch.int32))
        return (q, k, v, None, None, None, None, *offsets, None, 3, 4, 0.25, -1, 0, 0.0, p)
    q, k, v = trio(2, 2)
    seed = torch.tensor([3]) if p else None
    return (q, k, v, mask, torch.tensor([7, 2]), None, None, None, None, seed, 5, 7, 0.25, -1, -1, 0.0, p)


OPCHECKS = {
    "mask and dropout": {"mask": torch.zeros(1, 2, 5, 7), "p": 0.3},
    "packed": {"packed": True},
    "plain": {},
    "mask": {"mask": torch.zeros(1, 2, 5, 7)},
    "dropout": {"p": 0.3},
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (i > 1))
        for i, (name, case) in enumerate(OPCHECKS.items())
    ],
)
def test_opcheck(case):
    given = arguments(**case)
    torch.library.opcheck(forward_op, given)
    out, lse = forward_op(*given)
    torch.library.opcheck(backward_op, (torch.randn_like(out), None, out, lse, "mask" in case, *given))


def test_double_backward():
    q, k, v = (x.double().float().requires_grad_() for x in trio(1, 2, Sq=3, Sk=4))
    n = torch.tensor([3])
    gradients = []
    for impl in ("triton", "torch"):
        with sdpa_kernel(SDPBackend.MATH):  # the only stock kernel with second derivatives
            out = sdpa(q, k, v, key_lengths=n, is_causal=True, impl=impl)
        (first,) = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
        gradients.append(torch.autograd.grad(first.pow(2).sum(), (q, k, v)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_autocast_casts_as_torch_does():
    q, k, v = trio(2, 2, grad=True)
    mask = torch.randn(5, 7)
    with torch.autocast("cpu", dtype=torch.float16):
        ours = sdpa(q, k, v, mask, impl="triton")
        stock = F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.dtype == stock.dtype == torch.float16
    torch.testing.assert_close(ours, stock, rtol=1e-2, atol=1e-2)
    ours.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_precision_set_as_pytorch_2_9_has_it(precision, fp32_precision):
    """After that the older allow_tf32 cannot be read any more."""
    from fastops.kernels.attention_problem import Problem

    fp32_precision(torch.backends.cuda.matmul, precision)
    q, k, v = trio(1, 2)
    torch.testing.assert_close(sdpa(q, k, v, impl="triton"), sdpa(q, k, v, impl="torch"), rtol=1e-4, atol=1e-5)
    assert Problem(q, k, v, *[None] * 7, 5, 7, 0.25, -1, -1, 0.0, 0.0).precision == precision


def test_flops_are_counted_as_torch_counts_its_own():
    q, k, v = trio(2, 2, grad=True)
    totals = []
    for impl in ("triton", "torch"):
        with FlopCounterMode(display=False) as counter:
            sdpa(q, k, v, impl=impl).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == 4 * 2 * 2 * 5 * 7 * 16 * 7 // 2
    assert totals[1] <= totals[0]


def test_nothing_is_written_to_the_inputs():
    q, k, v = trio(2, 2)
    before = copy.deepcopy((q, k, v))
    sdpa(q, k, v, key_lengths=torch.tensor([7, 0]), impl="triton")
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


def test_table_and_its_explanation():
    rows = op.explain_auto()
    assert {row["engine"] for row in rows} == {"torch", "triton"}
    assert all("estimated" in row["why"] or "measured on" in row["why"] for row in rows)
    engines = {row["example"]: row["engine"] for row in rows}
    assert engines["BERT, D=64, lengths, dropout, training"] == "triton"
    assert engines["D=128, causal"] == "torch"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_go_to_stock():
    q, k, v = (torch.nested.nested_tensor(list(x)) for x in trio(2, 3))
    assert sdpa(q, k, v).is_nested
    with pytest.raises(RuntimeError, match="nested"):
        sdpa(q, k, v, softcap=2.0)
    with pytest.raises(fastops.KernelUnavailable, match="nested"):
        sdpa(q, k, v, impl="triton")
    with pytest.raises(ValueError, match="impl must be one of"):
        sdpa(q, k, v, impl="cuda")


@pytest.mark.parametrize("how", ["trace", "make_fx"])
@pytest.mark.parametrize("size", [8, 384])
def test_a_recorded_graph_is_right_for_other_lengths(how, size):
    """What is decided from the numbers in one call's lengths would be wrong for the next call's."""

    def attend(q, lengths):
        return fastops.scaled_dot_product_attention(q, q, q, key_lengths=lengths)

    q = torch.randn(8, 4, size, 16)
    first, other = torch.full((8,), size // 4), torch.full((8,), size - 1)
    graph = torch.jit.trace(attend, (q, first)) if how == "trace" else make_fx(attend)(q, first)
    torch.testing.assert_close(graph(q, other), attend(q, other))

    layer = fastops.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(8, size, 16)
    masks = [torch.arange(size) >= lengths[:, None] for lengths in (first, other)]

    def encode(x, mask):
        return layer(x, src_key_padding_mask=mask)

    graph = torch.jit.trace(encode, (x, masks[0])) if how == "trace" else make_fx(encode)(x, masks[0])
    alive = ~masks[1]
    torch.testing.assert_close(graph(x, masks[1])[alive], encode(x, masks[1])[alive])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 1e4])
@pytest.mark.parametrize("impl", ["triton", "auto", "torch"])
def test_rows_past_a_query_length_are_zero_and_spoil_nothing(impl, softcap, again):
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    q[0, 0, 2:] = float("nan")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = fastops.scaled_dot_product_attention(*inputs, query_lengths=torch.tensor([2]), softcap=softcap, impl=impl)
    assert not out[0, 0, 2:].any()
    upstream = torch.randn_like(out)
    upstream[0, 0, 2:] = float("nan")
    found = torch.autograd.grad(out, inputs, upstream, create_graph=again)
    alone = [q[:, :, :2], k, v]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*alone), inputs, upstream[:, :, :2])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [4, 150])
@pytest.mark.parametrize("columns", [1, None], ids=["one column", "whole"])
@pytest.mark.parametrize("impl", ["triton", "auto", "torch"])
def test_a_mask_is_not_read_past_a_query_length(impl, columns, size):
    lengths = torch.tensor([2, 0])
    inputs = [torch.randn(2, 1, size, 8) for _ in range(3)]
    mask = torch.randn(2, 1, size, columns or size)
    for one, length in zip(mask, lengths, strict=True):
        one[:, length:] = float("nan")
    mask.requires_grad_()
    out = fastops.scaled_dot_product_attention(*inputs, mask, query_lengths=lengths, impl=impl)
    upstream = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, mask, upstream)
    q, k, v = (x[:1] for x in inputs)
    alone = F.scaled_dot_product_attention(q[:, :, :2], k, v, mask[:1, :, :2])
    (expected,) = torch.autograd.grad(alone, mask, upstream[:1, :, :2])
    torch.testing.assert_close(out[:1, :, :2], alone)
    assert not out[0, :, 2:].any()
    assert not out[1].any()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("worth", [0, 8_000_000], ids=["slices", "whole"])
@pytest.mark.parametrize("size", [4, 300], ids=["small", "large"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"key_lengths": True},
        {"key_lengths": True, "is_causal": True},
        {"attn_mask": torch.bool},
        {"attn_mask": torch.float32},
        {"alibi_slopes": torch.tensor([0.5, 0.1])},
        {"dtype": torch.float64},
        {"dropout_p": 1.0},
    ],
    ids=str,
)
def test_inference_ends_rows_as_training_does(options, size, worth, monkeypatch):
    """Without gradients the rows that have ended are computed like the others and then overwritten."""
    monkeypatch.setattr(attention_reference, "WORTH_A_CALL", worth)
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    q, k, v = (torch.randn(3, 2, size, 16, dtype=dtype) for _ in range(3))
    lengths = torch.tensor([size // 2, 0, size + 5])
    q[0, :, size // 2 :] = float("nan")
    before = [x.clone() for x in (q, k, v)]
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor([size, size, 3], dtype=torch.int32)
    if "attn_mask" in options:
        mask = torch.randn(3, 1, size, size)
        mask = mask > -1 if options["attn_mask"] == torch.bool else mask
        if mask.dtype != torch.bool:
            mask[0, :, size // 2 :] = float("nan")
        options["attn_mask"] = mask
    found = sdpa(q, k, v, query_lengths=lengths, **options)
    expected = sdpa(q.clone().requires_grad_(), k, v, query_lengths=lengths, **options).detach()
    torch.testing.assert_close(found, expected)
    assert not found[0, :, size // 2 :].any()
    assert not found[1].any()
    assert "dropout_p" in options or found[2].any()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("lengths", [None, torch.full((2,), 200)], ids=["dense", "lengths"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_float32_mask_beside_float64_is_read_as_such(impl, lengths):
    q, k, v = (torch.randn(2, 2, 200, 64, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(2, 1, 200, 200)
    found = sdpa(q, k, v, mask, key_lengths=lengths, impl=impl)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, mask.double()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_inference_with_query_lengths_under_vmap():
    x, n = torch.randn(2, 3, 1, 4, 16), torch.tensor([[4, 1, 0], [2, 3, 4]])
    found = torch.vmap(lambda x, n: sdpa(x, x, x, query_lengths=n))(x, n)
    torch.testing.assert_close(found, torch.stack([sdpa(a, a, a, query_lengths=b) for a, b in zip(x, n, strict=True)]))


@pytest.mark.parametrize("impl", ["triton", "auto", "torch"])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("grad", [False, True])
def test_huge_numbers_past_a_key_length_overflow_nowhere(impl, where, grad):
    q, k, v = torch.full((1, 1, 2, 4), 2.0), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    {"key": k, "value": v}[where][0, 0, 2] = torch.tensor([3e38, 0, 0, 0])
    q.requires_grad_(grad)
    out = fastops.scaled_dot_product_attention(q, k, v, key_lengths=torch.tensor([2]), impl=impl)
    expected = F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2])
    torch.testing.assert_close(out, expected)
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(10 * x.sum(), q)[0] for x in (out, expected)))


def test_large_numbers_past_a_key_length_meet_larger_ones():
    """Neither in Q K^T nor in dO V^T."""
    lengths, upstream = torch.tensor([2]), torch.full((1, 1, 4, 8), 1e21)
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    poisoned = k * 1e-21
    poisoned[:, :, 2:] = 1e18
    poisoned.requires_grad_()
    out = fastops.scaled_dot_product_attention(q * 1e21, poisoned, v, key_lengths=lengths)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q * 1e21, poisoned[:, :, :2], v[:, :, :2]))
    poisoned = v.clone()
    poisoned[:, :, 2:] = 1e18
    q.requires_grad_()
    out = fastops.scaled_dot_product_attention(q, k, poisoned, key_lengths=lengths)
    expected = F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2])
    torch.testing.assert_close(*(torch.autograd.grad(x, q, upstream)[0] for x in (out, expected)))


@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_tangents_past_a_key_length_are_not_felt(which):
    inputs = [torch.randn(2, 2, 8, 16) for _ in range(3)]
    lengths = torch.tensor([5, 3])
    tangent = torch.randn_like(inputs[which])
    poisoned = tangent.clone()
    for row, length in zip(poisoned, lengths, strict=True):
        row[:, length:] = float("nan")

    def attend(x):
        given = [*inputs[:which], x, *inputs[which + 1 :]]
        return fastops.scaled_dot_product_attention(*given, key_lengths=lengths)

    with sdpa_kernel(SDPBackend.MATH):
        found, expected = (torch.func.jvp(attend, (inputs[which],), (t,))[1] for t in (poisoned, tangent))
    torch.testing.assert_close(found, expected)


def test_lengths_under_another_default_device():
    q = torch.randn(2, 2, 4, 8)
    expected = fastops.scaled_dot_product_attention(q, q, q, key_lengths=torch.tensor([4, 2]))
    with torch.device("meta"):
        found = fastops.scaled_dot_product_attention(q, q, q, key_lengths=torch.tensor([4, 2], device="cpu"))
    assert torch.equal(found, expected)
