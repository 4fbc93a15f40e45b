"""fastops: Triton kernels for PyTorch, and the tools that prove them.

Importing it imports neither triton nor CUDA. See README.md for what it offers and for how its numbers are measured.
"""

from fastops import nn
from fastops._accelerate import accelerate, accelerated, explain, restore
from fastops._env import KernelUnavailable
from fastops.ops.attention import scaled_dot_product_attention, varlen_attention
from fastops.ops.conv2d_relu import conv2d_relu, conv2d_relu_max_pool2d
from fastops.ops.rnn_cell import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from fastops.profiling import profile

__version__ = "0.1.0"

__all__ = [
    "KernelUnavailable",
    "__version__",
    "accelerate",
    "accelerated",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "explain",
    "gru_cell",
    "lstm_cell",
    "nn",
    "profile",
    "restore",
    "rnn_relu_cell",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "varlen_attention",
]
