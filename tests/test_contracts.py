"""Every public op and module against every contract of PyTorch: a cell of the table runs, or says why it does not.

The kernels run (`impl="triton"`), in the interpreter where there is no GPU.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastops
from fastops import _library
from tests.conftest import GPU
from tests.contract_subjects import SUBJECTS
from tests.rule import assert_within_rule

CONTRACTS = {}
REASONS = {}  # (contract, subject) -> why the cell does not run


def contract(check):
    CONTRACTS[check.__name__] = check
    return check


def parts(result):
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in parts(part)]


def loss(result):
    return sum(x.double().square().sum() for x in parts(result))


def leaves(call, given):
    return [*given, *(call.parameters() if isinstance(call, nn.Module) else ())]


def run(call, given, function=None):
    """Results, then gradients of inputs and parameters."""
    results = parts((call if function is None else function)(*given))
    return [x.detach() for x in results] + list(torch.autograd.grad(loss(results), leaves(call, given)))


def same(found, expected):
    assert len(found) == len(expected)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours, theirs, msg=lambda m, index=index: f"result {index}: {m}")


def within_rule(found, stock, truth):
    """The rule over all results of a call together, each against its own largest value: they are small, and a few
    numbers that stock has right by luck say nothing."""

    def joined(results):
        scales = (t.double().abs().max().clamp(min=1e-30) for t in truth)
        return torch.cat([(x.double() / scale).flatten() for x, scale in zip(results, scales, strict=True)])

    assert [x.dtype for x in found] == [x.dtype for x in stock]
    dtype = found[0].dtype
    assert_within_rule(joined(found).to(dtype), joined(stock).to(dtype), joined(truth))


def bitwise(found, expected):
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@contract
def opcheck(make, device):
    call, given = make(device, "triton")
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs
    seen = {}
    launchers = dict(_library.LAUNCHERS)

    def recorded(name, launcher):
        def launch(*arguments):
            seen.setdefault(name, arguments)
            return launcher()(*arguments)

        return lambda: launch

    _library.LAUNCHERS.update({name: recorded(name, launcher) for name, launcher in launchers.items()})
    try:
        run(call, given)
    finally:
        _library.LAUNCHERS.update(launchers)
    assert seen
    for name, arguments in seen.items():
        operator = getattr(torch.ops.fastops, name).default
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, arguments)
        results = torch.library.opcheck(operator, detached, test_utils=checks)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def compiled(dynamic):
    def check(make, device):
        call, given = make(device, "triton")
        torch.compiler.reset()
        function = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        same(run(call, given, function), run(call, given))

    return check


CONTRACTS["compile_static"] = compiled(False)
CONTRACTS["compile_dynamic"] = compiled(True)


def compiled_without_gradients(impl):
    """As a trained model runs."""

    def check(make, device):
        call, given = make(device, impl)
        torch.compiler.reset()
        function = torch.compile(call, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            same(parts(function(*given)), parts(call(*given)))

    return check


CONTRACTS["compile_without_gradients"] = compiled_without_gradients("triton")
CONTRACTS["compile_auto_without_gradients"] = compiled_without_gradients("auto")


@contract
def batched_gradients(make, device):
    """torch.autograd.functional.jacobian(vectorize=True): one backward pass for many gradients of the output."""
    call, given = make(device, "triton")
    output = parts(call(*given))[0]
    several = torch.stack([torch.randn_like(output) for _ in range(3)])
    wanted = leaves(call, given)
    options = {"retain_graph": True, "allow_unused": True}
    together = torch.autograd.grad(output, wanted, several, is_grads_batched=True, **options)
    for index, each in enumerate(several):
        for found, expected in zip(together, torch.autograd.grad(output, wanted, each, **options), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-5)


def autocast(dtype):
    def check(make, device):
        ours, given = make(device, "triton")
        stock, others = make(device, "torch")
        exact, doubles = make(device, "torch", torch.float64)
        with torch.autocast(device.type, dtype):
            found = run(ours, given)
            expected = run(stock, others)
        within_rule(found, expected, run(exact, doubles))

    return check


CONTRACTS["autocast_fp16"] = autocast(torch.float16)
CONTRACTS["autocast_bf16"] = autocast(torch.bfloat16)


def checkpoint(reentrant):
    def check(make, device):
        call, given = make(device, "triton")

        def flat(*inputs):  # the reentrant kind loses what is inside an inner tuple, of stock PyTorch too
            return tuple(parts(call(*inputs)))

        def again(*inputs):
            return torch.utils.checkpoint.checkpoint(flat, *inputs, use_reentrant=reentrant)

        if reentrant:  # torch.autograd.grad is not for this kind
            loss(again(*given)).backward()
            same([x.grad for x in leaves(call, given)], run(call, given)[-len(leaves(call, given)) :])
        else:
            bitwise(run(call, given, again), run(call, given))

    return check


CONTRACTS["checkpoint"] = checkpoint(False)
CONTRACTS["checkpoint_reentrant"] = checkpoint(True)


@contract
def export(make, device):
    call, given = make(device, "triton")

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = call if isinstance(call, nn.Module) else nn.Identity()

        def forward(self, *inputs):
            return call(*inputs)

    inputs = tuple(x.detach() for x in given)
    with torch.no_grad():
        program = torch.export.export(Program(), inputs, strict=False).module()
        same(parts(program(*inputs)), parts(call(*inputs)))


@contract
def functional_grad(make, device):
    call, given = make(device, "triton")
    first, *rest = (x.detach() for x in given)
    found = torch.func.grad(lambda x: loss(call(x, *rest)))(first)
    torch.testing.assert_close(found, torch.autograd.grad(loss(call(*given)), given[0])[0], rtol=1e-4, atol=1e-6)


@contract
def gradgradcheck(make, device):
    """float64, which "auto" gives to stock PyTorch."""
    call, given = make(device, "auto", torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # the only stock attention with second derivatives
        assert torch.autograd.gradcheck(lambda *x: parts(call(*x))[0], given, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *x: parts(call(*x))[0], given, fast_mode=True)


@contract
def double_backward(make, device):
    """Of the kernels in fp32, where a lost term would show."""

    def second(impl, dtype):
        call, given = make(device, impl, dtype)
        with sdpa_kernel(SDPBackend.MATH):
            total = sum(x.pow(3).sum() for x in parts(call(*given)))
            firsts = torch.autograd.grad(total, given, create_graph=True)
            ends = sum(x.square().sum() for x in firsts)
            found = torch.autograd.grad(ends, leaves(call, given), allow_unused=True, materialize_grads=True)
            # joined: the bias of the keys has no gradient but rounding
            return torch.cat([x.flatten() for x in found])

    truth = second("torch", torch.float64)
    torch.testing.assert_close(
        second("triton", torch.float32).double(), truth, rtol=0, atol=1e-4 * float(truth.abs().max())
    )


@contract
def bitwise_repeat(make, device):
    call, given = make(device, "triton")
    bitwise(run(call, given), run(call, given))


@contract
def inference_mode(make, device):
    call, given = make(device, "triton")
    with torch.inference_mode():
        found = parts(call(*given))
    bitwise(found, [x.detach() for x in parts(call(*given))])
    assert all(x.is_inference() for x in found)


@contract
def deterministic_algorithms(make, device):
    call, given = make(device, "triton")
    expected = run(call, given)
    torch.use_deterministic_algorithms(True)  # conftest only warns; here an op without a promise would raise
    bitwise(run(call, given), expected)


def strides(x):
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@contract
def fake_tensors(make, device):
    call, given = make(device, "triton")
    expected = parts(call(*given))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = parts(call(*(mode.from_tensor(x.detach()) for x in given)))
    for fake, real in zip(found, expected, strict=True):
        assert (fake.shape, fake.dtype, strides(fake)) == (real.shape, real.dtype, strides(real))


@contract
def meta_tensors(make, device):
    meta = torch.device("meta")
    call, given = make(meta, "auto")
    real, inputs = make(device, "torch")
    for ours, theirs in zip(parts(call(*given)), parts(real(*inputs)), strict=True):
        assert (ours.device.type, ours.shape, ours.dtype) == ("meta", theirs.shape, theirs.dtype)
    named, given = make(meta, "triton")
    with pytest.raises(fastops.KernelUnavailable, match="meta"):
        named(*given)


@contract
def copies(make, device):
    call, given = make(device, "triton")
    expected = run(call, given)
    file = io.BytesIO()
    torch.save(call, file)
    file.seek(0)
    for other in (copy.deepcopy(call), pickle.loads(pickle.dumps(call)), torch.load(file, weights_only=False)):
        assert repr(other) == repr(call)
        bitwise(run(other, given), expected)


@contract
def two_threads(make, device):
    """The same module in two threads at once, forward and backward, with results of its own for each."""
    call, given = make(device, "triton")
    inputs = [given, [(2 * x).detach().requires_grad_() for x in given]]
    expected = [run(call, each) for each in inputs]
    found: list[list] = [[], []]
    start = threading.Barrier(2)
    cores = torch.get_num_threads()

    def work(index):
        torch.set_num_threads(cores)  # is a thread's own, and changes the order of sums in PyTorch's convolution
        start.wait(30)
        found[index] = [run(call, inputs[index]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, alone in zip(found, expected, strict=True):
        assert len(ours) == 2
        for each in ours:
            bitwise(each, alone)


@contract
def cuda_graph(make, device):
    call, given = make(device, "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(call, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, given)
    with torch.no_grad():
        given[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    bitwise(captured, run(call, given))


@contract
def other_stream(make, device):
    call, given = make(device, "triton")
    expected = run(call, given)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what ran on the default stream would be early
        with torch.no_grad():
            given[0].mul_(2)
        later = run(call, given)
        with torch.no_grad():
            given[0].div_(2)
        again = run(call, given)
    stream.synchronize()
    assert not torch.equal(later[0], expected[0])
    bitwise(again, expected)


@contract
def other_device(make, device):
    call, given = make(torch.device("cuda", 1), "triton")
    assert torch.cuda.current_device() == 0
    found = run(call, given)
    assert torch.cuda.current_device() == 0
    bitwise([x.cpu() for x in found], [x.cpu() for x in run(*make(torch.device("cuda", 0), "triton"))])


ON_GPU = {"cuda_graph", "other_stream", "other_device"}
FUNCTIONS = [name for name, subject in SUBJECTS.items() if not subject.is_module]
MODULES = [name for name, subject in SUBJECTS.items() if subject.is_module]

for name in FUNCTIONS:
    REASONS["copies", name] = "a function has no state"
for name in MODULES:
    REASONS["opcheck", name] = "its ops are checked with the function of the same op"
for name in ("LSTM", "GRU", "RNN", "LayerNormLSTM"):
    del REASONS["opcheck", name]  # these have no public function
for contract_name in ("meta_tensors", "compile_auto_without_gradients"):
    REASONS[contract_name, "varlen_attention"] = "without the kernels the offsets are read on the host"
if not GPU:
    for dtype in ("fp16", "bf16"):
        for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "LSTMCell", "GRUCell", "RNNCell"):
            REASONS[f"autocast_{dtype}", name] = "torch casts its cells under CUDA autocast only"
    REASONS["autocast_fp16", "GRU"] = REASONS["autocast_fp16", "RNN"] = "CPU autocast leaves stock PyTorch's in fp32"
    REASONS["autocast_fp16", "LSTM"] = "stock PyTorch has no fp16 LSTM to compare with on this CPU"
    for name in SUBJECTS:
        REASONS.setdefault(("autocast_bf16", name), "Triton's interpreter computes bf16 wrongly")


# public, and no subject
NO_OP = {
    "KernelUnavailable": "an exception",
    "accelerate": "changes classes of modules, which are subjects; tests/test_accelerate.py",
    "accelerated": "accelerate, undone",
    "explain": "says what accelerate would do",
    "restore": "undoes accelerate",
    "profile": "measures a call, and gives what it gives",
    "FusedReLU": "gives back its input: the convolution before it has done its work",
}


def test_everything_public_is_a_subject_or_says_why_not():
    public = {(m, name) for m in (fastops, fastops.nn) for name in m.__all__ if callable(getattr(m, name))}
    names = sorted(name for _, name in public)
    assert names == sorted([*SUBJECTS, *NO_OP])
    for module, name in public:
        assert name in NO_OP or SUBJECTS[name].is_module == (module is fastops.nn), name


def cells():
    assert REASONS.keys() <= {(contract, name) for contract in CONTRACTS for name in SUBJECTS}
    for contract_name, check in CONTRACTS.items():
        for name in SUBJECTS:
            marks = [pytest.mark.gpu] if contract_name in ON_GPU else []
            dear = contract_name in ("compile_static", "export") and name in MODULES
            if dear or contract_name == "compile_dynamic":
                marks.append(pytest.mark.slow)  # the tests of the op compile too
            if contract_name == "other_device" and torch.cuda.device_count() < 2:
                marks.append(pytest.mark.skip(reason="needs two GPUs"))
            if (contract_name, name) in REASONS:
                marks.append(pytest.mark.skip(reason=REASONS[contract_name, name]))
            yield pytest.param(check, name, id=f"{contract_name}-{name}", marks=marks)


@pytest.mark.parametrize(("check", "name"), list(cells()))
def test_contract(check, name, device):
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        check(SUBJECTS[name].make, device)


QUICK = ["Conv2dReLU", "LSTM", "MultiheadAttention"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param([n for n in MODULES if n not in QUICK], id="rest", marks=pytest.mark.slow),
    ],
)
def test_ddp_and_fsdp2_on_two_processes(names):
    """One start of two processes for many cells of the table: it is what costs."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.two_processes", *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert set(errors) == {f"{kind} {name}" for kind in ("ddp", "fsdp2") for name in names}
    assert not any(errors.values()), "\n".join(f"{cell}: {error}" for cell, error in errors.items() if error)
