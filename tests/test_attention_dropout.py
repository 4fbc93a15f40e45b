"""Dropout of attention weights: the exact probability, one mask in forward and backward, reproducible."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastops
from fastops.ops import attention_dropout
from tests.test_attention import check, tensors


def sdpa(*args, **options):
    return fastops.scaled_dot_product_attention(*args, impl="triton", **options)


def seed_of_next_call(device):
    """The seed that the next call will draw, without drawing it."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    seed = attention_dropout.new_seed(device)
    torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
    return seed


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_numbers_with_the_mask_written_in_torch(p, device):
    given = tensors(70, 140, 16, torch.float16, device, H=1)
    keep = attention_dropout.keep_mask(seed_of_next_call(device), 2, 70, 140, p).view(2, 1, 70, 140)
    check(*given, keep=keep, dropout_p=p, is_causal=p == 0.5)


def test_numbers_with_lengths_and_single_precision(device):
    given = tensors(33, 40, 16, torch.float32, device, H=1)
    keep = attention_dropout.keep_mask(seed_of_next_call(device), 2, 33, 40, 0.25).view(2, 1, 33, 40)
    lengths = torch.tensor([40, 11], device=device)
    check(*given, keep=keep, dropout_p=0.25, key_lengths=lengths)


@pytest.mark.parametrize("p", [0.1, 0.001, 1 / 3, 0.998])
def test_the_rate_is_exact_and_not_rounded(p):
    """1/256 steps would be off by up to 0.002; the sample resolves much less."""
    seeds = torch.randint(2**62, (8, 1))
    rate = 1 - torch.stack([attention_dropout.keep_mask(s, 8, 256, 256, p).double().mean() for s in seeds]).mean()
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / (8 * 8 * 256 * 256))
    assert abs(attention_dropout.keep_probability(p) - (1 - p)) <= 2**-32


def test_neighbours_are_independent():
    """Also those that share a Philox call: keys 8, 16 and queries 8 apart."""
    keep = attention_dropout.keep_mask(torch.tensor([99]), 16, 256, 256, 0.1).double() - 0.9
    n = keep.numel()
    shifted = [(keep[..., :-d], keep[..., d:]) for d in (1, 2, 8, 16, 24, 32, 64)]
    shifted += [(keep[:, :-d], keep[:, d:]) for d in (1, 8, 16, 64)] + [(keep[:-1], keep[1:])]
    shifted += [(keep[:, :-8, :-8], keep[:, 8:, 8:])]
    for a, b in shifted:
        correlation = (a * b).mean() / 0.09
        assert abs(correlation) < 0.005 + 5 / math.sqrt(n)


def test_heads_batches_and_calls_differ(device):
    q, k, _, _ = tensors(16, 64, 16, torch.float16, device)
    q = torch.zeros_like(q)
    v = torch.eye(64, device=device).half().expand(2, 2, 64, 64)[..., :16]
    masks = [sdpa(q, k, v, dropout_p=0.5) != 0 for _ in range(2)]
    assert not torch.equal(*masks)
    flat = masks[0].flatten(0, 1)
    assert len({tuple(m.flatten().tolist()) for m in flat}) == 4


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends(p, device):
    q, k, v, g = (x.requires_grad_() for x in tensors(20, 30, 16, torch.float16, device))
    out = sdpa(q, k, v, dropout_p=p)
    out.backward(g)
    if p == 0.0:
        assert torch.equal(out, sdpa(q, k, v))
    else:
        assert all((x == 0).all() for x in (out, q.grad, k.grad, v.grad))


def test_manual_seed_repeats_it_and_checkpoint_recomputes_it(device):
    q, k, v, _ = (x.requires_grad_() for x in tensors(20, 30, 16, torch.float16, device))

    def gradients(run):
        torch.manual_seed(5)
        out = run(lambda a, b, c: sdpa(a, b, c, dropout_p=0.4), q, k, v)
        return [out, *torch.autograd.grad(out.float().pow(2).sum(), (q, k, v))]

    plain = gradients(lambda f, *x: f(*x))
    again = gradients(lambda f, *x: checkpoint(f, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_second_derivatives_use_the_same_mask(device):
    q, k, v, _ = (x.requires_grad_() for x in tensors(12, 20, 16, torch.float32, device, B=1, H=1))
    out = sdpa(q, k, v, dropout_p=0.4)
    by_kernel = torch.autograd.grad(out.pow(2).sum(), (q, k, v), retain_graph=True)
    by_reference = torch.autograd.grad(out.pow(2).sum(), (q, k, v), create_graph=True)
    for a, b in zip(by_kernel, by_reference, strict=True):
        assert b.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_lse_where_all_is_dropped(device):
    q, k, v = (torch.randn(1, 2, 5, 16, device=device, requires_grad=True) for _ in range(3))

    def gradients(impl):
        _, lse = fastops.scaled_dot_product_attention(q, k, v, dropout_p=1.0, return_lse=True, impl=impl)
        return torch.autograd.grad(lse.sum(), (q, k))

    for ours, stock in zip(gradients("triton"), gradients("torch"), strict=True):
        assert stock.abs().max() > 0.1
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
