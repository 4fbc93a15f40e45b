"""Attention backward, the gradient of Q: one program computes BLOCK_M rows of one head, walking over the keys.

See attention_backward for the formulas. Bytes moved: Q, dO and dQ once, K and V once a query tile (from L2).
"""

import triton
import triton.language as tl

from fastops.kernels.attention_dropout import dropout_keys, keep_mask
from fastops.kernels.attention_tiles import (
    LOG2E,
    biased_scores,
    key_range,
    load_rows,
    padded_row,
    sequence,
    store_rows,
    visible_tile,
)


@triton.jit(do_not_specialize=["tiles_m", "H", "Sq", "Sk", "left", "right", "threshold"])
def attention_dq_kernel(
    q_source, stride_qb, stride_qh, stride_qs,  # (B, H, Sq, D)
    k_source, stride_kb, stride_kh, stride_ks,  # (B, Hk, Sk, D)
    v_source, stride_vb, stride_vh, stride_vs,  # (B, Hk, Sk, D)
    g_source, stride_gb, stride_gh, stride_gs,  # (B, H, Sq, D)
    dq_ptr, stride_dqb, stride_dqh, stride_dqs,  # (B, H, Sq, D)
    lse2_ptr, delta_ptr,  # padded rows, fp32
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,  # (B, H, Sq, Sk) bool or float
    key_range_ptr, stride_range,  # (B,) int32, of a key mask
    key_lengths_ptr, query_lengths_ptr, cu_q_ptr, cu_k_ptr,
    slopes_ptr, stride_slope,  # (B, H) fp32
    seed_ptr,  # (1,) int64
    tiles_m, H, Sq, Sq_pad, Sk, scale, grad_scale, softcap, left, right, threshold,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr,
    VARLEN: tl.constexpr, DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    MASK: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
    LEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0) // tiles_m
    tile_m = tl.program_id(0) % tiles_m
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m
    start_m = tile_m * BLOCK_M
    batch = batch_head // H
    head = batch_head % H
    kv_head = head // GROUP
    q_first, k_first, q_len, k_len, shift = sequence(
        batch, Sq, Sk, cu_q_ptr, cu_k_ptr, query_lengths_ptr, key_lengths_ptr, HAS_LENGTHS, HAS_QUERY_LENGTHS, VARLEN
    )
    if VARLEN:
        if start_m >= q_len:
            return
    place = batch
    if VARLEN:
        place = 0
    unmasked = False
    if MASK >= 3:
        k_len, unmasked = key_range(batch, k_len, key_range_ptr, stride_range)
    # what a descriptor reads past the live keys may be anything
    CUT: tl.constexpr = TMA and (HAS_LENGTHS or VARLEN or MASK >= 3)
    end = k_len
    if HAS_QUERY_LENGTHS:
        end = tl.where(start_m < q_len, end, 0)
    if CAUSAL:
        end = tl.minimum(end, start_m + BLOCK_M + shift + right)
    # tiles from `full` up need a mask, and with WINDOW those below `full_begin`; `begin` is the first tile
    full = tl.maximum(tl.minimum(end, k_len // BLOCK_N * BLOCK_N), 0)
    if CAUSAL:
        full = tl.minimum(full, tl.maximum(start_m + shift + right + 1, 0))
    full = full // BLOCK_N * BLOCK_N
    begin = 0
    full_begin = 0
    if WINDOW:
        begin = tl.maximum(start_m + shift - left, 0) // BLOCK_N * BLOCK_N
        full = tl.maximum(full, begin)
        full_begin = tl.cdiv(tl.maximum(start_m + BLOCK_M - 1 + shift - left, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, full)
    padded = padded_row(batch, batch_head, q_first, Sq_pad, H, VARLEN) + start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_source, place, head, q_first, start_m, q_len, stride_qb, stride_qh, stride_qs,
                  BLOCK_M, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    g = load_rows(g_source, place, head, q_first, start_m, q_len, stride_gb, stride_gh, stride_gs,
                  BLOCK_M, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    lse2 = tl.load(lse2_ptr + padded)
    delta = tl.load(delta_ptr + padded)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_slope + head)
    mask_base = mask_ptr
    if MASK:
        mask_base = mask_ptr + batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    keys = (0, 0)
    if DROPOUT:
        keys = dropout_keys(seed_ptr, batch_head)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in tl.range(full, end, BLOCK_N, disable_licm=LEAN):
        dq = dq_tile(
            dq, q, g, lse2, delta, k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh,
            stride_vs, mask_base, stride_mm, stride_mn, slope, keys, place, kv_head, k_first, start_m, start_n,
            q_len, k_len, shift, scale, softcap, left, right, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, CUT, True, DROPOUT, SOFTCAP, ALIBI, MASK,
            RAGGED, TMA, WIDE, PRECISION,
        )  # fmt: skip
    if MASK < 3:
        for start_n in tl.range(full_begin, full, BLOCK_N, disable_licm=LEAN):
            dq = dq_tile(
                dq, q, g, lse2, delta, k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh,
                stride_vs, mask_base, stride_mm, stride_mn, slope, keys, place, kv_head, k_first, start_m, start_n,
                q_len, k_len, shift, scale, softcap, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, False, DROPOUT, SOFTCAP, ALIBI, MASK,
                RAGGED, TMA, WIDE, PRECISION,
            )  # fmt: skip
    else:
        if unmasked:
            for start_n in tl.range(full_begin, full, BLOCK_N, disable_licm=LEAN):
                dq = dq_tile(
                    dq, q, g, lse2, delta, k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh,
                    stride_vs, mask_base, stride_mm, stride_mn, slope, keys, place, kv_head, k_first, start_m, start_n,
                    q_len, k_len, shift, scale, softcap, left, right, threshold,
                    HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, False, DROPOUT, SOFTCAP, ALIBI, 0,
                    False, TMA, WIDE, PRECISION,
                )  # fmt: skip
        else:
            for start_n in tl.range(full_begin, full, BLOCK_N, disable_licm=LEAN):
                dq = dq_tile(
                    dq, q, g, lse2, delta, k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh,
                    stride_vs, mask_base, stride_mm, stride_mn, slope, keys, place, kv_head, k_first, start_m, start_n,
                    q_len, k_len, shift, scale, softcap, left, right, threshold,
                    HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, False, DROPOUT, SOFTCAP, ALIBI, MASK,
                    False, TMA, WIDE, PRECISION,
                )  # fmt: skip
    if WINDOW:
        for start_n in tl.range(begin, full_begin, BLOCK_N, disable_licm=LEAN):
            dq = dq_tile(
                dq, q, g, lse2, delta, k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh,
                stride_vs, mask_base, stride_mm, stride_mn, slope, keys, place, kv_head, k_first, start_m, start_n,
                q_len, k_len, shift, scale, softcap, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, CUT, True, DROPOUT, SOFTCAP, ALIBI, MASK,
                RAGGED, TMA, WIDE, PRECISION,
            )  # fmt: skip
    row_end = q_len
    if HAS_QUERY_LENGTHS:
        row_end = Sq
        if TMA:
            # dead rows of queries and gradients may hold anything
            live = start_m + tl.arange(0, BLOCK_M)[:, None] < q_len
            dq = tl.where(live, dq, 0.0)
    store_rows(dq_ptr, dq * grad_scale, place, head, q_first, start_m, row_end, stride_dqb, stride_dqh, stride_dqs,
               BLOCK_M, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def dq_tile(
    dq, q, g, lse2, delta, k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
    mask_base, stride_mm, stride_mn, slope, keys, place, kv_head, k_first, start_m, start_n, q_len, k_len, shift,
    scale, softcap, left, right, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CUT: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_source, place, kv_head, k_first, start_n, k_len, stride_kb, stride_kh, stride_ks,
                  BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, MASKED)  # fmt: skip
    v = load_rows(v_source, place, kv_head, k_first, start_n, k_len, stride_vb, stride_vh, stride_vs,
                  BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, MASKED)  # fmt: skip
    if CUT:
        # 0 x NaN is NaN
        k = tl.where(tl.arange(0, BLOCK_N)[:, None] < k_len - start_n, k, 0.0)
    ds = score_gradient(
        q, g, k, v, lse2, delta, mask_base, stride_mm, stride_mn, slope, keys, start_m, start_n, q_len, k_len, shift,
        scale, softcap, left, right, threshold,
        BLOCK_M, BLOCK_N, CAUSAL, WINDOW, MASKED, DROPOUT, SOFTCAP, ALIBI, MASK, RAGGED, WIDE, PRECISION,
        SOFTCAP != 0,
    )  # fmt: skip
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def score_gradient(
    q, g, k, v, lse2, delta, mask_base, stride_mm, stride_mn, slope, keys, start_m, start_n, q_len, k_len, shift,
    scale, softcap, left, right, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BEND: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one tile, (queries, keys). BEND: through the softcap, else the gradient after it."""
    q_local = tl.arange(0, BLOCK_M)[:, None]
    k_local = tl.arange(0, BLOCK_N)[None, :]
    rows = start_m + q_local
    columns = start_n + k_local
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    dp = tl.dot(g, v.T, input_precision=PRECISION)
    if SOFTCAP != 0 or ALIBI or MASK != 0:
        scores, bend = biased_scores(
            scores, start_m, q_local, start_n, k_local, scale, softcap, slope, mask_base, stride_mm, stride_mn,
            q_len, k_len, shift, SOFTCAP, ALIBI, MASK, RAGGED, WIDE, MASKED,
        )  # fmt: skip
        p = tl.math.exp2(scores - lse2[:, None])
    else:
        p = tl.math.exp2(scores * (scale * LOG2E) - lse2[:, None])
    if DROPOUT:
        dp = tl.where(keep_mask(keys, start_m, q_local, start_n, k_local, threshold), dp, 0.0)
    ds = p * (dp - delta[:, None])
    if BEND:
        ds = ds * bend
    if MASKED:
        # P and dP of hidden elements may be anything, NaN included
        ds = tl.where(visible_tile(rows, columns, k_len, shift, left, right, CAUSAL, WINDOW), ds, 0.0)
    return ds
