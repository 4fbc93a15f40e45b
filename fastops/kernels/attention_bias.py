"""Gradient of a float attention mask: dS summed over whatever the mask broadcasts over, in a fixed order, no atomics.

One program owns one tile of the mask's gradient and walks over the batches, heads, query tiles and key tiles that share
it, recomputing P and dS. Where that leaves too few programs, the walk is cut into SPLIT parts with a partial sum each.
"""

import triton
import triton.language as tl

from fastops.kernels.attention_dq import score_gradient
from fastops.kernels.attention_dropout import dropout_keys
from fastops.kernels.attention_tiles import load_rows, padded_row, sequence


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "left", "right", "threshold", "mask_b", "mask_h", "tiles_m", "tiles_n"])
def attention_bias_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs,  # (B, H, Sq, D)
    k_ptr, stride_kb, stride_kh, stride_ks,  # (B, Hk, Sk, D)
    v_ptr, stride_vb, stride_vh, stride_vs,  # (B, Hk, Sk, D)
    g_ptr, stride_gb, stride_gh, stride_gs,  # (B, H, Sq, D)
    lse2_ptr, delta_ptr,  # (B, H, Sq_pad) fp32
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,  # (B, H, Sq, Sk)
    partial_ptr,  # (SPLIT, mask_b, mask_h, 1 or Sq, 1 or Sk) fp32
    key_lengths_ptr, query_lengths_ptr, slopes_ptr, stride_slope, seed_ptr,
    B, H, Sq, Sq_pad, Sk, mask_b, mask_h, tiles_m, tiles_n, scale, value_scale, softcap, left, right, threshold,
    SPLIT: tl.constexpr, OVER_M: tl.constexpr, OVER_N: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RAGGED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # OVER_M, OVER_N: the mask has one row, one column for all
    own_m = tiles_m
    own_n = tiles_n
    walk_m = 1
    walk_n = 1
    if OVER_M:
        own_m = 1
        walk_m = tiles_m
    if OVER_N:
        own_n = 1
        walk_n = tiles_n
    program = tl.program_id(0)
    split = program % SPLIT
    program = program // SPLIT
    tile_n = program % own_n
    tile_m = program // own_n % own_m
    own_h = program // own_n // own_m % mask_h
    own_b = program // own_n // own_m // mask_h
    walk_h = H // mask_h
    walk_b = B // mask_b
    steps = walk_b * walk_h * walk_m * walk_n
    part = tl.cdiv(steps, SPLIT)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * part, tl.minimum(split * part + part, steps)):
        start_n = (tile_n + step % walk_n) * BLOCK_N
        start_m = (tile_m + step // walk_n % walk_m) * BLOCK_M
        head = own_h + step // walk_n // walk_m % walk_h
        batch = own_b + step // walk_n // walk_m // walk_h
        _, _, q_len, k_len, shift = sequence(
            batch, Sq, Sk, q_ptr, q_ptr, query_lengths_ptr, key_lengths_ptr, HAS_LENGTHS, HAS_QUERY_LENGTHS, False
        )
        batch_head = batch * H + head
        q = load_rows(q_ptr, batch, head, 0, start_m, q_len, stride_qb, stride_qh, stride_qs,
                      BLOCK_M, HEAD_DIM, BLOCK_D, False, WIDE, True)  # fmt: skip
        g = load_rows(g_ptr, batch, head, 0, start_m, q_len, stride_gb, stride_gh, stride_gs,
                      BLOCK_M, HEAD_DIM, BLOCK_D, False, WIDE, True)  # fmt: skip
        k = load_rows(k_ptr, batch, head // GROUP, 0, start_n, k_len, stride_kb, stride_kh, stride_ks,
                      BLOCK_N, HEAD_DIM, BLOCK_D, False, WIDE, True)  # fmt: skip
        v = load_rows(v_ptr, batch, head // GROUP, 0, start_n, k_len, stride_vb, stride_vh, stride_vs,
                      BLOCK_N, HEAD_DIM, BLOCK_D, False, WIDE, True)  # fmt: skip
        padded = padded_row(batch, batch_head, 0, Sq_pad, H, False) + start_m + tl.arange(0, BLOCK_M)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + batch * stride_slope + head)
        keys = (0, 0)
        if DROPOUT:
            keys = dropout_keys(seed_ptr, batch_head)
        mask_base = mask_ptr + batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
        ds = score_gradient(
            q, g, k, v, tl.load(lse2_ptr + padded), tl.load(delta_ptr + padded), mask_base, stride_mm, stride_mn,
            slope, keys, start_m, start_n, q_len, k_len, shift, scale, softcap, left, right, threshold,
            BLOCK_M, BLOCK_N, CAUSAL, WINDOW, True, DROPOUT, SOFTCAP, ALIBI, 2, RAGGED, WIDE, PRECISION, False,
        )  # fmt: skip
        if HAS_QUERY_LENGTHS:
            # the mask is read there, and may be NaN
            ds = tl.where(start_m + tl.arange(0, BLOCK_M)[:, None] < q_len, ds, 0.0)
        total += ds
    total = total * value_scale
    rows_m = Sq
    rows_n = Sk
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if OVER_M:
        rows_m = 1
    if OVER_N:
        rows_n = 1
    base = partial_ptr + ((split.to(tl.int64) * mask_b + own_b) * mask_h + own_h) * rows_m * rows_n
    if OVER_M and OVER_N:
        tl.store(base, tl.sum(tl.sum(total, 1), 0))
    elif OVER_M:
        tl.store(base + n, tl.sum(total, 0), mask=n < Sk)
    elif OVER_N:
        tl.store(base + m, tl.sum(total, 1), mask=m < Sq)
    else:
        live = (m[:, None] < Sq) & (n[None, :] < Sk)
        tl.store(base + m[:, None].to(tl.int64) * Sk + n[None, :], total, mask=live)
