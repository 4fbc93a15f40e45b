"""Numbers of dense attention against float64 by the derived rule; the kernels run interpreted, or on the GPU."""

import math

import pytest
import torch

import fastops
from tests.rule import assert_within_rule

LENGTHS = [(1, 1), (1, 128), (63, 65), (113, 203), (239, 1), (256, 130)]
HEAD_DIMS = [16, 24, 32, 40, 59, 64, 72, 96, 128, 160, 256]


def hidden_and_bias(q, Sk, *, attn_mask, is_causal, key_lengths, query_lengths, window, alibi_slopes):
    """What is hidden, and what is added to the scores: index arithmetic written apart from the library's."""
    B, H, Sq, _ = q.shape
    i = torch.arange(Sq, device=q.device).view(1, 1, Sq, 1)
    j = torch.arange(Sk, device=q.device).view(1, 1, 1, Sk)
    hidden = torch.zeros(B, H, Sq, Sk, dtype=torch.bool, device=q.device)
    bias = torch.zeros(1, dtype=q.dtype, device=q.device)
    if is_causal:
        hidden = hidden | (j > i)
    if window is not None:
        hidden = hidden | (j < i - window[0]) if window[0] not in (None, -1) else hidden
        hidden = hidden | (j > i + window[1]) if window[1] not in (None, -1) else hidden
    if key_lengths is not None:
        hidden = hidden | (j >= key_lengths.to(q.device).view(B, 1, 1, 1))
    if query_lengths is not None:
        hidden = hidden | (i >= query_lengths.to(q.device).view(B, 1, 1, 1))
    if alibi_slopes is not None:
        bias = bias - alibi_slopes.to(q).view(-1, H, 1, 1) * (i - j).abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            hidden = hidden | ~attn_mask.to(q.device)
        else:
            bias = bias + attn_mask
    return hidden, bias


def attention(q, k, v, g, grad_lse=None, *, softcap=0.0, scale=None, keep=None, dropout_p=0.0, **options):
    """Output, LSE, dQ, dK, dV and dS in the dtype of q, every step rounded to it: the textbook's formulas."""
    options.pop("enable_gqa", None)
    B, H, _, D = q.shape
    scale = D**-0.5 if scale is None else scale
    keep = 1.0 if keep is None else keep.to(q) / (1 - dropout_p)
    hidden, bias = hidden_and_bias(q, k.shape[2], **options)
    heads = [x.repeat_interleave(H // x.shape[1], 1) for x in (k, v)]
    scores, bend = (q * scale) @ heads[0].mT, 1.0
    if softcap:
        t = torch.tanh(scores / softcap)
        scores, bend = softcap * t, 1 - t * t
    scores = (scores + bias).masked_fill(hidden, -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(dead, 0.0), -1, keepdim=True)
    p = torch.exp(scores - lse).masked_fill(dead, 0.0)
    out = (p * keep) @ heads[1]
    delta = (out * g).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    ds = p * ((g @ heads[1].mT) * keep - delta)
    dq = (ds * bend) @ heads[0] * scale
    dk, dv = (ds * bend).mT @ q * scale, (p * keep).mT @ g
    dk, dv = (x.view(B, k.shape[1], -1, *x.shape[2:]).sum(2) for x in (dk, dv))
    return [out, lse.masked_fill(dead, -math.inf).squeeze(-1), dq, dk, dv, ds]


def tensors(Sq, Sk, D, dtype, device, B=2, H=2, Hk=None):
    """Query, key, value, gradient as the (B, H, S, D) views that a transformer makes of (B, S, H, D)."""
    shapes = ((H, Sq), (Hk or H, Sk), (Hk or H, Sk), (H, Sq))
    return [torch.randn(B, S, h, D, device=device).to(dtype).transpose(1, 2) for h, S in shapes]


def check(q, k, v, g, *, keep=None, grad_lse=None, mask_grad=False, **options):
    """Output, LSE and all gradients of the kernels against float64."""
    given = {"attn_mask": None, "is_causal": False, "key_lengths": None, "query_lengths": None, "window": None}
    options = {**given, "alibi_slopes": None, **options}
    mask = options["attn_mask"]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if mask_grad:
        options["attn_mask"] = mask.detach().requires_grad_()
        leaves.append(options["attn_mask"])
    out, lse = fastops.scaled_dot_product_attention(*leaves[:3], return_lse=True, impl="triton", **options)
    loss = (out * g).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * grad_lse).sum()
    ours = [out, lse, *torch.autograd.grad(loss, leaves)]
    results = []
    for dtype in (q.dtype, torch.float64):
        side = {**options, "attn_mask": mask.detach()} if mask is not None else dict(options)
        if mask is not None and mask.dtype != torch.bool:
            side["attn_mask"] = side["attn_mask"].to(dtype)
        lse_side = None if grad_lse is None else grad_lse.to(dtype)
        found = attention(*(x.detach().to(dtype) for x in (q, k, v, g)), lse_side, keep=keep, **side)
        if mask_grad:
            found[5] = found[5].sum_to_size(mask.shape)
        results.append(found)
    for name, a, stock, truth in zip(("out", "lse", "dq", "dk", "dv", "dmask"), ours, *results, strict=False):
        if name in ("dq", "dk") and not truth.abs().max() > 1e-12:
            # a softmax over one key has no gradient: what is left is the rounding of two equal sums over D
            rounding = 4 * q.shape[-1] * torch.finfo(torch.float32).eps * (g.abs().max() * v.abs().max())
            assert a.abs().max() <= rounding * max(q.abs().max(), k.abs().max()), name
        else:
            assert_within_rule(a, stock.to(a.dtype), truth, name)
    return ours


def random_lengths(B, Sk, device, zero=True):
    lengths = torch.randint(1, Sk + 1, (B,), device=device)
    if zero:
        lengths[-1] = 0
    return lengths


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("Sq", "Sk"), LENGTHS)
def test_lengths_of_sequences(Sq, Sk, causal, device):
    check(*tensors(Sq, Sk, 32, torch.float16, device, B=1, H=1), is_causal=causal)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, device):
    check(*tensors(70, 140, D, torch.float16, device, B=1, H=1), is_causal=D % 3 == 0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (33, 70), (50, 20)])
