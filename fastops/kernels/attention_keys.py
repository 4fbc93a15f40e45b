"""A mask of the keys alone, (B or 1, H or 1, 1, Sk), as the other kernels take it: a bias row and its range.

Padding is such a mask. That it hides nothing but keys at the end cannot be known without reading it, so it is read on
the device: bias = 0 or -inf, or the float mask times log2(e), padded with -inf; and for each batch 2 (last visible key
+ 1) + (1 where no key before that is hidden or biased). Keys past the range are then never visited, and where the last
bit is set the main loops of the other kernels take no mask.
"""

import triton
import triton.language as tl

from fastops.kernels.attention_tiles import LOG2E


@triton.jit(do_not_specialize=["H", "Sk", "Sk_pad"])
def attention_keys_kernel(
    mask_ptr, stride_mb, stride_mh, stride_mn,  # (B, H, 1, Sk) bool or float
    bias_ptr,  # (B, H, 1, Sk_pad) fp32
    range_ptr,  # (B,) int32
    H, Sk, Sk_pad,
    BOOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0)
    end = 0
    fewest = Sk
    for head in range(H):
        mask_base = mask_ptr + batch.to(tl.int64) * stride_mb + tl.cast(head, tl.int64) * stride_mh
        bias_base = bias_ptr + (batch.to(tl.int64) * H + head) * Sk_pad
        plain = 0
        for start in range(0, Sk_pad, BLOCK):
            n = start + tl.arange(0, BLOCK)
            at = mask_base + n.to(tl.int64) * stride_mn
            if BOOL:
                bias = tl.where(tl.load(at, mask=n < Sk, other=0) != 0, 0.0, float("-inf"))
            else:
                bias = tl.load(at, mask=n < Sk, other=float("-inf")).to(tl.float32) * LOG2E
            tl.store(bias_base + n, bias, mask=n < Sk_pad)
            end = tl.maximum(end, tl.max(tl.where(bias != float("-inf"), n + 1, 0), 0))
            plain += tl.sum((bias == 0.0).to(tl.int32), 0)
        fewest = tl.minimum(fewest, plain)
    tl.store(range_ptr + batch, 2 * end + (fewest == end).to(tl.int32))
