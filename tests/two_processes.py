"""`python -m tests.two_processes SUBJECT...`: modules of the contracts under DDP and FSDP2, on two gloo processes.

One process that forks once torch is imported, on the CPU, with the kernels interpreted, or stock PyTorch where there is
no Triton. Prints one JSON object:
{"ddp LSTM": null, "fsdp2 GRU": "what went wrong", ...}, of the first process that has something to say.
"""

import json
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # before torch and triton are imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastops import _env, _library
from tests.contract_subjects import SUBJECTS

ENGINE = "triton" if _env.TRITON_INSTALLED else "auto"
WORLD = 2
STEPS = 2  # the second sees the parameters that the first has changed
RATE = 0.1
PATIENCE = timedelta(seconds=60)


def parts(result):
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in parts(part)]


def ddp(module):
    return DistributedDataParallel(module)


def fsdp2(module):
    for part in module.children():
        for each in part if isinstance(part, nn.ModuleList) else [part]:
            if any(True for _ in each.parameters()):
                fully_shard(each)
    fully_shard(module)
    assert isinstance(module, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return module


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}


def forward_backward(module, inputs):
    """Results and gradients of the inputs; those of the parameters are on the parameters."""
    results = parts(module(*inputs))
    sum(x.double().square().sum() for x in results).backward()
    return [x.detach() for x in results] + [x.grad for x in inputs]


def descend(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= RATE * parameter.grad
            parameter.grad = None


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(found, expected, what):
    assert len(found) == len(expected)
    for index, (ours, alone) in enumerate(zip(found, expected, strict=True)):
        assert (ours.shape, ours.dtype) == (alone.shape, alone.dtype)
        torch.testing.assert_close(ours, alone, msg=lambda m, index=index: f"{what} {index}: {m}")


def alone(module, inputs):
    """What the module does without a wrapper in each step, with the mean of both processes' gradients."""
    steps = []
    for _ in range(STEPS):
        found = forward_backward(module, inputs())
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD
        steps.append((found, [parameter.grad for parameter in module.parameters()]))
        descend(module)
    return steps, list(module.state_dict().values())


def check(module, inputs, expected):
    """The wrapped module takes the same steps."""
    steps, state = expected
    for step, (results, gradients) in enumerate(steps):
        same(forward_backward(module, inputs()), results, f"step {step}, result or gradient of an input")
        found = [whole(parameter.grad) for parameter in module.parameters()]
        same(found, gradients, f"step {step}, gradient of a parameter")
        descend(module)
    same([whole(x) for x in module.state_dict().values()], state, "state")


def serve(rank, folder, names):
    """All checks in one process, in the same order in both; what went wrong, by check."""
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    errors = {}
    for name in names:

        def make(name=name):
            return SUBJECTS[name].make(torch.device("cpu"), ENGINE)

        def inputs(make=make):  # a batch of its own for each process
            return [((1 + rank) * x).detach().requires_grad_() for x in make()[1]]

        expected = alone(make()[0], inputs)
        for kind, wrap in WRAPPERS.items():
            label = f"{kind} {name}"
            try:
                check(wrap(make()[0]), inputs, expected)
                errors[label] = None
            except Exception:
                errors[label] = traceback.format_exc()
            dist.barrier()  # a process that failed early must not meet the other in its next module
    dist.destroy_process_group()
    return errors


def main(names):
    torch.set_num_threads(1)
    for launcher in _library.LAUNCHERS.values() if ENGINE == "triton" else ():
        launcher()  # imports Triton and the kernels, once for both
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        children = []
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    (folder / f"{rank}.json").write_text(json.dumps(serve(rank, folder, names)))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            return 1
        first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD))
    print(json.dumps({label: first[label] or second[label] for label in first}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
