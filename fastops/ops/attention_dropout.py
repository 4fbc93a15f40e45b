"""The dropout mask of the attention kernels, in torch: for second derivatives and as the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fastops.kernels.attention_rate import keep_probability, threshold

__all__ = ["keep_mask", "keep_probability", "new_seed", "threshold"]

WORD = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """64 random bits from torch's generator, as a tensor: nothing is read back, and CUDA graphs draw anew."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, batch_heads: int, q_len: int, k_len: int, dropout_p: float) -> Tensor:
    """True (batch_heads, q_len, k_len) where an attention weight is kept, bit by bit as the kernels decide it."""
    device = seed.device
    low, high = seed & WORD, (seed >> 32) & WORD
    counter = torch.arange(batch_heads, device=device)
    zero = torch.zeros_like(counter)
    k0, k1 = _philox4x32(low, high, [counter, zero, zero, zero], 10)[:2]
    query = torch.arange(q_len, device=device)[None, :, None]
    key = torch.arange(k_len, device=device)[None, None, :]
    q_group = ((query >> 4) << 3) | (query & 7)
    k_group = (((key >> 5) << 3) | (key & 7)).expand(batch_heads, q_len, k_len)
    c0, c1 = q_group ^ k1[:, None, None], k_group
    word_key = k0[:, None, None]
    for _ in range(7):
        product = c0 * 0xD256D193
        c0, c1 = ((product >> 32) & WORD) ^ c1 ^ word_key, product & WORD
        word_key = (word_key + 0x9E3779B9) & WORD
    word = torch.where((key & 16) == 0, c0, c1)
    left = ((query >> 3) & 1) * 16 + ((key >> 3) & 1) * 8
    bits = ((word << left) | (word >> (32 - left))) & WORD
    return bits >= threshold(dropout_p)


def _philox4x32(k0: Tensor, k1: Tensor, counter: list[Tensor], rounds: int) -> list[Tensor]:
    # int64 products wrap modulo 2^64, which leaves both words right
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]
