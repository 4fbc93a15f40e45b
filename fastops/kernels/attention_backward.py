"""Attention backward without atomics: a row kernel for delta and one for dK and dV; attention_dq has that for dQ.

With P = exp(S - LSE): dV = P^T dO, dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, where delta =
rowsum(dO O) minus the gradient of the LSE. With dropout P is kept or zeroed in dV, so is dO V^T in dS, and the factor
1 / keep probability is in the last scaling (delta carries the keep probability instead).

lse2 = LSE log2(e), and +inf where a row sees no key or does not exist, so that exp2(S - lse2) is 0 there unmasked.
lse2 and delta have rows padded to a multiple of 128: their loads need no mask, which would make each 4-byte copies.
"""

import triton
import triton.language as tl

from fastops.kernels.attention_dropout import dropout_keys, keep_mask, opaque
from fastops.kernels.attention_tiles import (
    LOG2E,
    biased_scores,
    key_range,
    load_rows,
    padded_row,
    sequence,
    store_rows,
)


@triton.jit(do_not_specialize=["tiles_m", "H", "Sq"])
def attention_delta_kernel(
    o_ptr, stride_ob, stride_oh, stride_os,  # (B, H, Sq, D)
    g_ptr, stride_gb, stride_gh, stride_gs,  # (B, H, Sq, D), gradient of O
    lse_ptr, stride_lb, stride_lh, stride_ls,  # (B, H, Sq) fp32
    grad_lse_ptr, stride_glb, stride_glh, stride_gls,  # (B, H, Sq) fp32
    lse2_ptr, delta_ptr,  # padded rows, fp32
    query_lengths_ptr, cu_q_ptr,
    tiles_m, H, Sq, Sq_pad, keep_probability,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0) // tiles_m
    start_m = tl.program_id(0) % tiles_m * BLOCK_M
    batch = batch_head // H
    head = batch_head % H
    q_first, _, q_len, _, _ = sequence(
        batch, Sq, Sq, cu_q_ptr, cu_q_ptr, query_lengths_ptr, query_lengths_ptr, False, HAS_QUERY_LENGTHS, VARLEN
    )
    if VARLEN:
        if start_m >= q_len:
            return
    o = load_rows(o_ptr, batch, head, q_first, start_m, q_len, stride_ob, stride_oh, stride_os,
                  BLOCK_M, HEAD_DIM, BLOCK_D, False, WIDE, True).to(tl.float32)  # fmt: skip
    g = load_rows(g_ptr, batch, head, q_first, start_m, q_len, stride_gb, stride_gh, stride_gs,
                  BLOCK_M, HEAD_DIM, BLOCK_D, False, WIDE, True).to(tl.float32)  # fmt: skip
    rows = start_m + tl.arange(0, BLOCK_M)
    at = (q_first + rows).to(tl.int64)
    head_base = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh
    lse = tl.load(lse_ptr + head_base + at * stride_ls, mask=rows < q_len, other=float("-inf"))
    delta = tl.sum(o * g, 1)
    if HAS_GRAD_LSE:
        head_base = batch.to(tl.int64) * stride_glb + head.to(tl.int64) * stride_glh
        delta = delta - tl.load(grad_lse_ptr + head_base + at * stride_gls, mask=rows < q_len, other=0.0)
    empty = lse == float("-inf")
    target = padded_row(batch, batch_head, q_first, Sq_pad, H, VARLEN) + rows
    tl.store(delta_ptr + target, tl.where(empty, 0.0, delta * keep_probability))
    tl.store(lse2_ptr + target, tl.where(empty, float("inf"), lse * LOG2E))


