"""What `fastops.explain` answers: one row a module, as data and as a table."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

WIDTH = 132  # of a report as text, where no terminal decides


@dataclass(frozen=True)
class Row:
    """One module that fastops has, or could have, an answer to."""

    path: str
    """Where it is in the model, as in named_modules(); "" is the model itself."""
    kind: str
    """What it is: its class, e.g. "LSTM", or "Conv2d + ReLU"."""
    op: str
    """"conv2d_relu", "rnn" or "attention", the words of `only`."""
    becomes: str | None
    """What it becomes (or has become); None where it stays."""
    reason: str
    """Why it stays; of one that is accelerated, what there is to know."""
    done: bool = False
    """It has been accelerated before."""
    apply: Callable[[], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """What `fastops.accelerate` does to a model, or would do. Printing it shows a table."""

    model: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def accelerated(self) -> tuple[Row, ...]:
        """The rows that become, or have become, fastops'."""
        return tuple(row for row in self.rows if row.becomes is not None)

    @property
    def kept(self) -> tuple[Row, ...]:
        """The rows that stay torch's, each with its reason."""
        return tuple(row for row in self.rows if row.becomes is None)

    def summary(self) -> str:
        """One line: counts, and reasons."""
        new = Counter(row.op for row in self.accelerated if not row.done)
        done = sum(row.done for row in self.rows)
        parts = [", ".join(f"{count} {op}" for op, count in new.items()) or "nothing new"]
        if done:
            parts.append(f"{done} done before")
        if self.kept:
            reasons = Counter(row.reason for row in self.kept).most_common()
            said = "; ".join(reason if len(reasons) == 1 else f"{count}: {reason}" for reason, count in reasons)
            parts.append(f"{len(self.kept)} stay ({said})")
        elif not self.rows:
            parts = ["nothing in it that fastops has a kernel for"]
        return f"{self.model}: {', '.join(parts)}" + (f". {self.note}" if self.note else "")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __rich__(self) -> Any:
        """The table, for rich's own print."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"fastops on {self.model}", title_justify="left", caption_justify="left")
        for heading in ("module", "is", "becomes", "because"):
            table.add_column(heading, overflow="fold", no_wrap=heading in ("is", "becomes"))
        for row in self.rows:
            table.add_row(
                Text(row.path or "(the model)"),
                Text(row.kind),
                Text(row.becomes, style="green") if row.becomes else Text("stays", style="yellow"),
                Text(row.reason),
            )
        total, fast = len(self.rows), len(self.accelerated)
        lines = f"{fast} of {total} become fastops'." if total else "Nothing in it that fastops has a kernel for."
        return Group(table, Text(f"{lines} {self.note}".strip())) if total else Text(f"{lines} {self.note}".strip())

    def __str__(self) -> str:
        from rich.console import Console

        target = io.StringIO()
        Console(file=target, width=WIDTH, color_system=None).print(self)
        return target.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return str(self)
