"""The same training twice, with and without fastops.accelerate, interleaved so that noise of the machine hits both."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from fastops.profiling.paired import from_pairs
from models.training import checkpoint, plots, tasks
from models.training.distributed import Processes
from models.training.loop import Trainer
from models.training.options import OptionError, Options, check_files
from models.training.run import choose_device

ROUND = 5  # steps of one arm before the other has its turn


class Arm:
    """One of the two trainings, with random numbers of its own."""

    def __init__(self, options: Options, task: tasks.Task, device: torch.device) -> None:
        self.trainer = Trainer(options, task, Processes(), device)
        self.random = checkpoint.random_state()
        self.seconds: list[float] = []  # of each round
        self.samples: list[int] = []  # likewise
        self.scores: dict[str, float] = {}

    def steps(self, count: int) -> None:
        """So many steps, timed together."""
        checkpoint.set_random_state(self.random)
        trainer = self.trainer
        trainer.start_clock()
        before, first = trainer.progress.seconds, trainer.progress.position
        for _ in range(count):
            trainer.step()
        trainer.read_losses()
        self.seconds.append(trainer.progress.seconds - before)
        self.samples.append(min((first + count) * trainer.batch, len(trainer.task.train)) - first * trainer.batch)
        self.random = checkpoint.random_state()


def compare(options: Options) -> int:
    """Train both, print one table, draw one picture; the exit code."""
    if options.resume or options.init_from:
        raise OptionError("--compare starts two fresh trainings: leave out --resume and --init-from")
    options = tasks.settle(options)
    check_files(plot=options.plot)
    if options.plot:
        plots.require(options.plot)
    device = choose_device(options)
    console = Console(highlight=False, soft_wrap=True)
    task = tasks.build(options)
    theirs = replace(task, model=copy.deepcopy(task.model))
    arms = [
        Arm(replace(options, accelerate=False), theirs, device),
        Arm(replace(options, accelerate=True), task, device),
    ]
    console.print(f"[bold]{task.name}[/] on {device}, twice: {task.about}")
    try:
        train(arms, options, console)
    except KeyboardInterrupt:
        console.print("stopped; what follows is of the steps done")
    return conclude(arms, options, device, console)


def train(arms: list[Arm], options: Options, console: Console) -> None:
    """All epochs; the arm that goes first changes from round to round."""
    assert options.epochs is not None
    total, first = arms[0].trainer.steps_per_epoch, 0
    for epoch in range(options.epochs):
        started = time.perf_counter()
        for arm in arms:
            arm.trainer.start_epoch()
        for position in range(0, total, ROUND):
            for arm in (arms[first], arms[1 - first]):
                arm.steps(min(ROUND, total - position))
            first = 1 - first
        for arm in arms:
            checkpoint.set_random_state(arm.random)
            arm.scores = arm.trainer.finish_epoch()
            arm.random = checkpoint.random_state()
        metric = f"test_{arms[0].trainer.task.metric}"
        console.print(
            f"epoch {epoch + 1}: {metric[5:].replace('_', ' ')} {arms[0].scores[metric]:.4f} stock, "
            f"{arms[1].scores[metric]:.4f} accelerated, {time.perf_counter() - started:.0f} s"
        )


def conclude(arms: list[Arm], options: Options, device: torch.device, console: Console) -> int:
    """The table, what it means, and the picture."""
    stock, ours = arms
    rounds = list(zip(stock.seconds, ours.seconds, strict=False))
    settled = rounds[1:]  # the first round loads, tunes and compiles
    if len(settled) < 2:
        raise OptionError(f"{len(rounds)} rounds of {ROUND} steps are too few for a ratio: more --epochs or --limit")
    ratios = [theirs / mine for theirs, mine in settled]
    found = from_pairs(settled, seed=options.seed)
    task = ours.trainer.task
    metric = task.metric
    table = Table(title=f"{task.name}, {device}, amp {options.amp}, batch {options.batch}", title_justify="left")
    for heading in ("", "samples/s", "last losses", metric.replace("_", " ")):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, arm in (("stock PyTorch", stock), ("fastops.accelerate", ours)):
        losses = arm.trainer.progress.losses
        rates = [samples / seconds for samples, seconds in zip(arm.samples, arm.seconds, strict=True)]
        rate = statistics.median(rates[1:])
        score = f"{arm.scores[f'test_{metric}']:.4f}" if arm.scores else "-"
        table.add_row(name, f"{rate:,.1f}", f"{statistics.fmean(losses[-ROUND:]):.4f}", score)
    console.print(table)
    pairs = zip(stock.trainer.progress.losses, ours.trainer.progress.losses, strict=False)
    difference = max(abs(theirs - mine) for theirs, mine in pairs)
    summary = f"{found.ratio:.3f} x (95 %: {found.low:.3f} to {found.high:.3f})"
    console.print(f"throughput, accelerated / stock: {summary}, median of {found.rounds} rounds of up to {ROUND} steps")
    console.print(f"largest difference between the two loss curves: {difference:.3g}")
    if device.type == "cpu":
        console.print('on a CPU impl="auto" runs stock PyTorch kernels: a ratio near 1 is what there is to see')
    if options.plot:
        losses = [arm.trainer.progress.losses for arm in arms]
        plots.comparison(task.name, *losses, ratios, summary, options.plot)
        console.print(f"picture in {options.plot}")
    return 0
