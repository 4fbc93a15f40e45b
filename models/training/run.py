"""A whole run: epochs with a progress bar, checkpoints, metrics, early stopping, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.training import checkpoint, distributed, plots, tasks
from models.training.folder import claimed
from models.training.loop import READ_EVERY, Stop, Trainer, initialise_from
from models.training.options import BEST, DEFINING, LAST, OptionError, Options


def train(options: Options, given: set[str] | None = None) -> int:
    """Run it and return the exit code: 0, or 128 + signal (130 after Ctrl-C) with everything saved.

    Args:
        options: what to do.
        given: the fields that were asked for, as opposed to defaults; a resumed run takes the others from its file.
    """
    if options.resume and options.init_from:
        raise OptionError("--init-from starts a new run, --resume goes on with one: give one of them")
    if options.resume and Path(options.resume).is_dir():
        options = replace(options, resume=str(Path(options.resume) / LAST))
    state = checkpoint.load(options.resume) if options.resume else None
    if state is not None:
        options = resumed(options, state, given or set())
    options = tasks.settle(options)
    if options.plot:
        plots.require(options.plot)
    with claimed(options) as options:
        processes, device = distributed.join(choose_device(options))
        try:
            return _train(options, state, processes, device)
        finally:
            distributed.leave(processes)


def _train(
    options: Options, state: checkpoint.Checkpoint | None, processes: distributed.Processes, device: torch.device
) -> int:
    """The run itself; what it builds is gone when the process group ends."""
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    console = Lasting(quiet=not processes.first, highlight=False, soft_wrap=True)
    task = tasks.build(options, state["task"] if state else None)
    if options.init_from:
        taken, fresh = initialise_from(task.model, options.init_from)
        console.print(f"from {options.init_from}: {taken} tensors; fresh: {', '.join(fresh) or 'none'}")
    trainer = Trainer(options, task, processes, device)
    if state is not None:
        trainer.load_state(state)
    return Run(options, trainer, console).run()


def resumed(options: Options, state: checkpoint.Checkpoint, given: set[str]) -> Options:
    """The options of a resumed run: the checkpoint's, and of the command line's those that may change.

    Raises:
        CheckpointError: one of those that may not.
    """
    before = {name: tuple(value) if isinstance(value, list) else value for name, value in state["options"].items()}
    for name in sorted(given & set(DEFINING)):
        if getattr(options, name) != before.setdefault(name, getattr(Options, name, None)):
            raise checkpoint.CheckpointError(
                f"{options.resume} was written with {name} {before[name]!r}, not {getattr(options, name)!r}; "
                "start a new run, or take only its weights with --init-from"
            )
    return replace(options, **before)


def choose_device(options: Options) -> torch.device:
    """The device that is asked for, or a GPU where there is one.

    Raises:
        OptionError: there is none of that name here, or it cannot run what is asked for.
    """
    wanted = options.device
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise OptionError(f"--device {wanted}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu" and options.model == "lstm" and options.amp == "fp16":  # the plain RNN trains there
        raise OptionError("--amp fp16: PyTorch trains no LSTM in fp16 on a CPU; take --amp bf16, or a GPU")
    if device.type == "meta":
        raise OptionError("--device meta: its tensors hold no numbers to train")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {wanted}: this PyTorch sees no GPU")
    return device


class Lasting(Console):
    """A console whose reader may leave: the training goes on without a word."""

    def on_broken_pipe(self) -> None:
        """In place of rich's, which ends the process."""
        self.quiet = True
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count != 1 else ''}"


