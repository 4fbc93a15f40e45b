"""The training loop: epochs, steps, evaluation, and a state that can be saved and gone back to at any step."""

from __future__ import annotations

import fnmatch
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.training import checkpoint
from models.training.distributed import Processes
from models.training.options import OptionError, Options
from models.training.tasks import Task

READ_EVERY = 10  # steps between two looks at the loss: a look waits for the GPU
MOMENTUM = 0.9
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Progress:
    """Where a run is; all of it goes into checkpoints."""

    epoch: int = 0  # finished epochs
    position: int = 0  # steps done in the running one
    step: int = 0
    best: float | None = None
    since_best: int = 0
    epoch_loss: float = 0.0  # sum over the steps of the running epoch
    seconds: float = 0.0  # spent in the running epoch
    losses: list[float] = field(default_factory=list)  # of every step
    epochs: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One run of one task, a step at a time; models.training.run makes epochs of the steps."""

    def __init__(self, options: Options, task: Task, processes: Processes, device: torch.device) -> None:
        assert options.batch is not None
        assert options.learning_rate is not None
        self.options, self.task, self.processes, self.device = options, task, processes, device
        self.batch = options.batch * processes.world
        self.progress = Progress()
        self.model = task.model.to(device)
        if options.accelerate:
            import fastops

            fastops.accelerate(self.model)
        freeze(self.model, options.freeze)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if task.preset.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, options.learning_rate, momentum=MOMENTUM)
        else:
            self.optimizer = torch.optim.Adam(parameters, options.learning_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        if options.compile:
            self.model.compile()
        self.wrapped = processes.wrap(self.model, device)
        # every process its own dropout masks
        torch.manual_seed(options.seed + 1 + processes.rank)
        self._unread: list[Tensor] = []
        self._since = time.perf_counter()

    @property
    def steps_per_epoch(self) -> int:
        """The last batch may be short, but every process needs a sample of it."""
        whole, rest = divmod(len(self.task.train), self.batch)
        return whole + (rest >= self.processes.world)

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch: decided by seed and epoch alone, so that position is all a resumed run needs."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.task.train), generator=generator)

    def start_epoch(self) -> None:
        """Before the first step of an epoch, and before the first one after a resume."""
        self._order = self.order(self.progress.epoch)
        self.wrapped.train()
        self.start_clock()

    def start_clock(self) -> None:
        """Before steps that count for samples/s: what came since the last one (saving, evaluating) does not."""
        self._since = time.perf_counter()

    def step(self) -> None:
        """One optimiser step on the next batch. Losses are read later, see `read_losses`."""
        progress, world = self.progress, self.processes.world
        chosen = self._order[progress.position * self.batch :][: self.batch]
        mine = chosen[self.processes.rank :: world]
        batch = self.task.train.batch(mine, self.device)
        loss = self.loss(self.wrapped, batch)
        # each process's share of the mean over the whole batch; DDP then averages over processes, hence `world`
        share = loss * (len(mine) / len(chosen))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(share * world).backward()
        if self.task.preset.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.preset.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._unread.append(share.detach())
        progress.position += 1
        progress.step += 1

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, -2).float(), batch["target"].flatten())

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        amp = self.options.amp
        with torch.autocast(self.device.type, AMP.get(amp), enabled=amp != "off"):
            return self.task.call(model, batch)

    def read_losses(self) -> list[float]:
        """The losses of the steps since the last call, averaged over processes; waits for the GPU.

        Raises:
            Diverged: one of them is NaN or infinite.
        """
        if not self._unread:
            return []
        values = self.processes.total(torch.stack(self._unread).double()).tolist()
        self._unread.clear()
        progress = self.progress
        progress.losses += values
        progress.epoch_loss += math.fsum(values)
        now = time.perf_counter()
        progress.seconds += now - self._since
        self._since = now
        if not all(map(math.isfinite, values)):
            raise Diverged(f"the loss became {values[-1]} near step {progress.step}: try a smaller --lr")
        return values

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy over all held-out data, and bits per byte of a language model."""
        model = self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        mine = torch.arange(self.processes.rank, len(self.task.test), self.processes.world)
        for indices in mine.split(self.options.batch or 1):
            batch = self.task.test.batch(indices, self.device)
            logits, target = self.logits(model, batch).flatten(0, -2).float(), batch["target"].flatten()
            sums[0] += F.cross_entropy(logits, target, reduction="sum")
            sums[1] += (logits.argmax(-1) == target).sum()
            sums[2] += len(target)
        model.train()
        loss, correct, count = self.processes.total(sums).tolist()
        found = {"loss": loss / count, "accuracy": correct / count}
        return found | ({"bits_per_byte": loss / count / math.log(2)} if self.task.language_model else {})

    def finish_epoch(self) -> dict[str, float]:
        """Evaluate, note the result, move on to the next epoch."""
        self.read_losses()
        progress, steps = self.progress, self.progress.position
        samples = min(len(self.task.train), steps * self.batch)
        scores = self.evaluate()
        value = scores[self.task.metric]
        if self.task.better(value, progress.best):
            progress.best, progress.since_best = value, 0
        else:
            progress.since_best += 1
        progress.epoch += 1
        summary = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": progress.epoch_loss / steps,
            "samples_per_s": samples / progress.seconds,
            "seconds": progress.seconds,
        } | {f"test_{name}": score for name, score in scores.items()}
        progress.epochs.append(summary)
        progress.position, progress.epoch_loss, progress.seconds = 0, 0.0, 0.0
        return summary

    def state(self) -> checkpoint.Checkpoint:
        """Everything a run needs to go on bit for bit; the same call on every process."""
        self.read_losses()
        return {
            "options": self.options.defining(),
            "task": self.task.state,
            "world": self.processes.world,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(checkpoint.random_state()),
            "progress": vars(self.progress) | {"losses": list(self.progress.losses)},
        }

    def load_state(self, state: checkpoint.Checkpoint) -> None:
        """Go on from what `state` gave. As many processes as then."""
        if state["world"] != self.processes.world:
            raise checkpoint.CheckpointError(
                f"the checkpoint was written by {state['world']} processes, this run has {self.processes.world}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"the checkpoint is of another model: {error}") from error
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self._unread.clear()
        checkpoint.set_random_state(state["random"][self.processes.rank])


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> int:
    """Keep the parameters whose names match a shell pattern as they are; how many that is.

    Raises:
        OptionError: a pattern matches nothing, or nothing is left to learn.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(named, pattern)
        if not matching:
            raise OptionError(f"--freeze {pattern!r} matches no parameter; there are {', '.join(list(named)[:6])} ...")
        for name in matching:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise OptionError(f"--freeze {' '.join(patterns)} leaves nothing to learn")
    return sum(not parameter.requires_grad for parameter in named.values())


def initialise_from(model: nn.Module, path: str) -> tuple[int, list[str]]:
    """Take what fits from a checkpoint: (parameters taken, names that stay fresh, such as a new head's).

    Raises:
        CheckpointError: unreadable, or nothing fits.
    """
    theirs, ours = checkpoint.load(path)["model"], model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and ours[name].shape == value.shape}
    if not fitting:
        raise checkpoint.CheckpointError(f"--init-from {path}: none of its {len(theirs)} tensors fits this model")
    model.load_state_dict(fitting, strict=False)
    return len(fitting), [name for name in ours if name not in fitting]


class Stop:
    """Ctrl-C and SIGTERM ask for a stop after the running step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Signals count while inside; outside they do what they did before."""
        handlers: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self._heard)
        except ValueError:  # only the main thread hears signals
            pass
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
