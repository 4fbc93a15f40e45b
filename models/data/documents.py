"""Labelled texts of truly varying lengths: docstrings labelled by their package, or a CSV or JSON Lines file."""

from __future__ import annotations

import ast
import csv
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.data.errors import DataError
from models.data.text import standard_library_files

PAD = 0
ONE_IN = 5  # texts held out
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Labelled = list[tuple[str, str]]


class Tokenizer:
    """WordPiece as BERT has it (lower case, [CLS] text [SEP]), its vocabulary trained on the texts at hand."""

    def __init__(self, description: str) -> None:
        from tokenizers import Tokenizer as Engine

        self._engine: Any = Engine.from_str(description)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Train a vocabulary of at most so many pieces; the same texts give the same one."""
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

        texts = list(texts)
        normalizer = normalizers.BertNormalizer(lowercase=True)
        characters = sorted(set("".join(map(normalizer.normalize_str, texts))) - set(" \t\n\r"))

        def engine(model: Any) -> Any:
            built = Engine(model)
            built.normalizer, built.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
            return built

        # pairs that are equally frequent merge in the order of their ids, and ids are given in the order of a hash map:
        # only with every character's id fixed beforehand is the vocabulary the same each time
        known = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
        drafted = engine(models.WordPiece(unk_token="[UNK]"))
        drafted.train_from_iterator(
            texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=known, show_progress=False)
        )
        trained = engine(models.WordPiece(drafted.get_vocab(), unk_token="[UNK]"))
        trained.add_special_tokens(list(SPECIAL_TOKENS))
        trained.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
        )
        return cls(trained.to_str())

    def __len__(self) -> int:
        return int(self._engine.get_vocab_size())

    def encode(self, texts: Sequence[str], length: int) -> list[Tensor]:
        """One int32 tensor of at most `length` pieces per text; the last piece is always [SEP]."""
        self._engine.enable_truncation(length)
        return [torch.tensor(found.ids, dtype=torch.int32) for found in self._engine.encode_batch(list(texts))]

    def describe(self) -> str:
        """The whole tokenizer as JSON text, which the constructor takes; it travels in checkpoints."""
        return str(self._engine.to_str())


@dataclass(frozen=True)
class Documents:
    """Token sequences with labels, padded to the longest of their batch."""

    tokens: list[Tensor]
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """{"tokens": (N, S), "lengths": (N,), "attention_mask": (N, S) of 1 and 0, "target": (N,)}, all int64."""
        chosen = [self.tokens[index] for index in indices.tolist()]
        tokens = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=PAD).long()
        lengths = torch.tensor([len(sequence) for sequence in chosen])
        mask = (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).long()
        batch = {"tokens": tokens, "lengths": lengths, "attention_mask": mask, "target": self.labels[indices]}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def majority(self) -> float:
        """Accuracy of always answering the most frequent class: what any classifier must beat."""
        return float(self.labels.bincount().max() / len(self.labels))


def docstrings(classes: int = 8, per_class: int = 400) -> tuple[Labelled, Labelled]:
    """(train, held out): docstrings of the standard library with the package they come from.

    The packages with most docstrings, at most `per_class` from each; a text that occurs twice, or under two packages,
    counts once or not at all, so that none of the held-out texts is known from training.
    """
    found: dict[str, str | None] = {}
    for name, path in standard_library_files():
        package = name.split("/")[0].removesuffix(".py")
        for text in _docstrings_of(path):
            found[text] = package if found.get(text, package) == package else None
    ours = [(text, package) for text, package in found.items() if package is not None]
    most = [package for package, _ in Counter(package for _, package in ours).most_common(classes)]
    return split(_at_most(per_class, [pair for pair in ours if pair[1] in most]))


def labelled_file(
    path: str | Path, *, text_column: str = "text", label_column: str = "label"
) -> tuple[Labelled, Labelled]:
    """(train, held out) from a CSV file with a header line, or JSON Lines, with one text and one label a row.

    Raises:
        DataError: no such file, no such column, an empty text, a broken line (its number is named), or one class only.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"table: {file} is not a file")
    if file.suffix.lower() not in {".csv", ".jsonl"}:
        raise DataError(f"table: {file} must end in .csv or .jsonl")
    rows = _csv_rows(file) if file.suffix.lower() == ".csv" else _json_rows(file)
    pairs: Labelled = []
    for line, row in rows:
        for column in (text_column, label_column):
            if row.get(column) in (None, ""):
                raise DataError(f"table: {file}, line {line}: no {column!r}; it has {', '.join(map(repr, row))}")
        pairs.append((str(row[text_column]), str(row[label_column])))
    if len({label for _, label in pairs}) < 2:
        raise DataError(f"table: {file} has {len(pairs)} rows of fewer than two classes")
    parts = split(pairs)
    if not parts[0]:
        raise DataError(f"table: {file} has one row of each class, and those are held out: nothing is left to learn")
    return parts


def split(pairs: Labelled) -> tuple[Labelled, Labelled]:
    """(train, held out): one fixed permutation, a fifth of every class (at least one of each) held out."""
    shuffled = sorted(pairs)
    random.Random(0).shuffle(shuffled)
    quota = {label: max(1, count // ONE_IN) for label, count in Counter(label for _, label in pairs).items()}
    train: Labelled = []
    test: Labelled = []
    for text, label in shuffled:
        if quota[label]:
            quota[label] -= 1
            test.append((text, label))
        else:
            train.append((text, label))
    return train, test


def _at_most(per_class: int, pairs: Labelled) -> Labelled:
    shuffled = sorted(pairs)
    random.Random(0).shuffle(shuffled)
    seen: Counter[str] = Counter()
    kept = []
    for text, label in shuffled:
        seen[label] += 1
        if seen[label] <= per_class:
            kept.append((text, label))
    return kept


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"table: {file}, line {reader.line_num}: {error}") from error


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"table: {file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"table: {file}, line {number} is not an object with a text and a label")
            yield number, row
