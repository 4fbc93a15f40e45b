"""Attention in float64, a few heads at a time so that the scores fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Tensors

SCORES_AT_ONCE = 2**27


def attention_truth(case: Case, tensors: Tensors, wrt: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Outputs of a step of the "attention" workload: (B, S, H, D) and, where the mode asks, gradients."""
    s, differentiate = case.shape, case.mode in ("train", "bwd")
    group = s["heads"] // s["kv_heads"]
    full = {name: tensors[name].detach().double().transpose(1, 2) for name in ("q", "k", "v")}
    grad = tensors["grad"].double().transpose(1, 2) if differentiate else None
    out = torch.zeros_like(full["q"])
    grads = {name: torch.zeros_like(x) for name, x in full.items()}
    bias = tensors["bias"].detach().double() if "bias" in tensors else None
    grad_bias = torch.zeros_like(bias) if bias is not None else None
    batch_step = max(1, SCORES_AT_ONCE // (group * s["q_len"] * s["k_len"]))
    for head in range(s["kv_heads"]):
        heads = slice(head * group, (head + 1) * group)
        for start in range(0, s["batch"], batch_step):
            rows = slice(start, start + batch_step)
            q, k, v = (x.detach().requires_grad_(differentiate) for x in _part(full, rows, heads, head))
            piece = bias[:, heads].requires_grad_(differentiate) if bias is not None else None
            with torch.set_grad_enabled(differentiate):
                found = _formula(case, tensors, q, k, v, piece, rows, heads)
            out[rows, heads] = found.detach()
            if grad is not None:
                leaves = [q, k, v, *([piece] if piece is not None else [])]
                got = torch.autograd.grad(found, leaves, grad[rows, heads])
                grads["q"][rows, heads] = got[0]
                grads["k"][rows, head : head + 1] = got[1]
                grads["v"][rows, head : head + 1] = got[2]
                if grad_bias is not None:
                    grad_bias[:, heads] += got[3]
    result = out.transpose(1, 2)
    if not differentiate:
        return (result,)
    found_grads = tuple(grads[name].transpose(1, 2) for name in ("q", "k", "v"))
    if grad_bias is not None and "bias" in wrt:
        found_grads = (*found_grads, grad_bias)
    return found_grads if case.mode == "bwd" else (result, *found_grads)


def _part(full: Tensors, rows: slice, heads: slice, head: int) -> tuple[Tensor, Tensor, Tensor]:
    one = slice(head, head + 1)
    return full["q"][rows, heads], full["k"][rows, one], full["v"][rows, one]


def _formula(
    case: Case, tensors: Tensors, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: slice, heads: slice
) -> Any:
    from bench.workloads.attention import slopes

    s, device = case.shape, q.device
    i, j = torch.arange(s["q_len"], device=device)[:, None], torch.arange(s["k_len"], device=device)
    scores = q @ k.mT / s["dim"] ** 0.5
    if bias is not None:
        scores = scores + bias
    if s.get("alibi"):
        scores = scores - slopes(s["heads"], device).double()[heads, None, None] * (i - j).abs()
    if s.get("causal"):
        scores = scores.masked_fill(j > i, float("-inf"))
    if s.get("window") is not None:
        scores = scores.masked_fill(i - j > s["window"], float("-inf"))
    if "lengths" in tensors:
        lengths = tensors["lengths"][rows, None, None, None]
        scores = scores.masked_fill(j >= lengths, float("-inf"))
        return (scores.softmax(-1) @ v).masked_fill(i >= lengths, 0)
    return scores.softmax(-1) @ v