@triton.jit(do_not_specialize=["tiles_n", "H", "Sq", "Sk", "left", "right", "threshold"])
def attention_dkdv_kernel(
    q_source, stride_qb, stride_qh, stride_qs,  # (B, H, Sq, D)
    k_source, stride_kb, stride_kh, stride_ks,  # (B, Hk, Sk, D)
    v_source, stride_vb, stride_vh, stride_vs,  # (B, Hk, Sk, D)
    g_source, stride_gb, stride_gh, stride_gs,  # (B, H, Sq, D)
    dk_ptr, stride_dkb, stride_dkh, stride_dks,  # (B, Hk, Sk, D)
    dv_ptr, stride_dvb, stride_dvh, stride_dvs,  # (B, Hk, Sk, D)
    lse2_ptr, delta_ptr,  # padded rows, fp32
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,  # (B, H, Sq, Sk) bool or float
    key_range_ptr, stride_range,  # (B,) int32, of a key mask
    key_lengths_ptr, query_lengths_ptr, cu_q_ptr, cu_k_ptr,
    slopes_ptr, stride_slope,  # (B, H) fp32
    seed_ptr,  # (1,) int64
    tiles_n, H, Sq, Sq_pad, Sk, scale, grad_scale, value_scale, softcap, left, right, threshold,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr,
    VARLEN: tl.constexpr, DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    MASK: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
    LEAN: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch_kv_head = tl.program_id(0) // tiles_n
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    batch = batch_kv_head // (H // GROUP)
    kv_head = batch_kv_head % (H // GROUP)
    q_first, k_first, q_len, k_len, shift = sequence(
        batch, Sq, Sk, cu_q_ptr, cu_k_ptr, query_lengths_ptr, key_lengths_ptr, HAS_LENGTHS, HAS_QUERY_LENGTHS, VARLEN
    )
    if VARLEN:
        if start_n >= k_len:
            return
    place = batch
    if VARLEN:
        place = 0
    if MASK >= 3:
        k_len, _ = key_range(batch, k_len, key_range_ptr, stride_range)
    end = q_len
    if HAS_LENGTHS or MASK >= 3:
        # a tile of dead keys does no work and writes zeros
        end = tl.where(start_n < k_len, q_len, 0)
    # hidden keys are rows of their own here: what they get is thrown away in the end
    BIAS: tl.constexpr = 0 if MASK == 4 else MASK
    # what a descriptor reads past the live queries may be anything
    CUT: tl.constexpr = TMA and (HAS_QUERY_LENGTHS or VARLEN)
    k = load_rows(k_source, place, kv_head, k_first, start_n, k_len, stride_kb, stride_kh, stride_ks,
                  BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    v = k
    dk = 0.0
    dv = 0.0
    if WANT_DK:
        v = load_rows(v_source, place, kv_head, k_first, start_n, k_len, stride_vb, stride_vh, stride_vs,
                      BLOCK_N, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if WANT_DV:
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = 0
    masked_end = 0
    if CAUSAL:
        first = tl.maximum(start_n - shift - right, 0) // BLOCK_M * BLOCK_M
        masked_end = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - shift - right, 0), BLOCK_M) * BLOCK_M
        masked_end = tl.minimum(masked_end, end)
    if WINDOW:
        end = tl.minimum(end, start_n + BLOCK_N - shift + left)
        masked_end = end
    if GROUP == 1:
        dk, dv = dkdv_head(
            dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
            lse2_ptr, delta_ptr, mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn, slopes_ptr, stride_slope,
            seed_ptr, batch, place, kv_head, H, q_first, start_n, first, masked_end, end, q_len, k_len, shift, Sq_pad,
            scale, softcap, left, right, threshold,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, VARLEN, CUT, DROPOUT, SOFTCAP, ALIBI, BIAS, RAGGED,
            TMA, WIDE, LEAN, WANT_DK, WANT_DV, PRECISION,
        )  # fmt: skip
    else:
        for member in tl.range(GROUP, disable_licm=True):
            dk, dv = dkdv_head(
                dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
                lse2_ptr, delta_ptr, mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn, slopes_ptr, stride_slope,
                seed_ptr, batch, place, kv_head * GROUP + member, H, q_first, start_n, first, masked_end, end, q_len,
                k_len, shift, Sq_pad, scale, softcap, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, VARLEN, CUT, DROPOUT, SOFTCAP, ALIBI, BIAS, RAGGED,
                TMA, WIDE, LEAN, WANT_DK, WANT_DV, PRECISION,
            )  # fmt: skip
    row_end = k_len
    if HAS_LENGTHS:
        # read again (volatile: not merged with the first) rather than kept: one register less through the loop
        again = tl.load(key_lengths_ptr + tl.program_id(0) // tiles_n // (H // GROUP), volatile=True)
        k_len = tl.maximum(tl.minimum(again, Sk), 0).to(tl.int32)
    if MASK >= 3:
        k_len, _ = key_range(batch, k_len, key_range_ptr, stride_range)
    if HAS_LENGTHS or MASK >= 3:
        row_end = Sk
    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    # rows of dead keys hold anything (their scores are not in the LSE): select, do not multiply
    live = keys < k_len
    if MASK == 4:
        mask_base = mask_ptr + batch.to(tl.int64) * stride_mb + kv_head.to(tl.int64) * GROUP * stride_mh
        live = live & (tl.load(mask_base + keys) == 0.0)
    if WANT_DK:
        store_rows(dk_ptr, tl.where(live, dk * grad_scale, 0.0), place, kv_head, k_first, start_n, row_end,
                   stride_dkb, stride_dkh, stride_dks, BLOCK_N, HEAD_DIM, BLOCK_D)  # fmt: skip
    if WANT_DV:
        store_rows(dv_ptr, tl.where(live, dv * value_scale, 0.0), place, kv_head, k_first, start_n, row_end,
                   stride_dvb, stride_dvh, stride_dvs, BLOCK_N, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def dkdv_head(
    dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
    lse2_ptr, delta_ptr, mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn, slopes_ptr, stride_slope,
    seed_ptr, batch, place, head, H, q_first, start_n, first, masked_end, end, q_len, k_len, shift, Sq_pad,
    scale, softcap, left, right, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, VARLEN: tl.constexpr, CUT: tl.constexpr,
    DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr,
    LEAN: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query head adds: the tiles the diagonal (or window) crosses, then the full ones."""
    batch_head = batch * H + head
    base = padded_row(batch, batch_head, q_first, Sq_pad, H, VARLEN)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_slope + head)
    mask_base = mask_ptr
    if MASK:
        mask_base = mask_ptr + batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
    keys = (0, 0)
    if DROPOUT:
        keys = dropout_keys(seed_ptr, batch_head)
    begin = 0
    if CAUSAL or WINDOW:
        for start_m in tl.range(first, masked_end, BLOCK_M, disable_licm=True):
            dk, dv = dkdv_tile(
                dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
                lse2_ptr + base, delta_ptr + base, mask_base, stride_mm, stride_mn, slope, keys,
                place, head, q_first, start_m, start_n, q_len, k_len, shift, scale, softcap, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, True, CUT, DROPOUT, SOFTCAP, ALIBI, MASK,
                RAGGED, TMA, WIDE, WANT_DK, WANT_DV, PRECISION,
            )  # fmt: skip
        begin = tl.maximum(masked_end, first)
    if not WINDOW:
        tail = end
        if CUT:
            tail = end // BLOCK_M * BLOCK_M
        for start_m in tl.range(begin, tail, BLOCK_M, disable_licm=LEAN):
            dk, dv = dkdv_tile(
                dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
                lse2_ptr + base, delta_ptr + base, mask_base, stride_mm, stride_mn, slope, keys,
                place, head, q_first, start_m, start_n, q_len, k_len, shift, scale, softcap, left, right, threshold,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, False, DROPOUT, SOFTCAP, ALIBI, MASK,
                RAGGED, TMA, WIDE, WANT_DK, WANT_DV, PRECISION,
            )  # fmt: skip
        if CUT:
            tail = tl.maximum(begin, tail)
            if tail < end:
                dk, dv = dkdv_tile(
                    dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
                    lse2_ptr + base, delta_ptr + base, mask_base, stride_mm, stride_mn, slope, keys,
                    place, head, q_first, tail, start_n, q_len, k_len, shift, scale, softcap, left, right, threshold,
                    HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, True, DROPOUT, SOFTCAP, ALIBI, MASK,
                    RAGGED, TMA, WIDE, WANT_DK, WANT_DV, PRECISION,
                )  # fmt: skip
    return dk, dv


@triton.jit
def dkdv_tile(
    dk, dv, k, v, q_source, stride_qb, stride_qh, stride_qs, g_source, stride_gb, stride_gh, stride_gs,
    lse2_base, delta_base, mask_base, stride_mm, stride_mn, slope, keys,
    place, head, q_first, start_m, start_n, q_len, k_len, shift, scale, softcap, left, right, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr,
    DROPOUT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # tiles are (queries, keys): P and dS go through shared memory to become left operands. As (keys, queries) they
    # would not, but a thread would hold lse2 and delta of 16 columns, 32 registers that the accumulators need
    start_m = tl.multiple_of(start_m, BLOCK_M)
    q_local = tl.arange(0, BLOCK_M)[:, None]
    k_local = tl.arange(0, BLOCK_N)[None, :]
    q = load_rows(q_source, place, head, q_first, start_m, q_len, stride_qb, stride_qh, stride_qs,
                  BLOCK_M, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    g = load_rows(g_source, place, head, q_first, start_m, q_len, stride_gb, stride_gh, stride_gs,
                  BLOCK_M, HEAD_DIM, BLOCK_D, TMA, WIDE, True)  # fmt: skip
    if CUT:
        live = tl.arange(0, BLOCK_M)[:, None] < q_len - start_m
        q = tl.where(live, q, 0.0)
        g = tl.where(live, g, 0.0)
    padded = start_m + tl.arange(0, BLOCK_M)
    lse2 = tl.load(lse2_base + padded)[:, None]
    delta = tl.load(delta_base + padded)[:, None]
    if DROPOUT:
        keep = keep_mask(keys, start_m, q_local, start_n, k_local, threshold)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if WANT_DK:
        dp = tl.dot(g, v.T, input_precision=PRECISION)
    if SOFTCAP != 0 or ALIBI or MASK != 0:
        scores, bend = biased_scores(
            scores, start_m, q_local, start_n, k_local, scale, softcap, slope, mask_base, stride_mm, stride_mn,
            q_len, k_len, shift, SOFTCAP, ALIBI, MASK, RAGGED, WIDE, True,
        )  # fmt: skip
        p = tl.math.exp2(scores - lse2)
    else:
        p = tl.math.exp2(scores * (scale * LOG2E) - lse2)
    if MASKED:
        # keys past the live ones are rows of their own, too
        distance = q_local + (start_m + shift - start_n)
        if CAUSAL:
            p = tl.where(k_local <= distance + right, p, 0.0)
        if WINDOW:
            p = tl.where(k_local >= distance - left, p, 0.0)
    if WANT_DV:
        kept = p
        if DROPOUT:
            kept = opaque(tl.where(keep, p, 0.0))
        dv = tl.dot(kept.to(g.dtype).T, g, dv, input_precision=PRECISION)
    if WANT_DK:
        if DROPOUT:
            dp = tl.where(keep, dp, 0.0)
        ds = p * (dp - delta)
        if SOFTCAP:
            ds = ds * bend
        dk = tl.dot(ds.to(q.dtype).T, q, dk, input_precision=PRECISION)
    return dk, dv