class Run:
    """Carries a trainer through its epochs."""

    def __init__(self, options: Options, trainer: Trainer, console: Console) -> None:
        self.options, self.trainer, self.console = options, trainer, console
        self.task, self.processes = trainer.task, trainer.processes
        self.folder = Path(options.folder)
        self.stop = Stop()

    def run(self) -> int:
        """Train, and say how it ended."""
        options, progress = self.options, self.trainer.progress
        assert options.epochs is not None
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        self.console.print(
            f"[bold]{self.task.name}[/], {parameters:,} parameters, on {self.trainer.device}"
            f"{f' x {self.processes.world}' if self.processes.world > 1 else ''}: {self.task.about}"
        )
        if progress.epoch >= options.epochs:
            self.console.print(f"{_epochs(progress.epoch)} done already; ask for more with --epochs")
            return 0
        with contextlib.ExitStack() as stack:
            self.metrics = Metrics(options.metrics if self.processes.first else None)
            stack.callback(self.metrics.close)
            stack.enter_context(self.stop.listening())
            self.metrics.write("start", model=options.model, task=options.task, data=options.data, step=progress.step)
            reason = self.epochs()
            self.metrics.write("end", reason=reason, step=progress.step, best=progress.best)
        self.draw()
        if self.stop.signal:
            self.console.print(
                f"stopped at epoch {progress.epoch + 1}, step {progress.position} of {self.trainer.steps_per_epoch}; "
                f"go on with: {options.command_to_resume(self.folder / LAST, self.processes.world)}"
            )
            return 128 + self.stop.signal
        saved = f"{self.folder / LAST} (last)"
        if (self.folder / BEST).exists():  # unless it was resumed into a new folder and got no better
            saved = f"{self.folder / BEST} (best) and {saved}"
        self.console.print(f"{reason}; weights in {saved}")
        return 0

    def epochs(self) -> str:
        """Train to the end, or to the point where there is reason to stop; the reason."""
        options, progress = self.options, self.trainer.progress
        assert options.epochs is not None
        while progress.epoch < options.epochs:
            if not self.epoch():
                self.save(LAST)
                return "stopped"
            summary = self.trainer.finish_epoch()
            self.save(LAST)  # before anything is printed: whoever reads it may be gone
            if progress.since_best == 0:
                self.save(BEST)
            self.console.print(self.describe(summary))
            self.metrics.write("epoch", **summary)
            if options.early_stop is not None and progress.since_best >= options.early_stop:
                return f"no better {self.task.metric} for {options.early_stop} epochs"
        return f"{_epochs(progress.epoch)} done"

    def epoch(self) -> bool:
        """The rest of the running epoch; False where a signal ends it early."""
        trainer, progress, total = self.trainer, self.trainer.progress, self.trainer.steps_per_epoch
        trainer.start_epoch()
        with self.bar() as bar:
            line = bar.add_task("", total=total, completed=progress.position, loss=float("nan"), rate=0.0)
            while progress.position < total:
                trainer.step()
                stop = self.processes.agree(self.stop.signal, trainer.device)
                if stop or progress.position % READ_EVERY == 0 or progress.position == total:
                    self.read(bar, line)
                if stop:
                    self.stop.signal = stop
                    return False
                if self.options.save_every and progress.step % self.options.save_every == 0:
                    self.save(LAST)
                    trainer.start_clock()
        return True

    def read(self, bar: Progress, line: Any) -> None:
        """Look at the losses since the last time: on the bar, in the metrics."""
        trainer, progress = self.trainer, self.trainer.progress
        before = progress.seconds
        losses = trainer.read_losses()
        if not losses:
            return
        rate = len(losses) * trainer.batch / max(progress.seconds - before, 1e-9)
        mean = sum(losses) / len(losses)
        bar.update(line, completed=progress.position, loss=mean, rate=rate)
        self.metrics.write("step", epoch=progress.epoch, step=progress.step, loss=mean, samples_per_s=rate)

    def bar(self) -> Progress:
        return Progress(
            TextColumn(f"epoch {self.trainer.progress.epoch + 1}/{self.options.epochs}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} samples/s"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or self.console.quiet,
        )

    def describe(self, summary: dict[str, float]) -> str:
        """One line for one epoch."""
        line = (
            f"epoch {summary['epoch']}: loss {summary['train_loss']:.4f}, held out {summary['test_loss']:.4f}, "
            f"accuracy {summary['test_accuracy']:.2%}"
        )
        if self.task.language_model:
            line += f", {summary['test_bits_per_byte']:.3f} bits per byte"
        elif self.task.baseline is not None:
            line += f" (most frequent class: {self.task.baseline:.2%})"
        return line + f", {summary['samples_per_s']:,.0f} samples/s, {summary['seconds']:.0f} s"

    def save(self, name: str) -> None:
        """Write a checkpoint; every process takes part, the first one writes."""
        state = self.trainer.state()
        if self.processes.first:
            checkpoint.save(self.folder / name, state)

    def draw(self) -> None:
        if self.options.plot and self.processes.first:
            plots.curves(self.trainer.progress, self.task, self.trainer.steps_per_epoch, self.options.plot)
            self.console.print(f"curves in {self.options.plot}")


class Metrics:
    """JSON lines, one an event, flushed as they come; a resumed run appends."""

    def __init__(self, path: str | None) -> None:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8", buffering=1) if path is not None else None  # noqa: SIM115

    def write(self, event: str, **values: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
