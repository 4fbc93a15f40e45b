"""Per op: FLOP and byte formulas, inputs, float64 truth, and every way to compute it."""

from __future__ import annotations

import importlib

from bench.case import Workload

# op -> "module:object"; imported when a case of that op is run
TABLE = {
    "conv2d_relu": "bench.workloads.conv:CONV",
    "conv2d_relu_max_pool2d": "bench.workloads.conv:CONV_POOL",
    "alexnet": "bench.workloads.models:ALEXNET",
    "bert": "bench.workloads.models:BERT",
    "lstm_model": "bench.workloads.models:BYTE_LSTM",
    "attention": "bench.workloads.attention:ATTENTION",
    "varlen_attention": "bench.workloads.attention:VARLEN",
    "rnn": "bench.workloads.rnn:RNN",
    "rnn_cell": "bench.workloads.rnn_cell:CELL",
}


def workload(op: str) -> Workload:
    """The workload of an op."""
    module, _, name = TABLE[op].partition(":")
    found: Workload = getattr(importlib.import_module(module), name)
    return found
