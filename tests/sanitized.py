"""One forward and backward pass of every public op and module on a GPU, for compute-sanitizer to watch."""

import sys

import torch

from tests.contract_subjects import SUBJECTS


def main() -> int:
    device = torch.device("cuda")
    for name, subject in SUBJECTS.items():
        call, given = subject.make(device, "triton")
        result = call(*given)
        while not isinstance(result, torch.Tensor):
            result = result[0]
        result.square().sum().backward()
        torch.cuda.synchronize()
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
