"""What attention's functionals make of their arguments, and which keys a query may see, by brute force; no kernel."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from fastops.ops import attention_arguments as arguments
from fastops.ops.attention_reference import Options, alibi_bias, past, visible_keys

CPU = torch.device("cpu")


def random(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize(
    ("query", "key", "value", "gqa", "kv_heads"),
    [
        ((2, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 5), False, 4),
        ((2, 4, 3, 5), (2, 1, 6, 5), (2, 1, 6, 5), False, 1),
        ((2, 4, 3, 5), (2, 4, 6, 5), (2, 1, 6, 5), False, 4),
        ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 5), True, 2),
        ((2, 4, 3, 5), (2, 2, 6, 5), (2, 4, 6, 5), True, 4),
        ((2, 4, 3, 5), (2, 2, 6, 5), (2, 1, 6, 5), True, 2),
        ((2, 1, 3, 5), (2, 4, 6, 5), (2, 4, 6, 5), False, 4),
        ((2, 6, 3, 5), (2, 2, 6, 5), (2, 3, 6, 5), True, 6),
        ((6, 3, 5), (2, 6, 5), (3, 6, 5), True, 6),
        ((6, 3, 5), (2, 1, 5), (3, 1, 5), True, 6),
        ((3, 5), (6, 5), (6, 5), False, 1),
        ((4, 3, 5), (6, 5), (6, 5), False, 1),
        ((4, 3, 5), (4, 6, 5), (4, 6, 5), False, 4),
        ((7, 1, 4, 3, 5), (2, 4, 6, 5), (1, 2, 4, 6, 5), False, 4),
        ((1, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 5), False, 4),
    ],
)
def test_four_dimensions_mean_the_same(query, key, value, gqa, kv_heads):
    given = random(*query), random(*key), random(*value)
    batch = torch.broadcast_shapes(query[:-3], key[:-3], value[:-3])
    heads = arguments.heads_of(*given)
    assert heads == max(shape[-3] if len(shape) > 2 else 1 for shape in (query, key, value))
    made = arguments.four_dimensional(*given, batch, gqa)
    rows = torch.Size(batch).numel()
    assert [x.shape[:2] for x in made] == [(rows, heads), (rows, kv_heads), (rows, kv_heads)]
    found = F.scaled_dot_product_attention(*made, enable_gqa=kv_heads not in (1, heads))
    # every head of every row by itself, as broadcasting and groups of heads are defined
    for place in product(*map(range, batch)):
        for head in range(heads):
            one = []
            for x in given:
                leading = tuple(
                    p if n > 1 else 0 for p, n in zip(place[len(place) - (x.dim() - 3) :], x.shape, strict=False)
                )
                x = x[leading] if x.dim() > 3 else x
                one.append(x[head * x.shape[0] // heads] if x.dim() > 2 else x)
            row = sum(p * torch.Size(batch[i + 1 :]).numel() for i, p in enumerate(place))
            expected = F.scaled_dot_product_attention(*(x[None] for x in one))[0]
            torch.testing.assert_close(found[row, head], expected)


def test_one_leading_dimension_is_not_copied():
    x = random(2, 4, 3, 5)
    assert all(y.data_ptr() == x.data_ptr() for y in arguments.four_dimensional(x, x, x, (2,), False))
    for one_head in (random(2, 1, 3, 5), random(2, 1, 1, 5), random(1, 3, 5)):
        found = arguments.four_dimensional(one_head, x, x, (2,), False)[0]
        assert found.stride(1) == 0
        assert found.data_ptr() == one_head.data_ptr()


@pytest.mark.parametrize("shape", [(3, 6), (4, 3, 6), (2, 4, 3, 6), (1, 1, 1, 6), (2, 1, 1, 6), (1,), (6,)])
def test_masks_keep_what_they_broadcast_over(shape):
    mask = arguments.mask_of(random(*shape), (2,))
    assert mask.shape == (1,) * (4 - len(shape)) + shape
    torch.testing.assert_close(mask.expand(2, 4, 3, 6), random(*shape).expand(2, 4, 3, 6))


@pytest.mark.parametrize("shape", [(7, 2, 4, 3, 6), (7, 1, 4, 3, 6), (2, 1, 3, 6), (1, 1, 4, 3, 6), (3, 6)])
def test_masks_of_several_leading_dimensions(shape):
    mask = arguments.mask_of(random(*shape), (7, 2))
    assert mask.dim() == 4
    assert mask.shape[0] == (1 if all(n == 1 for n in shape[:-3]) else 14)
    torch.testing.assert_close(mask.expand(14, 4, 3, 6), random(*shape).expand(7, 2, 4, 3, 6).flatten(0, 1))


def test_a_mask_without_leading_dimensions():
    assert arguments.mask_of(random(3, 6), ()).shape == (1, 1, 3, 6)
    assert arguments.mask_of(random(4, 3, 6), ()).shape == (1, 4, 3, 6)


def test_no_mask_lengths_or_slopes():
    assert arguments.mask_of(None, (2,)) is None
    assert arguments.lengths_of(None) is None
    assert arguments.slopes_of(None, 4) is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_lengths_become_one_dense_row(dtype):
    lengths = torch.tensor([[1, 9, 2], [3, 9, 4]], dtype=dtype)[:, ::2]
    found = arguments.lengths_of(lengths)
    assert found.tolist() == [1, 2, 3, 4]
    assert found.is_contiguous()
    assert found.dtype == (dtype if dtype == torch.int64 else torch.int32)


def test_slopes_become_rows_without_gradient():
    slopes = random(2, 3, 4).requires_grad_()
    found = arguments.slopes_of(slopes, 4)
    assert not found.requires_grad
    torch.testing.assert_close(found, slopes.detach().reshape(6, 4))


def test_casts_of_autocast():
    query, double, mask = random(2, 3), random(2, 3).double(), torch.ones(2, 3, dtype=torch.bool)
    assert arguments.autocast(query, query, double, mask) == (query, query, double, mask)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [x.dtype for x in arguments.autocast(query, query, double, query)]
        assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float64, torch.bfloat16]
        *_, same = arguments.autocast(query, query, query, mask)
        assert same is mask
        assert arguments.autocast(query, query, query, None)[3] is None
        on_meta = query.to("meta")  # autocast does not know this device
        assert arguments.autocast(on_meta, on_meta, on_meta, None) == (on_meta, on_meta, on_meta, None)


@pytest.mark.parametrize("shift", [0, 2, -1])
@pytest.mark.parametrize("lengths", [(None, None), ([4, 0], None), (None, [3, 1]), ([2, 5], [0, 2])])
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (0, -1), (-1, 0), (2, -1), (-1, 1), (1, 0), (0, 0)])
def test_visible_keys(left, right, lengths, shift):
    q_len, k_len = 3, 5
    keys, rows = (None if n is None else torch.tensor(n) for n in lengths)
    found = visible_keys(q_len, k_len, CPU, Options(1.0, left=left, right=right), keys, rows, shift)
    if left < 0 and right < 0 and keys is None and rows is None:
        assert found is None
        return
    found = found.expand(2, 1, q_len, k_len)
    for b, i, j in product(range(2), range(q_len), range(k_len)):
        sees = (left < 0 or j >= i + shift - left) and (right < 0 or j <= i + shift + right)
        sees = sees and (keys is None or j < keys[b]) and (rows is None or i < rows[b])
        assert found[b, 0, i, j].item() == bool(sees), (b, i, j)


def test_no_shift_where_none_is_given():
    causal = visible_keys(3, 3, CPU, Options(1.0, right=0))
    assert torch.equal(causal, torch.ones(3, 3, dtype=torch.bool).tril())
    assert not alibi_bias(torch.ones(1), 3, 3).diagonal(0, -2, -1).any()


def test_positions_past_a_length():
    assert past(torch.tensor([[0], [2]]), 3).tolist() == [[[True, True, True]], [[False, False, True]]]


@pytest.mark.parametrize("shift", [0, 3])
def test_alibi(shift):
    slopes = torch.tensor([[0.5, 2.0]])
    found = alibi_bias(slopes, 2, 4, shift)
    assert found.shape == (1, 2, 2, 4)
    for head, i, j in product(range(2), range(2), range(4)):
        assert found[0, head, i, j] == -slopes[0, head] * abs(i + shift - j)
