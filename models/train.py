"""Train a model on real data: `python -m models.train {alexnet,rnn,lstm,transformer,bert}`.

Without further options it downloads nothing: digits from scikit-learn, text from Python's own standard library.
Ctrl-C saves, ends with exit code 130 and says the command that goes on, bit for bit.
More GPUs: `torchrun --nproc-per-node N -m models.train ...`.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import sys
from collections.abc import Sequence

from fastops import KernelUnavailable
from models.data import DataError
from models.training.checkpoint import CheckpointError
from models.training.loop import Diverged
from models.training.options import OptionError, Options, names
from models.training.presets import PRESET_NAMES
from models.training.tasks import KINDS


def parser() -> argparse.ArgumentParser:
    """The command line; its names are the fields of Options."""
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train a model on real data; the defaults need no download.",
        epilog="exit codes: 0 done, 1 failed, 2 what was asked for cannot be had (wrong arguments, or data or a "
        "checkpoint that is missing, damaged or of another run), 130 stopped by Ctrl-C (143 by SIGTERM) and saved",
        argument_default=argparse.SUPPRESS,  # only what was given is handed on: a resumed run must know
    )
    parser.add_argument("model", choices=list(KINDS), help="what to train")
    what = parser.add_argument_group("what")
    what.add_argument("--task", choices=["lm", "classify"], help="byte language model, or classifier of texts")
    what.add_argument("--preset", choices=PRESET_NAMES, help="sizes and settings (default: small)")
    what.add_argument(
        "--data",
        choices=["digits", "cifar10", "library", "text", "docstrings", "table"],
        help="digits or cifar10; library or text (language models); docstrings or table (classifiers)",
    )
    what.add_argument("--root", metavar="PATH", help="folder of cifar10 or text; .csv or .jsonl file of table")
    what.add_argument("--fold", type=int, metavar="N", help="which fifth of the digits is held out: 0 (default) to 4")
    what.add_argument("--text-column", metavar="NAME", help="of a table (default: text)")
    what.add_argument("--label-column", metavar="NAME", help="of a table (default: label)")
    what.add_argument("--limit", type=_positive, metavar="N", help="use at most N samples, for a quick look")
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=_positive, metavar="N", help="rounds through the data (default: the preset's)")
    how.add_argument("--batch", type=_positive, metavar="N", help="samples a step, in each process")
    how.add_argument("--lr", dest="learning_rate", type=_rate, metavar="X", help="learning rate (default: preset's)")
    how.add_argument("--seed", type=_seed, metavar="N", help="of weights, data order and dropout (default: 0)")
    how.add_argument("--accelerate", action=argparse.BooleanOptionalAction, help="fastops.accelerate (default: yes)")
    how.add_argument("--amp", choices=["bf16", "fp16", "off"], help="autocast (default: off)")
    how.add_argument("--compile", action="store_true", help="torch.compile")
    how.add_argument("--deterministic", action="store_true", help="deterministic algorithms, also on a GPU")
    how.add_argument("--device", metavar="NAME", help="default: cuda where there is a GPU, else cpu")
    how.add_argument("--early-stop", type=_positive, metavar="N", help="stop after N epochs without an improvement")
    how.add_argument("--freeze", action="append", metavar="PATTERN", help="keep parameters so named; may be repeated")
    how.add_argument("--init-from", metavar="FILE", help="start from the weights of a checkpoint that fit")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", metavar="DIR", help="checkpoints last.pt and best.pt (default: runs/MODEL, the next time runs/MODEL-2)"
    )
    files.add_argument("--resume", metavar="FILE", help="go on where a checkpoint was written; of a folder its last.pt")
    files.add_argument("--save-every", type=_positive, metavar="N", help="save also every N steps")
    files.add_argument("--metrics", metavar="FILE", help="JSON lines: one per look at the loss, one per epoch")
    files.add_argument("--plot", metavar="FILE", help="loss and accuracy curves as PNG")
    parser.add_argument(
        "--compare", action="store_true", help="train with and without accelerate, same seed; --plot draws both"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a mistake of the user's into one line."""
    found = vars(parser().parse_args(argv))
    if "freeze" in found:
        found["freeze"] = tuple(found["freeze"])
    assert set(found) <= names()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = Options(**found)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a letter shows "?", and no traceback
    try:
        if options.compare:
            from models.training.compare import compare

            return compare(options)
        from models.training.run import train

        return train(options, given=set(found))
    except (DataError, CheckpointError, Diverged, KernelUnavailable, OptionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (OptionError, DataError, CheckpointError)) else 1
    except KeyboardInterrupt:  # before the first step, or the second Ctrl-C within one; the first one saves
        print("stopped at once; what was saved before is all there is", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"error: {error}; pip install 'fastops-triton[examples,hf]' brings all of it", file=sys.stderr)
        return 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more and finite, got {text}")
    return rate


def _seed(text: str) -> int:
    seed = int(text)
    if abs(seed) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must lie within {-LARGEST_SEED} and {LARGEST_SEED}, got {text}")
    return seed


LARGEST_SEED = 2**40  # orders of epochs are seeded by multiples of it


if __name__ == "__main__":
    sys.exit(main())
