"""Sizes and settings of each model and task, by name.

"textbook" holds the published ones, "small" what learns in minutes on two CPU cores, "tiny" a smoke run of seconds that
learns nothing worth having.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PRESET_NAMES = ("small", "textbook", "tiny")


@dataclass(frozen=True)
class Preset:
    """One row."""

    epochs: int
    batch: int
    optimizer: str  # "sgd" (momentum 0.9) or "adam"
    learning_rate: float
    model: dict[str, Any]
    data: dict[str, Any]
    clip: float = 0.0  # largest norm of the gradient, 0 for any
    limit: int | None = None  # samples at most, unless --limit says otherwise


RECURRENT_LM = {
    "small": Preset(
        epochs=2,
        batch=32,
        optimizer="adam",
        learning_rate=2e-3,
        clip=1.0,
        model={"embedding": 64, "hidden": 256, "layers": 1},
        data={"length": 128, "bytes": 2_000_000, "held_out": 128_000},
    ),
    "textbook": Preset(
        epochs=20,
        batch=64,
        optimizer="adam",
        learning_rate=1e-3,
        clip=1.0,
        model={"embedding": 256, "hidden": 512, "layers": 2, "dropout": 0.2},
        data={"length": 256, "bytes": None, "held_out": None},
    ),
    "tiny": Preset(
        epochs=1,
        batch=8,
        optimizer="adam",
        learning_rate=1e-2,
        clip=1.0,
        model={"embedding": 8, "hidden": 16, "layers": 1},
        data={"length": 16, "bytes": 2_000, "held_out": 1_000},
    ),
}
RECURRENT_CLASSIFIER = {
    "small": Preset(
        epochs=8,
        batch=32,
        optimizer="adam",
        learning_rate=2e-3,
        clip=1.0,
        model={"embedding": 64, "hidden": 128, "layers": 1},
        data={"vocabulary": 4000, "length": 96},
    ),
    "textbook": Preset(
        epochs=20,
        batch=64,
        optimizer="adam",
        learning_rate=1e-3,
        clip=1.0,
        model={"embedding": 256, "hidden": 512, "layers": 2, "dropout": 0.5},
        data={"vocabulary": 8000, "length": 256},
    ),
    "tiny": Preset(
        epochs=1,
        batch=8,
        optimizer="adam",
        learning_rate=1e-2,
        clip=1.0,
        model={"embedding": 8, "hidden": 16, "layers": 1},
        data={"vocabulary": 300, "length": 16},
    ),
}
PRESETS: dict[tuple[str, str], dict[str, Preset]] = {
    ("alexnet", "classify"): {
        "small": Preset(
            epochs=8,
            batch=32,
            optimizer="sgd",
            learning_rate=1e-2,
            clip=1.0,
            model={"dropout": 0.5},
            data={"size": 127, "resize": 127},
        ),
        "textbook": Preset(
            epochs=10,
            batch=64,
            optimizer="sgd",
            learning_rate=1e-3,
            model={"dropout": 0.5},
            data={"size": 224, "resize": 256},
        ),
        "tiny": Preset(
            epochs=1,
            batch=4,
            optimizer="sgd",
            learning_rate=1e-3,
            model={"dropout": 0.0},
            data={"size": 127, "resize": 127},
            limit=32,
        ),
    },
    ("rnn", "lm"): RECURRENT_LM,
    ("lstm", "lm"): RECURRENT_LM,
    ("rnn", "classify"): RECURRENT_CLASSIFIER,
    ("lstm", "classify"): RECURRENT_CLASSIFIER,
    ("transformer", "classify"): {
        "small": Preset(
            epochs=5,
            batch=32,
            optimizer="adam",
            learning_rate=5e-4,
            clip=1.0,
            model={"d_model": 128, "num_heads": 4, "num_layers": 2, "d_feedforward": 256},
            data={"vocabulary": 4000, "length": 96},
        ),
        "textbook": Preset(
            epochs=20,
            batch=64,
            optimizer="adam",
            learning_rate=1e-4,
            clip=1.0,
            model={"d_model": 512, "num_heads": 8, "num_layers": 6, "d_feedforward": 2048},
            data={"vocabulary": 8000, "length": 512},
        ),
        "tiny": Preset(
            epochs=1,
            batch=8,
            optimizer="adam",
            learning_rate=1e-3,
            clip=1.0,
            model={"d_model": 16, "num_heads": 2, "num_layers": 1, "d_feedforward": 16, "dropout": 0.0},
            data={"vocabulary": 300, "length": 16},
        ),
    },
    ("transformer", "lm"): {
        "small": Preset(
            epochs=3,
            batch=32,
            optimizer="adam",
            learning_rate=1e-3,
            clip=1.0,
            model={"d_model": 128, "num_heads": 4, "num_layers": 2, "d_feedforward": 512, "dropout": 0.0},
            data={"length": 128, "bytes": 2_000_000, "held_out": 128_000},
        ),
        "textbook": Preset(
            epochs=20,
            batch=64,
            optimizer="adam",
            learning_rate=3e-4,
            clip=1.0,
            model={"d_model": 512, "num_heads": 8, "num_layers": 6, "d_feedforward": 2048},
            data={"length": 512, "bytes": None, "held_out": None},
        ),
        "tiny": Preset(
            epochs=1,
            batch=8,
            optimizer="adam",
            learning_rate=1e-3,
            clip=1.0,
            model={"d_model": 16, "num_heads": 2, "num_layers": 1, "d_feedforward": 16, "dropout": 0.0},
            data={"length": 16, "bytes": 2_000, "held_out": 1_000},
        ),
    },
    ("bert", "classify"): {
        "small": Preset(
            epochs=6,
            batch=32,
            optimizer="adam",
            learning_rate=1e-3,
            clip=1.0,
            model={"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
            data={"vocabulary": 4000, "length": 96},
        ),
        "textbook": Preset(
            epochs=3,
            batch=32,
            optimizer="adam",
            learning_rate=5e-5,
            clip=1.0,
            model={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
            data={"vocabulary": 30522, "length": 512},
        ),
        "tiny": Preset(
            epochs=1,
            batch=8,
            optimizer="adam",
            learning_rate=1e-3,
            clip=1.0,
            model={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            data={"vocabulary": 300, "length": 16},
        ),
    },
}
