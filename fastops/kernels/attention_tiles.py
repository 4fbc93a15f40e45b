"""What the attention kernels share: where a sequence lies, loading tiles, and what changes scores before the softmax.

Shape letters: B sequences, H query heads, Hk = H / GROUP key heads, Sq queries, Sk keys, D head dim (BLOCK_D its power
of two). A `source` is a pointer, or with TMA a host tensor descriptor over (B, H, S, D).
"""

import triton
import triton.language as tl

from fastops.kernels._common import COMPILED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence(
    batch, Sq, Sk, cu_q_ptr, cu_k_ptr, query_lengths_ptr, key_lengths_ptr,
    HAS_LENGTHS: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """First query row, first key row, live queries, live keys, and the key position of query 0."""
    q_first = 0
    k_first = 0
    q_len = Sq
    k_len = Sk
    shift = 0
    if VARLEN:
        q_first = tl.load(cu_q_ptr + batch)
        k_first = tl.load(cu_k_ptr + batch)
        q_len = tl.minimum((tl.load(cu_q_ptr + batch + 1) - q_first).to(tl.int32), Sq)
        k_len = tl.minimum((tl.load(cu_k_ptr + batch + 1) - k_first).to(tl.int32), Sk)
        shift = k_len - q_len
    if HAS_LENGTHS:
        # 64-bit lengths are cut before they are narrowed
        k_len = tl.maximum(tl.minimum(tl.load(key_lengths_ptr + batch), Sk), 0).to(tl.int32)
    if HAS_QUERY_LENGTHS:
        q_len = tl.maximum(tl.minimum(tl.load(query_lengths_ptr + batch), Sq), 0).to(tl.int32)
    return q_first, k_first, q_len, k_len, shift


@triton.jit
def key_range(batch, k_len, key_range_ptr, stride_range):
    """Live keys under a key mask too, and whether it hides and biases none of them: see attention_keys."""
    code = tl.load(key_range_ptr + batch * stride_range)
    return tl.minimum(k_len, code >> 1), (code & 1) != 0


@triton.jit
def padded_row(batch, batch_head, q_first, Sq_pad, H, VARLEN: tl.constexpr):
    """Where the rows of one batch and head start in lse2 and delta, a multiple of 128.

    Dense: (B, H, Sq_pad). Packed: (H, total_q padded by 128 for each sequence), so that no two sequences share a tile.
    """
    if VARLEN:
        return (batch_head % H).to(tl.int64) * Sq_pad + (q_first + 128 * batch).to(tl.int64) // 128 * 128
    else:
        return batch_head.to(tl.int64) * Sq_pad


@triton.jit
def load_rows(
    source, batch, head, first, start, rows_end, stride_b, stride_h, stride_s,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Rows start.. of one head, (BLOCK, BLOCK_D); zeros past rows_end (TMA: past the tensor) where BOUND.

    Packed tensors have batch 0 and start at row `first`.
    """
    if TMA:
        return source.load([batch, head, tl.cast(first + start, tl.int32), 0]).reshape(BLOCK, BLOCK_D)
    else:
        # a 64-bit base and 32-bit offsets inside the tile take half the address registers
        base = source + tl.cast(batch, tl.int64) * stride_b + head.to(tl.int64) * stride_h
        base += (tl.cast(first, tl.int64) + start) * stride_s
        local = tl.arange(0, BLOCK)[:, None]
        columns = tl.arange(0, BLOCK_D)[None, :]
        if WIDE:
            pointers = base + local.to(tl.int64) * stride_s + columns
        else:
            pointers = base + local * stride_s + columns
        if BOUND and HEAD_DIM != BLOCK_D:
            return tl.load(pointers, mask=(local < rows_end - start) & (columns < HEAD_DIM), other=0.0)
        elif BOUND:
            return tl.load(pointers, mask=local < rows_end - start, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            return tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_rows(
    target_ptr, tile, batch, head, first, start, rows_end, stride_b, stride_h, stride_s,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    base = target_ptr + tl.cast(batch, tl.int64) * stride_b + head.to(tl.int64) * stride_h
    base += (tl.cast(first, tl.int64) + start) * stride_s
    local = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    live = local < rows_end - start
    if HEAD_DIM != BLOCK_D:
        live = live & (columns < HEAD_DIM)
    tl.store(base + local.to(tl.int64) * stride_s + columns, tile.to(target_ptr.dtype.element_ty), mask=live)


@triton.jit
def visible_tile(
    rows, columns, k_len, shift, left, right,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """True where query `rows` sees key `columns` (index tensors that broadcast to the tile)."""
    if CAUSAL:
        visible = columns < tl.minimum(k_len, rows + (shift + right + 1))
    else:
        visible = columns < k_len + rows * 0
    if WINDOW:
        visible = visible & (columns >= rows + (shift - left))
    return visible


@triton.jit
def softcapped(x, PRECISE: tl.constexpr):
    """Tanh of fp32 to 1e-7; PRECISE: relative to the result also near 0, where 1 - 2 / (1 + exp 2x) cancels."""
    if PRECISE:
        square = x * x
        small = x * (
            1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869489)))
        )
        return tl.where(square < 0.0625, small, 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E))))
    else:
        return 1.0 - 2.0 * reciprocal(1.0 + tl.math.exp2(x * (2.0 * LOG2E)))


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, to 1 ulp; the quotient of the language handles subnormals, which x is not."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def biased_scores(
    scores, start_m, q_local, start_n, k_local, scale, softcap, slope, mask_base, stride_mm, stride_mn,
    q_len, k_len, shift,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, RAGGED: tl.constexpr,
    WIDE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Raw scores to biased ones times log2(e), and the derivative of the softcap.

    SOFTCAP: 0 none, 1 for 16-bit inputs, 2 precise. MASK: 0 none, 1 bool, 2 float, 3 and 4 one fp32 row for all queries
    (4: of 0 and -inf alone), times log2(e) and readable up to a multiple of the tile. RAGGED: Sk is no multiple of
    the tile. EDGE: keys of the tile may be past k_len; what such elements get is not used.
    """
    bend = scores
    if SOFTCAP:
        t = softcapped(scores * (scale / softcap), SOFTCAP == 2)
        bend = 1.0 - t * t
        scores = t * (softcap * LOG2E)
    else:
        scores = scores * (scale * LOG2E)
    if ALIBI:
        distance = (start_m + shift + q_local).to(tl.float32) - (start_n + k_local).to(tl.float32)
        scores = scores - (slope * LOG2E) * tl.abs(distance)
    if MASK >= 3:
        scores = scores + tl.load(mask_base + start_n + k_local)
    elif MASK:
        # rows past the end read the last one again; columns past it, which only RAGGED masks have, nothing
        at = mask_base + tl.cast(start_n, tl.int64) * stride_mn + tl.cast(start_m, tl.int64) * stride_mm
        rows = tl.minimum(q_local, tl.maximum(q_len - 1 - start_m, 0))
        if WIDE:
            at = at + rows.to(tl.int64) * stride_mm + k_local.to(tl.int64) * stride_mn
        else:
            at = at + rows * stride_mm + k_local * stride_mn
        if EDGE and RAGGED:
            read = tl.load(at, mask=k_local < k_len - start_n, other=0)
        else:
            read = tl.load(at)
        if MASK == 1:
            scores = tl.where(read != 0, scores, float("-inf"))
        else:
            scores = scores + read.to(tl.float32) * LOG2E
    return scores, bend