def test_single_precision(Sq, Sk, causal, device):
    check(*tensors(Sq, Sk, 32, torch.float32, device, B=1, H=1), is_causal=causal)


@pytest.mark.parametrize("D", [1, 2, 7])
def test_tiny_head_dims(D, device):
    check(*tensors(5, 9, D, torch.float32, device))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("Hk", [4, 2, 1])
def test_grouped_heads(Hk, causal, device):
    check(*tensors(40, 70, 16, torch.float16, device, B=1, H=4, Hk=Hk), enable_gqa=True, is_causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_key_lengths(causal, dtype, device):
    check(
        *tensors(50, 150, 24, dtype, device, B=3, H=1),
        is_causal=causal,
        key_lengths=torch.tensor([150, 0, 67], device=device),
    )


def test_query_and_key_lengths(device):
    lengths = {"key_lengths": torch.tensor([90, 33, 70]), "query_lengths": torch.tensor([90, 33, 0])}
    lengths = {name: x.to(device) for name, x in lengths.items()}
    out, lse, dq, *_ = check(*tensors(90, 90, 16, torch.float16, device, B=3, H=1), **lengths)
    assert (out[1, :, 33:] == 0).all()
    assert (lse[2] == -math.inf).all()
    assert (dq[1, :, 33:] == 0).all()


@pytest.mark.parametrize("window", [(20, 0), (0, 0), (30, 40), (None, 10), (5, None), (500, 500)], ids=str)
def test_windows(window, device):
    check(*tensors(150, 210, 16, torch.float16, device, B=1, H=1), window=window)


def test_causal_window_with_lengths(device):
    lengths = random_lengths(2, 300, device)
    check(*tensors(300, 300, 16, torch.float16, device, H=1), window=(64, None), is_causal=True, key_lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_softcap(dtype, device):
    check(*tensors(30, 40, 16, dtype, device, B=1, H=1), softcap=2.0, is_causal=True)
    check(*tensors(30, 40, 16, dtype, device, B=1, H=1), softcap=50.0)


@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi(per_batch, device):
    slopes = torch.rand((2, 2) if per_batch else (2,), device=device)
    check(*tensors(40, 150, 16, torch.float16, device), alibi_slopes=slopes, is_causal=per_batch)


MASKS = [(20, 40), (2, 20, 40), (1, 1, 40), (2, 1, 1, 40), (2, 2, 20, 1), (1, 2, 1, 1), (2, 2, 20, 40)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_bool_masks(shape, device):
    mask = torch.rand(shape, device=device) > 0.4
    check(*tensors(20, 40, 16, torch.float16, device), attn_mask=mask)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_float_masks_and_their_gradient(shape, device):
    dtype = torch.float32 if len(shape) == 2 else torch.float16
    mask = torch.randn(shape, device=device).to(dtype)
    check(*tensors(20, 40, 16, dtype, device), attn_mask=mask, mask_grad=True, is_causal=len(shape) == 3)


def test_half_precision_bias_gradient_with_everything(device):
    mask = torch.randn(1, 2, 100, 70, device=device).half()
    mask[..., 3, :] = -math.inf
    check(
        *tensors(100, 70, 16, torch.float16, device),
        attn_mask=mask,
        mask_grad=True,
        key_lengths=torch.tensor([70, 12], device=device),
        softcap=5.0,
        alibi_slopes=torch.rand(2, device=device),
    )


def test_gradient_of_the_lse(device):
    q, k, v, g = tensors(30, 30, 16, torch.float32, device, H=1)
    check(
        q,
        k,
        v,
        g,
        grad_lse=torch.randn(2, 1, 30, device=device),
        is_causal=True,
        key_lengths=torch.tensor([9, 0], device=device),
    )


def test_very_negative_lse(device):
    """Rows whose LSE is below what exp can show, S % 128 == 64: a stock cuDNN kernel gives NaN gradients here."""
    q, k, v, g = tensors(64, 64, 16, torch.float16, device, B=1)
    mask = torch.full((64, 64), -200.0, device=device).half()
    check(q, k, v, g, attn_mask=mask, mask_grad=True)


def test_fully_masked_rows_give_zero(device):
    q, k, v, g = tensors(20, 40, 16, torch.float16, device)
    mask = torch.rand(20, 40, device=device) > 0.5
    mask[3] = False
    for given in (mask, torch.zeros(20, 40, device=device).half().masked_fill(~mask, -math.inf)):
        out, lse, dq, *_ = check(q, k, v, g, attn_mask=given)
        assert (out[:, :, 3] == 0).all()
        assert (lse[:, :, 3] == -math.inf).all()
        assert (dq[:, :, 3] == 0).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_lies_past_a_length_does_not_leak(bad, impl, device):
    lengths = torch.tensor([70, 5, 0], device=device)
    clean = tensors(80, 150, 16, torch.float16, device, B=3, H=1)
    dirty = [x.clone() for x in clean]
    for b, n in enumerate(lengths.tolist()):
        dirty[1][b, :, n:] = bad
        dirty[2][b, :, n:] = bad
    results = []
    for q, k, v, g in (clean, dirty):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fastops.scaled_dot_product_attention(*leaves, key_lengths=lengths, impl=impl)
        results.append([out, *torch.autograd.grad((out * g).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


def test_strided_views_of_a_fused_projection_are_read_in_place(device):
    fused = torch.randn(2, 33, 3, 2, 16, device=device).half()
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    check(q, k, v, torch.randn(2, 2, 33, 16, device=device).half())
    odd = torch.randn(2, 33, 3 * 2 * 16 + 1, device=device).half()[..., 1:].unflatten(-1, (3, 2, 16))
    q, k, v = (odd[:, :, i].transpose(1, 2) for i in range(3))  # no descriptor can describe these
    check(q, k, v, torch.randn(2, 2, 33, 16, device=device).half(), is_causal=True)


def test_offsets_beyond_32_bits(device, monkeypatch):
    """A small tensor whose rows lie 2^26 elements apart: the last row is beyond 2^31."""
    rows, stride = 40, 2**26
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # touch few pages of it
    try:
        backing = torch.empty(rows * stride, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("no room for 5 GB of address space")
    far = backing.as_strided((1, 1, rows, 16), (0, 0, stride, 1))
    values = torch.randn(1, 1, rows, 16, device=device).half()
    far.copy_(values)
    out = fastops.scaled_dot_product_attention(far, far, far, impl="triton")
    near = fastops.scaled_dot_product_attention(values, values, values, impl="triton")
    assert torch.equal(out, near)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("Sq", "Sk"), [(113, 203), (256, 512), (512, 256), (1023, 1024)])
def test_long_sweep(Sq, Sk, causal, dtype, D, device):
    check(*tensors(Sq, Sk, D, dtype, device, B=1, H=1), is_causal=causal)
    check(*tensors(Sq, Sk, D, dtype, device, H=1), is_causal=causal, key_lengths=random_lengths(2, Sk, device))
