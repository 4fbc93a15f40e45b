"""What is trained on what: a model, its data, and how they meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastops import _env
from models import data
from models.data.images import FOLDS
from models.training.options import OptionError, Options
from models.training.presets import PRESET_NAMES, PRESETS, Preset

BYTES = 256

KINDS = {
    "alexnet": ("classify",),
    "rnn": ("lm", "classify"),
    "lstm": ("lm", "classify"),
    "transformer": ("classify", "lm"),
    "bert": ("classify",),
}
DATA = {"alexnet": ("digits", "cifar10"), "lm": ("library", "text"), "classify": ("docstrings", "table")}


class Dataset(Protocol):
    """What the loop needs of data."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]: ...


@dataclass
class Task:
    """A model with the data it is to learn."""

    name: str
    language_model: bool
    model: nn.Module
    train: Dataset
    test: Dataset
    call: Callable[[nn.Module, dict[str, Tensor]], Tensor]  # logits of a batch
    preset: Preset
    about: str
    baseline: float | None = None  # accuracy of the most frequent class
    state: dict[str, Any] = field(default_factory=dict)  # travels in checkpoints

    @property
    def metric(self) -> str:
        """What is judged at the end of each epoch."""
        return "bits_per_byte" if self.language_model else "accuracy"

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value of the metric is an improvement."""
        return than is None or (value < than if self.language_model else value > than)


def settle(options: Options) -> Options:
    """Fill in what the preset decides; refuse what does not go together.

    Raises:
        OptionError: a task or data set that this model does not have, a folder that is missing, a FASTOPS_IMPL that
            is no engine.
    """
    if options.model not in KINDS:
        raise OptionError(f"model must be one of {', '.join(KINDS)}, got {options.model!r}")
    task = options.task or KINDS[options.model][0]
    if task not in KINDS[options.model]:
        raise OptionError(f"{options.model} has no task {task!r}, only {' and '.join(KINDS[options.model])}")
    allowed = DATA.get(options.model, DATA[task])
    chosen = options.data or allowed[0]
    if chosen not in allowed:
        raise OptionError(f"{options.model} ({task}) reads {' or '.join(allowed)}, not {chosen!r}")
    if chosen in ("cifar10", "text", "table") and options.root is None:
        raise OptionError(f"--data {chosen} needs --root: the {'file' if chosen == 'table' else 'folder'} to read")
    if options.root is not None and chosen not in ("cifar10", "text", "table"):
        raise OptionError(f"--root is of --data cifar10, text or table; {chosen} needs no files")
    if not 0 <= options.fold < FOLDS:
        raise OptionError(f"--fold must be 0 to {FOLDS - 1}, got {options.fold}")
    if options.fold and chosen != "digits":
        raise OptionError(f"--fold is of the digits; what {chosen} holds out is fixed")
    if options.preset not in PRESET_NAMES:
        raise OptionError(f"preset must be one of {', '.join(PRESET_NAMES)}, got {options.preset!r}")
    if options.accelerate:
        try:
            _env.choose_impl("auto", _env.KNOWN_IMPLS)
        except ValueError as error:
            raise OptionError(str(error)) from error
    preset = PRESETS[options.model, task][options.preset]
    return replace(
        options,
        task=task,
        data=chosen,
        epochs=preset.epochs if options.epochs is None else options.epochs,
        batch=preset.batch if options.batch is None else options.batch,
        learning_rate=preset.learning_rate if options.learning_rate is None else options.learning_rate,
        limit=preset.limit if options.limit is None else options.limit,
    )


def build(options: Options, state: dict[str, Any] | None = None) -> Task:
    """The task of settled options. `state` is that of a checkpoint (the tokenizer), where there is one."""
    assert options.task is not None
    preset = PRESETS[options.model, options.task][options.preset]
    torch.manual_seed(options.seed)
    if options.model == "alexnet":
        return _images(options, preset)
    if options.task == "lm":
        return _language(options, preset)
    return _documents(options, preset, state or {})


def _images(options: Options, preset: Preset) -> Task:
    from models.alexnet import AlexNet

    size = preset.data["size"]
    if options.data == "digits":
        train, test = (data.digits(size, train=train, fold=options.fold) for train in (True, False))
    else:
        assert options.root is not None
        train = data.cifar10(options.root, **preset.data)
        test = data.cifar10(options.root, **preset.data, train=False)
    model = AlexNet(num_classes=len(train.classes), **preset.model)
    he_initialise(model)
    return Task(
        options.model,
        False,
        model,
        Limited.of(train, options.limit),
        Limited.of(test, options.limit),
        lambda model, batch: model(batch["images"]),
        preset,
        f"{options.data} at {size} x {size}, {len(train.classes)} classes",
        baseline=float(test.labels.bincount().max() / len(test)),
    )


def he_initialise(model: nn.Module) -> None:
    """Weights N(0, 2 / fan_in), biases 0 (He et al., 2015), made for many layers of ReLU."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _language(options: Options, preset: Preset) -> Task:
    length = preset.data["length"]

    def windows(train: bool) -> data.ByteWindows:
        limit = preset.data["bytes" if train else "held_out"]
        if options.data == "library":
            return data.standard_library(length, limit=limit, train=train)
        assert options.root is not None
        return data.text_folder(options.root, length, limit=limit, train=train)

    train, test = windows(True), windows(False)
    where = "Python's standard library" if options.data == "library" else options.root
    return Task(
        options.model,
        True,
        _language_model(options.model, preset),
        Limited.of(train, options.limit),
        Limited.of(test, options.limit),
        lambda model, batch: model(batch["tokens"]),
        preset,
        f"bytes of {where}: {len(train.stream):,} to learn, {len(test.stream):,} held out",
    )


