"""Attention forward: one program computes BLOCK_M rows of one head by online softmax, fp32 accumulation.

Bytes moved: Q and O once, K and V once a query tile (from L2). Key tiles run from the last to the first, so that the
tile that is only partly filled (end of keys, diagonal) is peeled and the loop needs no mask. LAG delays P V by one
tile: its MMAs run under the next tile's softmax. FlashAttention-2 (Dao 2023).
"""

import triton
import triton.language as tl

from fastops.kernels.attention_dropout import dropout_keys, keep_mask, opaque
from fastops.kernels.attention_tiles import (
    LN2,
    LOG2E,
    biased_scores,
    key_range,
    load_rows,
    sequence,
    store_rows,
    visible_tile,
)


@triton.jit
def softmax_tile(
    scores, row_max, row_sum, scale_log2,
    SCALED: tl.constexpr, GUARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One online-softmax step; row_max is in units of log2, row_sum holds 8 partial sums a row.

    SCALED: scores already are in units of log2. GUARD: a row may have seen nothing but -inf so far.
    """
    if SCALED:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    base = new_max
    if GUARD:
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    if SCALED:
        p = tl.math.exp2(scores - base[:, None])
    else:
        p = tl.math.exp2(scores * scale_log2 - base[:, None])
    alpha = tl.math.exp2(row_max - base)
    row_sum = row_sum * alpha[:, None] + tl.sum(p.reshape(BLOCK_M, BLOCK_N // 8, 8), 1)
    return p, alpha, new_max, row_sum


@triton.jit(do_not_specialize=["tiles_m", "H", "Sq", "Sk", "left", "right", "threshold"])
def attention_forward_kernel(
    q_source, stride_qb, stride_qh, stride_qs,  # (B, H, Sq, D)
    k_source, stride_kb, stride_kh, stride_ks,  # (B, Hk, Sk, D)
    v_source, stride_vb, stride_vh, stride_vs,  # (B, Hk, Sk, D)
    o_source, stride_ob, stride_oh, stride_os,  # (B, H, Sq, D)
    lse_ptr, stride_lb, stride_lh, stride_ls,  # (B, H, Sq) fp32, natural logarithm
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,  # (B, H, Sq, Sk) bool or float
    key_range_ptr, stride_range,  # (B,) int32, of a key mask
    key_lengths_ptr, query_lengths_ptr, cu_q_ptr, cu_k_ptr,  # (B,), (B,), (B + 1,), (B + 1,) integers
    slopes_ptr, stride_slope,  # (B, H) fp32
    seed_ptr,  # (1,) int64
    tiles_m, H, Sq, Sk, scale, softcap, left, right, threshold, keep_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr,
    VARLEN: tl.constexpr, DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    MASK: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, LAG: tl.constexpr,
    LEAN: tl.constexpr, ALIGNED_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch_head = program // tiles_m
    tile_m = program % tiles_m
    if CAUSAL:
        # the longest rows first: what is left at the end of the grid is short
        tile_m = tiles_m - 1 - tile_m
    batch = batch_head // H
    head = batch_head % H
    kv_head = head // GROUP
    start_m = tile_m * BLOCK_M
    q_first, k_first, q_len, k_len, shift = sequence(
        batch, Sq, Sk, cu_q_ptr, cu_k_ptr, query_lengths_ptr, key_lengths_ptr, HAS_LENGTHS, HAS_QUERY_LENGTHS, VARLEN
    )
    if VARLEN:
        if start_m >= q_len:
            return
    row_end = q_len
    if HAS_QUERY_LENGTHS:
        row_end = Sq
        k_len = tl.where(start_m < q_len, k_len, 0)
    place = batch
    if VARLEN:
        place = 0
    unmasked = False
    if MASK >= 3:
        k_len, unmasked = key_range(batch, k_len, key_range_ptr, stride_range)
    # what a descriptor reads past the live keys may be anything
    CUT: tl.constexpr = TMA and (HAS_LENGTHS or VARLEN or MASK >= 3)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_slope + head)
    mask_base = mask_ptr
    if MASK:
        mask_base = mask_ptr + batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh

    end = k_len
    if CAUSAL:
        end = tl.minimum(end, start_m + BLOCK_M + shift + right)
    last = tl.maximum(tl.cdiv(end, BLOCK_N) - 1, 0) * BLOCK_N
    # tiles from `masked_end` up need a mask, and with WINDOW those below `full_begin`; `begin` is the first tile
    masked_end = last
    if CAUSAL and not ALIGNED_DIAGONAL:
        masked_end = tl.minimum(tl.maximum(start_m + shift + right + 1, 0) // BLOCK_N * BLOCK_N, last)
    begin = 0
    full_begin = 0
    if WINDOW:
        begin = tl.minimum(tl.maximum(start_m + shift - left, 0) // BLOCK_N * BLOCK_N, last)
        masked_end = tl.maximum(masked_end, begin)
        full_begin = tl.cdiv(tl.maximum(start_m + BLOCK_M - 1 + shift - left, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, masked_end)

    q_local = tl.arange(0, BLOCK_M)[:, None]
    k_local = tl.arange(0, BLOCK_N)[None, :]
    rows = start_m + q_local
    keys = (0, 0)
    if DROPOUT:
        keys = dropout_keys(seed_ptr, batch_head)
    q = load_rows(q_source, place, head, q_first, start_m, q_len, stride_qb, stride_qh, stride_qs,
                  BLOCK_M, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M, 8], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    acc, row_max, row_sum = masked_tile(
        q, acc, row_max, row_sum, rows, q_local, k_local, keys, last,
        k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
        mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
        scale, softcap, slope, left, right, threshold,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, CUT, DROPOUT, SOFTCAP, ALIBI, MASK, RAGGED,
        TMA, WIDE, PRECISION, True,
    )  # fmt: skip
    if (CAUSAL and not ALIGNED_DIAGONAL) or WINDOW:
        for step in tl.range(0, last - masked_end, BLOCK_N, disable_licm=LEAN):
            acc, row_max, row_sum = masked_tile(
                q, acc, row_max, row_sum, rows, q_local, k_local, keys, last - BLOCK_N - step,
                k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
                mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
                scale, softcap, slope, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, DROPOUT, SOFTCAP, ALIBI, MASK,
                RAGGED, TMA, WIDE, PRECISION, False,
            )  # fmt: skip

    if MASK < 3:
        acc, row_max, row_sum = full_tiles(
            q, acc, row_max, row_sum, q_local, k_local, keys, full_begin, masked_end,
            k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
            mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
            scale, softcap, slope, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, SOFTCAP, ALIBI, MASK, RAGGED, TMA, WIDE, LAG, LEAN, PRECISION,
        )  # fmt: skip
    else:
        if unmasked:
            acc, row_max, row_sum = full_tiles(
                q, acc, row_max, row_sum, q_local, k_local, keys, full_begin, masked_end,
                k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
                mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
                scale, softcap, slope, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, SOFTCAP, ALIBI, 0, False, TMA, WIDE, LAG, LEAN, PRECISION,
            )  # fmt: skip
        else:
            acc, row_max, row_sum = full_tiles(
                q, acc, row_max, row_sum, q_local, k_local, keys, full_begin, masked_end,
                k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
                mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
                scale, softcap, slope, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, SOFTCAP, ALIBI, MASK, False, TMA, WIDE,
                False, LEAN, PRECISION,
            )  # fmt: skip

    if WINDOW:
        for step in tl.range(0, full_begin - begin, BLOCK_N, disable_licm=LEAN):
            acc, row_max, row_sum = masked_tile(
                q, acc, row_max, row_sum, rows, q_local, k_local, keys, full_begin - BLOCK_N - step,
                k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
                mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
                scale, softcap, slope, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, DROPOUT, SOFTCAP, ALIBI, MASK,
                RAGGED, TMA, WIDE, PRECISION, False,
            )  # fmt: skip

    total = tl.sum(row_sum, 1)
    row = start_m + tl.arange(0, BLOCK_M)
    if HAS_QUERY_LENGTHS:
        total = tl.where(row < q_len, total, 0.0)
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    if DROPOUT:
        inverse = inverse * keep_scale
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    lse_base = lse_ptr + batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    tl.store(lse_base + (q_first + row).to(tl.int64) * stride_ls, lse, mask=row < row_end)
    out = tl.where(empty[:, None], 0.0, acc * inverse[:, None])
    if TMA and not VARLEN:
        o_source.store([batch, head, start_m, 0], out.to(o_source.dtype).reshape(1, 1, BLOCK_M, BLOCK_D))
    else:
        store_rows(o_source, out, place, head, q_first, start_m, row_end, stride_ob, stride_oh, stride_os,
                   BLOCK_M, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def full_tiles(
    q, acc, row_max, row_sum, q_local, k_local, keys, full_begin, masked_end,
    k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
    mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
    scale, softcap, slope, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, LAG: tl.constexpr, LEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key tiles of which every element exists and is in the band, from the last to the first."""
    BIASED: tl.constexpr = SOFTCAP != 0 or ALIBI or MASK != 0
    GUARD: tl.constexpr = MASK != 0
    scale_log2 = scale * LOG2E
    if not LAG:
        for step in tl.range(0, masked_end - full_begin, BLOCK_N, disable_licm=LEAN):
            start_n = masked_end - BLOCK_N - step
            k = load_rows(k_source, place, kv_head, k_first, start_n, k_len, stride_kb, stride_kh, stride_ks,
                          BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, False)  # fmt: skip
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            if BIASED:
                scores, _ = biased_scores(
                    scores, start_m, q_local, start_n, k_local, scale, softcap, slope, mask_base, stride_mm, stride_mn,
                    q_len, k_len, shift, SOFTCAP, ALIBI, MASK, RAGGED, WIDE, False,
                )  # fmt: skip
            p, alpha, row_max, row_sum = softmax_tile(
                scores, row_max, row_sum, scale_log2, BIASED, GUARD, BLOCK_M, BLOCK_N
            )
            if DROPOUT:
                p = opaque(tl.where(keep_mask(keys, start_m, q_local, start_n, k_local, threshold), p, 0.0))
            v = load_rows(v_source, place, kv_head, k_first, start_n, k_len, stride_vb, stride_vh, stride_vs,
                          BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, False)  # fmt: skip
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    elif masked_end > full_begin:
        first_n = masked_end - BLOCK_N
        k = load_rows(k_source, place, kv_head, k_first, first_n, k_len, stride_kb, stride_kh, stride_ks,
                      BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, False)  # fmt: skip
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        p, alpha, row_max, row_sum = softmax_tile(scores, row_max, row_sum, scale_log2, False, False, BLOCK_M, BLOCK_N)
        if DROPOUT:
            p = opaque(tl.where(keep_mask(keys, start_m, q_local, first_n, k_local, threshold), p, 0.0))
        for step in tl.range(0, first_n - full_begin, BLOCK_N, disable_licm=LEAN):
            start_n = first_n - BLOCK_N - step
            k = load_rows(k_source, place, kv_head, k_first, start_n, k_len, stride_kb, stride_kh, stride_ks,
                          BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, False)  # fmt: skip
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            # independent of this tile's softmax: these MMAs run while the softmax below does
            v = load_rows(v_source, place, kv_head, k_first, start_n + BLOCK_N, k_len, stride_vb, stride_vh, stride_vs,
                          BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, False)  # fmt: skip
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            p, alpha, row_max, row_sum = softmax_tile(
                scores, row_max, row_sum, scale_log2, False, False, BLOCK_M, BLOCK_N
            )
            if DROPOUT:
                p = opaque(tl.where(keep_mask(keys, start_m, q_local, start_n, k_local, threshold), p, 0.0))
        v = load_rows(v_source, place, kv_head, k_first, full_begin, k_len, stride_vb, stride_vh, stride_vs,
                      BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, False)  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def masked_tile(
    q, acc, row_max, row_sum, rows, q_local, k_local, keys, start_n,
    k_source, stride_kb, stride_kh, stride_ks, v_source, stride_vb, stride_vh, stride_vs,
    mask_base, stride_mm, stride_mn, place, kv_head, k_first, q_len, k_len, shift, start_m,
    scale, softcap, slope, left, right, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CUT: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One key tile of which some elements may be hidden. FIRST: acc is still zero."""
    BIASED: tl.constexpr = SOFTCAP != 0 or ALIBI or MASK != 0
    columns = start_n + k_local
    k = load_rows(k_source, place, kv_head, k_first, start_n, k_len, stride_kb, stride_kh, stride_ks,
                  BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if BIASED:
        scores, _ = biased_scores(
            scores, start_m, q_local, start_n, k_local, scale, softcap, slope, mask_base, stride_mm, stride_mn,
            q_len, k_len, shift, SOFTCAP, ALIBI, MASK, RAGGED, WIDE, True,
        )  # fmt: skip
    visible = visible_tile(rows, columns, k_len, shift, left, right, CAUSAL, WINDOW)
    scores = tl.where(visible, scores, float("-inf"))
    p, alpha, row_max, row_sum = softmax_tile(scores, row_max, row_sum, scale * LOG2E, BIASED, True, BLOCK_M, BLOCK_N)
    if DROPOUT:
        p = opaque(tl.where(keep_mask(keys, start_m, q_local, start_n, k_local, threshold), p, 0.0))
    v = load_rows(v_source, place, kv_head, k_first, start_n, k_len, stride_vb, stride_vh, stride_vs,
                  BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    if CUT:
        # 0 x NaN is NaN
        v = tl.where(tl.arange(0, BLOCK_N)[:, None] < k_len - start_n, v, 0.0)
    if not FIRST:
        acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum
