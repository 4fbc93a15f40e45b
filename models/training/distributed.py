"""More than one process: started by torchrun, gloo on CPUs and NCCL on GPUs. One process needs none of this."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """DistributedDataParallel where there is more than one process; parameters start equal to the first one's."""
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: int, device: torch.device) -> int:
        """The largest value that any process has, so that all of them stop at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Join the group that torchrun started, if it did; each process gets the GPU of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank), device


def leave(processes: Processes) -> None:
    """End the group: all together, and after the wrapped model is gone, whose threads use it."""
    if processes.world > 1:
        gc.collect()
        if sys.exc_info()[0] is None:
            dist.barrier()
        dist.destroy_process_group()
