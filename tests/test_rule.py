"""The rule itself: what it lets pass, and which arithmetic its eps is of."""

from types import SimpleNamespace

import pytest
import torch

from bench import gate
from bench.case import Case
from tests.rule import TF32_EPS, assert_within_rule, rounding

ON_GPU = SimpleNamespace(is_cuda=True, dtype=torch.float32)
STRICT = torch.finfo(torch.float32).eps


def test_twice_the_error_of_stock_and_one_rounding():
    truth = torch.tensor([4.0, -1.0, 0.0], dtype=torch.float64)
    stock = truth.float() + torch.tensor([0.0, 1e-3, 0.0])
    for error, right in ((1.9e-3, True), (2.1e-3, False)):
        ours = truth.float() + torch.tensor([0.0, 0.0, error])
        if right:
            assert_within_rule(ours, stock, truth)
        else:
            with pytest.raises(AssertionError, match="allowed"):
                assert_within_rule(ours, stock, truth)
    assert_within_rule(truth.float() * (1 + STRICT), truth.float(), truth)  # stock without an error
    with pytest.raises(AssertionError, match="allowed"):
        assert_within_rule(truth.float() * (1 + 2 * STRICT), truth.float(), truth)


def test_nan_and_inf_must_lie_where_stock_has_them():
    truth = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    assert_within_rule(truth.float(), truth.float(), truth)
    for index, value in ((0, torch.nan), (1, 1.0), (2, -torch.inf), (0, torch.inf)):
        ours = truth.float()
        ours[index] = value
        with pytest.raises(AssertionError, match=r"NaN|Inf"):
            assert_within_rule(ours, truth.float(), truth)


@pytest.mark.parametrize(
    ("test", "op"),
    [
        ("tests/test_conv2d.py::test_numbers[case0]", "conv"),
        ("tests/test_contracts.py::test_contract[eager-conv2d_relu]", "conv"),
        ("tests/test_rnn_gpu.py::test_against_stock[LSTM]", "rnn"),
        ("tests/test_contracts.py::test_contract[eager-LSTM]", "rnn"),
        ("tests/test_rnn_cell.py::test_numbers_and_gradients_on_gpu", "matmul"),
        ("tests/test_contracts.py::test_contract[eager-LSTMCell]", "matmul"),
        ("tests/test_contracts.py::test_contract[eager-LayerNormLSTM]", "matmul"),
        ("tests/test_layer_norm_lstm.py::test_on_gpu", "matmul"),
        ("tests/test_attention_gpu.py::test_numbers", "matmul"),
    ],
)
def test_fp32_may_be_rounded_to_tf32_where_torch_allows_it_for_the_op(test, op, monkeypatch, fp32_precision):
    switches = {
        "conv": torch.backends.cudnn.conv,
        "rnn": torch.backends.cudnn.rnn,
        "matmul": torch.backends.cuda.matmul,
    }
    for switch in switches.values():
        fp32_precision(switch, "ieee")
    monkeypatch.setenv("PYTEST_CURRENT_TEST", test)
    assert rounding(ON_GPU) == STRICT
    fp32_precision(switches[op], "tf32")
    assert rounding(ON_GPU) == TF32_EPS == 2**-10
    assert rounding(torch.zeros(1)) == STRICT
    assert rounding(SimpleNamespace(is_cuda=True, dtype=torch.float16)) == torch.finfo(torch.float16).eps
    fp32_precision(switches[op], "ieee")
    others = [switch for name, switch in switches.items() if name != op]
    for switch in others:
        fp32_precision(switch, "tf32")
    assert rounding(ON_GPU) == STRICT


@pytest.mark.parametrize(
    ("op", "kind", "switch"),
    [
        ("conv2d_relu", "", "conv"),
        ("rnn", "lstm", "rnn"),
        ("rnn", "layernorm_lstm", "matmul"),
        ("attention", "", "matmul"),
    ],
)
def test_the_benchmark_allows_the_same(op, kind, switch, fp32_precision):
    switches = {
        "conv": torch.backends.cudnn.conv,
        "rnn": torch.backends.cudnn.rnn,
        "matmul": torch.backends.cuda.matmul,
    }
    case = Case(op, "one", "fp32", "infer", {"kind": kind})
    half = Case(op, "one", "bf16", "infer", {"kind": kind})
    for name, each in switches.items():
        fp32_precision(each, "tf32" if name == switch else "ieee")
    assert gate.eps_of(case, torch.device("cuda")) == gate.TF32_EPS == TF32_EPS
    assert gate.eps_of(case, torch.device("cpu")) == STRICT
    assert gate.eps_of(half, torch.device("cuda")) == torch.finfo(torch.bfloat16).eps
    fp32_precision(switches[switch], "ieee")
    assert gate.eps_of(case, torch.device("cuda")) == STRICT


def test_the_gate_allows_the_eps_of_its_exam():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    for eps, found in ((TF32_EPS, None), (None, "relative error")):
        exam = gate.Exam([{}], [(truth,)], torch.float32, eps=eps, stock=[[gate.Error(0.0, 0.0, 0)]])
        reason = exam.grade(0, ((truth * (1 + TF32_EPS / 2)).float(),))
        assert (reason is None) if found is None else found in reason
