"""Modules that subclass torch.nn and override only forward: same constructor, same state_dict."""

from fastops.nn.attention import MultiheadAttention
from fastops.nn.conv import Conv2dReLU, Conv2dReLUMaxPool2d
from fastops.nn.rnn import GRU, LSTM, RNN
from fastops.nn.rnn_cell import GRUCell, LSTMCell, RNNCell
from fastops.nn.rnn_layer_norm import LayerNormLSTM
from fastops.nn.sequential import FusedReLU, Sequential
from fastops.nn.transformer import TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv2dReLU",
    "Conv2dReLUMaxPool2d",
    "FusedReLU",
    "GRUCell",
    "LSTMCell",
    "LayerNormLSTM",
    "MultiheadAttention",
    "RNNCell",
    "Sequential",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
