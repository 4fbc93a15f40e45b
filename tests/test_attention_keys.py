"""Masks of the keys alone, and rows that exist in memory but not in a sequence: read by descriptors, never felt."""

import math

import pytest
import torch

pytest.importorskip("triton")

import fastops
from fastops.kernels.attention_problem import Problem
from tests.test_attention import check, tensors

SIZE = 270  # two tiles of keys besides the last
VISIBLE = {
    "suffix": lambda j: j < 200,
    "left": lambda j: j >= 70,
    "holes": lambda j: (j % 3 != 0) & (j < 260),
    "none": lambda j: j < 0,
    "all": lambda j: j >= 0,
    "first": lambda j: j < 1,
}


def rows(*kinds, device="cpu"):
    return torch.stack([VISIBLE[kind](torch.arange(SIZE)) for kind in kinds]).to(device)[:, None, None]


def numbers(mask, dtype=torch.float16):
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf).to(dtype)


@pytest.mark.parametrize("kinds", [("suffix", "holes"), ("left", "all"), ("none", "first")], ids=" ".join)
@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_padding_of_any_pattern(kinds, is_float, device):
    mask = rows(*kinds, device=device)
    given = tensors(20, SIZE, 16, torch.float16, device, H=1)
    check(*given, attn_mask=numbers(mask) if is_float else mask)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"softcap": 3.0},
        {"key_lengths": torch.tensor([180, 260]), "query_lengths": torch.tensor([30, 7])},
        {"window": (100, 20)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_padding_beside_other_options(options, device):
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    given = tensors(40, SIZE, 16, torch.float16, device, H=1)
    check(*given, attn_mask=rows("suffix", "holes", device=device), **options)


def test_every_head_may_have_its_own_padding(device):
    mask = torch.cat([rows("suffix", "holes", device=device), rows("left", "suffix", device=device)], 1)
    check(*tensors(8, SIZE, 16, torch.float16, device), attn_mask=mask)
    check(*tensors(8, SIZE, 16, torch.float16, device, Hk=1), attn_mask=mask, enable_gqa=True)
    check(*tensors(8, SIZE, 16, torch.float16, device, Hk=1), attn_mask=mask[:1, :1], enable_gqa=True)


def test_a_bias_of_the_keys_is_added_not_mistaken_for_padding(device):
    bias = torch.randn(2, 1, 1, SIZE, device=device).half()
    bias[0, ..., 100:] = -math.inf
    check(*tensors(8, SIZE, 16, torch.float16, device), attn_mask=bias, mask_grad=True)


def problem(mask, q_len=8):
    query, key = torch.zeros(2, 4, q_len, 16), torch.zeros(2, 4, SIZE, 16)
    nothing = [None] * 6
    return Problem(query.half(), key.half(), key.half(), mask, *nothing, q_len, SIZE, 1.0, -1, -1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "end", "whole"),
    [("suffix", 200, 1), ("left", 270, 0), ("holes", 260, 0), ("none", 0, 1), ("all", 270, 1), ("first", 1, 1)],
)
def test_range_of_the_keys(kind, end, whole, device):
    """What decides that main loops take no mask and tiles past the range are not visited."""
    mask = rows(kind, "all", device=device)
    for given in (mask, numbers(mask)):
        found = problem(given)
        assert found.mask_kind == (3 if given.is_floating_point() else 4)
        assert found.key_range.tolist() == [2 * end + whole, 2 * SIZE + 1]
        assert found.mask.shape == (2, 4, 1, 384)
        assert (found.mask[..., SIZE:] == -math.inf).all()


def test_range_over_heads_and_batches(device):
    mask = torch.cat([rows("suffix", device=device), rows("first", device=device)], 1)
    assert problem(mask.repeat_interleave(2, 1)).key_range.tolist() == [2 * 200, 2 * 200]
    assert problem(rows("suffix", device=device)[:, :, :, :1]).key_range.tolist() == [2 * SIZE + 1] * 2
    bias = numbers(rows("all", "all", device=device))
    bias[0, ..., 5] = 0.5
    bias[1, ..., 7] = math.nan
    assert problem(bias).key_range.tolist() == [2 * SIZE] * 2


def gradients(q, k, v, g, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = fastops.scaled_dot_product_attention(*leaves, impl="triton", **options)
    return [out, *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("aligned", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nothing_of_a_dead_row_is_felt(aligned, causal, device):
    """Queries, their gradients, keys and values past the lengths are NaN."""
    lengths = torch.tensor([70, 100], device=device)
    clean = tensors(100, 100, 16, torch.float16, device, H=1)
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[0, :, 70:] = math.nan
    if not aligned:
        dirty = [torch.cat([x, x], -1)[..., 1:17].copy_(x) for x in dirty]
        assert not problem_of(*dirty).may_use_tma(*dirty)
    else:
        assert problem_of(*dirty).may_use_tma(*dirty)
    options = {"key_lengths": lengths, "query_lengths": lengths, "is_causal": causal}
    for a, b in zip(gradients(*clean, **options), gradients(*dirty, **options), strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


def problem_of(q, k, v, _):
    return Problem(q, k, v, *[None] * 7, q.shape[2], k.shape[2], 1.0, -1, -1, 0.0, 0.0)


@pytest.mark.parametrize("aligned", [True, False], ids=["descriptors", "pointers"])
def test_a_packed_sequence_does_not_feel_its_neighbours(aligned, device):
    """Sequence 1 of 3 is NaN; outputs and gradients of the others are those without it."""
    cu = torch.tensor([0, 70, 100, 230], device=device, dtype=torch.int32)
    clean = [torch.randn(230, 2, 17, device=device).half()[..., 1:] for _ in range(4)]
    if aligned:
        clean = [x.contiguous() for x in clean]
    dirty = [x.clone(memory_format=torch.preserve_format) for x in clean]
    for x in dirty:
        x[70:100] = math.nan
    results = []
    for q, k, v, g in (clean, dirty):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fastops.varlen_attention(*leaves, cu, cu, 130, 130, is_causal=True, impl="triton")
        results.append([out, *torch.autograd.grad(out, leaves, g)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:70], b[:70])
        assert torch.equal(a[100:], b[100:])
