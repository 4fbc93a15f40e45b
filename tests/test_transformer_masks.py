"""Which masks nn.TransformerEncoder takes for the causal one: what it leaves out then must change nothing."""

import pytest
import torch
from torch import nn

from fastops.nn import TransformerEncoder, TransformerEncoderLayer
from fastops.nn.transformer import holds_causal


def causal(*shape):
    return torch.ones(shape, dtype=torch.bool).triu(1)


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


MASKS = {
    "causal": (causal(4, 4), True),
    "one position": (causal(1, 1), True),
    "no position": (causal(0, 0), True),
    "a row more": (causal(5, 4), False),
    "a column more": (causal(4, 5), False),
    "one for each head": (causal(4, 4, 4), False),
    "anticausal": (causal(4, 4).mT, False),
    "all hidden but the diagonal": (~torch.eye(4, dtype=torch.bool), False),
    "nothing hidden": (torch.zeros(4, 4, dtype=torch.bool), False),
    "strictly earlier keys": (torch.ones(4, 4, dtype=torch.bool).triu(0), False),
    "the next key as well": (torch.ones(4, 4, dtype=torch.bool).triu(2), False),
}


@pytest.mark.parametrize(("mask", "expected"), MASKS.values(), ids=MASKS)
def test_which_masks_are_causal(mask, expected):
    assert holds_causal(mask) is expected
    assert holds_causal(as_float(mask)) is expected


def test_a_bias_is_not_causal():
    mask = as_float(causal(4, 4))
    mask[3, 1] = 0.5
    assert holds_causal(mask) is False
    assert holds_causal(as_float(causal(4, 4)).nan_to_num(neginf=-1e9)) is False


@pytest.mark.parametrize("mask", [MASKS[name][0] for name in ("causal", "anticausal", "nothing hidden")])
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("is_causal", [None, False])
def test_the_encoder_computes_what_torch_does(mask, floating, is_causal):
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoder(layer, 1)
    mine = TransformerEncoder(TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), 1)
    mine.load_state_dict(stock.state_dict())
    x = torch.randn(2, 4, 8)
    mask = as_float(mask) if floating else mask
    torch.testing.assert_close(
        mine(x, mask=mask, is_causal=is_causal), stock(x, mask=mask, is_causal=is_causal), equal_nan=True
    )