def _documents(options: Options, preset: Preset, state: dict[str, Any]) -> Task:
    if options.data == "docstrings":
        pairs = data.docstrings()
    else:
        assert options.root is not None
        pairs = data.labelled_file(options.root, text_column=options.text_column, label_column=options.label_column)
    classes = tuple(state.get("classes") or sorted({label for _, label in pairs[0] + pairs[1]}))
    if "tokenizer" in state:
        tokenizer = data.Tokenizer(state["tokenizer"])
    else:
        tokenizer = data.Tokenizer.train([text for text, _ in pairs[0]], preset.data["vocabulary"])

    def documents(chosen: list[tuple[str, str]]) -> data.Documents:
        tokens = tokenizer.encode([text for text, _ in chosen], preset.data["length"])
        return data.Documents(tokens, torch.tensor([classes.index(label) for _, label in chosen]), classes)

    train, test = documents(pairs[0]), documents(pairs[1])
    model, call = _classifier(options.model, preset, len(tokenizer), len(classes))
    return Task(
        options.model,
        False,
        model,
        Limited.of(train, options.limit),
        Limited.of(test, options.limit),
        call,
        preset,
        f"{len(train):,} + {len(test):,} {options.data} in {len(classes)} classes, {len(tokenizer):,} word pieces",
        baseline=test.majority(),
        state={"tokenizer": tokenizer.describe(), "classes": list(classes)},
    )


def _language_model(name: str, preset: Preset) -> nn.Module:
    if name == "transformer":
        from models.transformer import CausalLanguageModel

        return CausalLanguageModel(BYTES, max_length=preset.data["length"], **preset.model)
    from models.lstm import ByteLanguageModel

    return ByteLanguageModel(cell=name, **preset.model)


def _classifier(
    name: str, preset: Preset, vocabulary: int, classes: int
) -> tuple[nn.Module, Callable[[nn.Module, dict[str, Tensor]], Tensor]]:
    length = preset.data["length"]
    if name == "transformer":
        from models.transformer import TransformerClassifier

        model = TransformerClassifier(vocabulary, classes, max_length=length, padding_id=data.PAD, **preset.model)
        return model, lambda model, batch: model(batch["tokens"])
    if name == "bert":
        from transformers import BertConfig

        from models.bert import BertClassifier

        config = BertConfig(
            vocab_size=vocabulary, max_position_embeddings=length, pad_token_id=data.PAD, **preset.model
        )
        return BertClassifier(classes, config), lambda model, batch: model(batch["tokens"], batch["attention_mask"])
    from models.lstm import SequenceClassifier

    model = SequenceClassifier(vocabulary, classes, cell=name, **preset.model)
    return model, lambda model, batch: model(batch["tokens"], batch["lengths"])


@dataclass(frozen=True)
class Limited:
    """The first `count` of a data set."""

    whole: Dataset
    count: int

    @classmethod
    def of(cls, whole: Dataset, limit: int | None) -> Dataset:
        return whole if limit is None or limit >= len(whole) else cls(whole, limit)

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        return self.whole.batch(indices, device)
