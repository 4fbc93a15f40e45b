"""Curves as PNG: loss and accuracy of a run, and two runs on top of each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.training.options import OptionError

if TYPE_CHECKING:
    from models.training.loop import Progress
    from models.training.tasks import Task

BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#8b949e"
SUFFIXES = (".png", ".svg", ".pdf")
POINTS = 60  # of a smoothed curve, about


def require(path: str) -> None:
    """Fail early where there is no matplotlib, or no picture can be written under that name.

    Raises:
        OptionError: says what to change.
        ImportError: says what to install.
    """
    import importlib.util

    if Path(path).suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {path}: give a name that ends in {', '.join(SUFFIXES)}")

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib, which is not installed")


def curves(progress: Progress, task: Task, steps_per_epoch: int, path: str | Path) -> None:
    """Training and held-out loss, and the held-out metric, over epochs."""
    figure, (left, right) = _axes(2)
    _loss(left, progress.losses, steps_per_epoch, BLUE, "training")
    epochs = [summary["epoch"] for summary in progress.epochs]
    left.plot(epochs, [summary["test_loss"] for summary in progress.epochs], "o-", color=ORANGE, label="held out")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", title=f"{task.name}: loss")
    left.legend(frameon=False)
    values = [summary[f"test_{task.metric}"] for summary in progress.epochs]
    right.plot(epochs, values, "o-", color=ORANGE, label="held out")
    if task.baseline is not None:
        right.axhline(task.baseline, color=GREY, linestyle="--", label="most frequent class")
        right.set_ylim(0, 1.02)
    else:
        right.margins(y=0.2)  # room for the number below the last point
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(epochs) <= 1:  # a single point has no range
            axis.set_xlim(-0.1, 1.1)
    if values:
        right.annotate(_number(values[-1], task), (epochs[-1], values[-1]), xytext=(-4, -14), ha="right", **_OFFSET)
    right.set(xlabel="epoch", ylabel=task.metric.replace("_", " "), title="held-out data")
    where = "center left" if len(epochs) <= 1 else "center right"
    right.legend(frameon=False, loc="upper right" if task.language_model else where)
    _save(figure, path)


def comparison(
    name: str, stock: Sequence[float], ours: Sequence[float], ratios: Sequence[float], summary: str, path: str | Path
) -> None:
    """Two loss curves on top of each other, and the throughput ratio of every round."""
    figure, (left, right) = _axes(2)
    left.plot(range(1, len(stock) + 1), stock, color=GREY, linewidth=3.5, label="stock PyTorch")
    left.plot(range(1, len(ours) + 1), ours, color=BLUE, linewidth=1.2, label="fastops.accelerate")
    left.set(xlabel="step", ylabel="cross-entropy (nats)", title=f"{name}: same seed, same data")
    left.legend(frameon=False)
    right.plot(range(1, len(ratios) + 1), ratios, ".", color=BLUE)
    right.axhline(1.0, color=GREY, linestyle="--")
    ordered = sorted(ratios)
    top = 1.3 * max(1.0, ordered[int(0.98 * (len(ordered) - 1))])
    beyond = sum(ratio > top for ratio in ratios)  # a round that met a hiccup of the machine
    right.set_ylim(0, top)
    right.set(xlabel="round" + (f" ({beyond} above the frame)" if beyond else ""), title=summary)
    right.set_ylabel("throughput: accelerated / stock")
    _save(figure, path)


_OFFSET: dict[str, Any] = {"textcoords": "offset points"}


def _axes(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.8 * count, 3.6), layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _loss(axis: Any, losses: Sequence[float], steps_per_epoch: int, color: str, label: str) -> None:
    epochs = [(step + 1) / steps_per_epoch for step in range(len(losses))]
    axis.plot(epochs, losses, color=color, alpha=0.25, linewidth=0.8)
    width = max(1, len(losses) // POINTS)
    smooth = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in range(0, len(losses), width)]
    middles = [epochs[min(i + width // 2, len(losses) - 1)] for i in range(0, len(losses), width)]
    axis.plot(middles, smooth, color=color, label=label)


def _number(value: float, task: Task) -> str:
    return f"{value:.3f} bits per byte" if task.language_model else f"{value:.1%}"


def _save(figure: Any, path: str | Path) -> None:
    from matplotlib import pyplot

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
