"""Recurrent nets after Elman (1990) and Hochreiter & Schmidhuber (1997): a byte language model and a classifier.

Embedding, one or more recurrent layers, a linear head: plain torch.nn, batch first. The classifier reads rows of
different lengths without packing them: padding follows the text, so the state at the last token has not seen it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CELLS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def recurrent(cell: str, inputs: int, hidden: int, layers: int, dropout: float) -> nn.RNNBase:
    """`layers` recurrent layers with dropout between them; cell is "rnn" (tanh), "gru" or "lstm".

    Recurrent weights are orthogonal, so that a gradient keeps its length over many steps at the start (Saxe et al.,
    2013), and an LSTM begins by remembering: its forget gate has bias 1 (Jozefowicz et al., 2015).
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, CELLS))}, got {cell!r}")
    net = CELLS[cell](inputs, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
    for name, parameter in net.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.split(hidden):
                nn.init.orthogonal_(gate)
        elif cell == "lstm" and name.startswith("bias"):
            with torch.no_grad():  # the two biases are added
                parameter[hidden : 2 * hidden] = 1.0 if name.startswith("bias_ih") else 0.0
    return net


class ByteLanguageModel(nn.Module):
    """Logits (B, S, 256) of the byte after each of `tokens` (B, S).

    Args:
        cell: "rnn", "gru" or "lstm".
        embedding: features of a byte.
        hidden: units of a layer.
        layers: recurrent layers.
        dropout: rate after the embedding, between layers and before the head.
        vocabulary: different tokens; 256 bytes.
    """

    def __init__(
        self,
        cell: str = "lstm",
        embedding: int = 64,
        hidden: int = 256,
        layers: int = 1,
        dropout: float = 0.0,
        vocabulary: int = 256,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.net = recurrent(cell, embedding, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.step(tokens)[0]

    def step(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits, and the state from which to go on with the tokens that follow."""
        output, state = self.net(self.dropout(self.embedding(tokens)), state)
        return self.head(self.dropout(output)), state

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.0) -> Tensor:
        """Append `count` tokens: the most likely ones, or drawn from softmax(logits / temperature)."""
        logits, state = self.step(tokens)
        for _ in range(count):
            last = logits[:, -1]
            if temperature:
                chosen = (last / temperature).softmax(-1).multinomial(1)
            else:
                chosen = last.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
            logits, state = self.step(chosen, state)
        return tokens


class SequenceClassifier(nn.Module):
    """Logits (B, classes) from the last state of each row of `tokens` (B, S), whose padding is at the end.

    Args:
        vocabulary: different tokens.
        classes: different labels.
        cell: "rnn", "gru" or "lstm".
        embedding: features of a token.
        hidden: units of a layer.
        layers: recurrent layers.
        dropout: rate after the embedding, between layers and before the head.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        cell: str = "lstm",
        embedding: int = 64,
        hidden: int = 128,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.net = recurrent(cell, embedding, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`lengths` (B,) counts the tokens of each row that are text, at least 1; None where all are."""
        output, _ = self.net(self.dropout(self.embedding(tokens)))
        if lengths is None:
            last = output[:, -1]
        else:
            place = (lengths.to(output.device) - 1).view(-1, 1, 1).expand(-1, 1, output.shape[-1])
            last = output.gather(1, place).squeeze(1)
        return self.head(self.dropout(last))
