"""Dropout of attention weights: the mask as a pure function of (seed, batch and head, query, key).

Each element gets 32 uniform bits and is dropped where they are below p 2^32: exact to 2^-32 for every element. One
Philox2x32-7 call (Salmon 2011) serves 8 elements, each reading one of its two words rotated by a multiple of 8 bits; so
elements of a call are independent up to ties of the leading byte (correlation below 0.01). Philox is keyed for each
program by Philox4x32-10 of the seed, batch and head.

The counter leaves out index bits that an MMA accumulator, plain or transposed, keeps inside one thread (query bit 3,
key bits 3 and 4): the compiler sees equal calls for those elements and keeps one, without any layout conversion.
fastops.ops.attention_dropout.keep_mask computes the same mask in torch.
"""

import triton
import triton.language as tl

from fastops.kernels.attention_tiles import COMPILED


@triton.jit
def opaque(x):
    """x, by a move that LLVM cannot see through.

    Without it LLVM pushes each rotation into the last multiplications (one more set for each byte) and a select into
    the fp16 conversion (unpacked halves). The machine assembler removes the move. The interpreter knows no assembly.
    """
    if COMPILED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)
    return x


@triton.jit
def philox4x32(k0, k1, c0, c1, c2, c3, ROUNDS: tl.constexpr):
    for _ in tl.static_range(ROUNDS):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False).to(tl.uint32)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def philox2x32(key, c0, c1, ROUNDS: tl.constexpr):
    for _ in tl.static_range(ROUNDS):
        a = c0.to(tl.uint64) * 0xD256D193
        c0 = (a >> 32).to(tl.uint32) ^ c1 ^ key
        c1 = a.to(tl.uint32)
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False).to(tl.uint32)
    return c0, c1


@triton.jit
def dropout_keys(seed_ptr, batch_head):
    """Two words for one batch and head, computed once in each program."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    counter = batch_head.to(tl.uint32)
    zero = counter ^ counter
    w0, w1, _, _ = philox4x32(low, high, counter, zero, zero, zero, 10)
    return w0, w1


@triton.jit
def private(index):
    """An index below 1024 as a number of its own, the lowest 10 bits of this one.

    LLVM sees that `index & 7` is equal for elements 8 apart only where nothing else uses the index, as the columns of a
    mask do; Philox would be computed twice.
    """
    return index + 1024


@triton.jit
def keep_mask(keys, query_base, query_local, key_base, key_local, threshold):
    """True where the element is kept, which it is with probability 1 - threshold / 2^32.

    `query_local` and `key_local` are index tensors made of tl.arange alone that broadcast to the tile; the bases are
    scalars, multiples of 16 and 32. `threshold` holds the bits of an unsigned number in an int32.
    """
    k0, k1 = keys
    query_local, key_local = private(query_local), private(key_local)
    zero = (query_local + key_local) * 0
    q_group = (((query_base >> 4) << 3) + (((query_local & 1023) >> 4 << 3) | (query_local & 7)) + zero).to(tl.uint32)
    k_group = (((key_base >> 5) << 3) + (((key_local & 1023) >> 5 << 3) | (key_local & 7)) + zero).to(tl.uint32)
    w0, w1 = philox2x32(k0, q_group ^ k1, k_group, 7)
    w0, w1 = opaque(w0), opaque(w1)
    word = tl.where((key_local & 16) == 0, w0, w1)
    left = (((query_local >> 3) & 1) * 16 + ((key_local >> 3) & 1) * 8 + zero).to(tl.uint32)
    right = ((32 - left) & 31).to(tl.uint32)
    bits = (word << left) | (word >> right)
    return bits >= threshold.to(tl.uint32, bitcast=True)
