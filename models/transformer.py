"""Transformers after Vaswani et al., "Attention Is All You Need" (2017): a text classifier and a causal language model.

The blocks are torch.nn's (their formula is the paper's); attention is also written out as `MultiHeadAttention`, which
takes the weights of `nn.MultiheadAttention` and is what a textbook implementation costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(d)) V and the weights, for (..., S, d) tensors; `allowed` is True where Q may see K."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)
    return weights @ value, weights


class MultiHeadAttention(nn.Module):
    """concat(head_1 .. head_h) W_o with head_i = attention(Q W_q,i, K W_k,i, V W_v,i); all tensors (B, S, d_model)."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def like(cls, other: nn.MultiheadAttention) -> MultiHeadAttention:
        """The same function as `other`, with copies of its weights."""
        ours = cls(other.embed_dim, other.num_heads, other.dropout).to(other.in_proj_weight)
        with torch.no_grad():
            weights, biases = other.in_proj_weight.chunk(3), other.in_proj_bias.chunk(3)
            for linear, weight, bias in zip((ours.query, ours.key, ours.value), weights, biases, strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            ours.output.load_state_dict(other.out_proj.state_dict())
        return ours.train(other.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.query(query)), self.split(self.key(key)), self.split(self.value(value))
        _, weights = attention(q, k, v, allowed)
        heads = self.dropout(weights) @ v
        return self.output(heads.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(B, S, d_model) -> (B, heads, S, d_model / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PositionalEncoding(nn.Module):
    """x + PE with PE[s, 2i] = sin(s / 10000^(2i/d)) and PE[s, 2i+1] = cos(s / 10000^(2i/d)), then dropout."""

    def __init__(self, d_model: int, max_length: int, dropout: float = 0.0) -> None:
        super().__init__()
        position = torch.arange(max_length, dtype=torch.float32)[:, None]
        frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        table = torch.zeros(max_length, d_model)
        table[:, 0::2] = torch.sin(position * frequency)
        table[:, 1::2] = torch.cos(position * frequency)[:, : d_model // 2]
        self.register_buffer("table", table, persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.table.shape[0]:
            raise ValueError(f"a sequence of {x.shape[1]} tokens is longer than max_length {self.table.shape[0]}")
        return self.dropout(x + self.table[: x.shape[1]].to(x.dtype))


class TransformerClassifier(nn.Module):
    """Encoder over token ids (B, S), mean over the real tokens, linear: logits (B, classes).

    Positions that hold `padding_id` are neither attended to nor averaged; a row of padding alone gets the logits of a
    zero vector.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        d_model: int = 256,
        num_heads: int = 4,
        num_layers: int = 4,
        d_feedforward: int = 1024,
        dropout: float = 0.1,
        max_length: int = 512,
        padding_id: int = 0,
    ) -> None:
        super().__init__()
        self.padding_id = padding_id
        self.embedding = nn.Embedding(vocabulary, d_model, padding_idx=padding_id)
        self.positions = PositionalEncoding(d_model, max_length, dropout)
        layer = nn.TransformerEncoderLayer(d_model, num_heads, d_feedforward, dropout, batch_first=True)
        # without nested tensors: they read the mask on the host in every evaluation
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(d_model, classes)
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == self.padding_id
        x = self.positions(self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim))
        x = self.encoder(x, src_key_padding_mask=padding)
        # where, not a product: a row of padding alone is NaN in stock attention
        x = torch.where(padding[..., None], 0.0, x).sum(1)
        count = (~padding).sum(1, keepdim=True).clamp(min=1)
        return self.classifier(x / count.to(x.dtype))


class CausalLanguageModel(nn.Module):
    """Decoder-only model: logits (B, S, vocabulary) of the next token; position s sees positions 0..s only.

    Pre-norm blocks and an output tied to the embedding, as in GPT-2 (Radford et al., 2019).
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int = 256,
        num_heads: int = 4,
        num_layers: int = 4,
        d_feedforward: int = 1024,
        dropout: float = 0.1,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.positions = PositionalEncoding(d_model, max_length, dropout)
        layer = nn.TransformerEncoderLayer(
            d_model, num_heads, d_feedforward, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(d_model)
        self.blocks = nn.TransformerEncoder(layer, num_layers, norm=norm, enable_nested_tensor=False)
        hidden = torch.ones(max_length, max_length, dtype=torch.bool).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.positions(self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim))
        x = self.blocks(x, mask=self.hidden[:length, :length], is_causal=True)
        return x @ self.embedding.weight.T

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Append the `count` most likely tokens one by one (no cache: each step runs the whole prefix)."""
        for _ in range(count):
            tokens = torch.cat([tokens, self(tokens)[:, -1:].argmax(-1)], 1)
        return tokens


def initialise(model: nn.Module) -> None:
    """Xavier for every matrix, embeddings N(0, 1/d): after the sqrt(d) factor they match the positions in size.

    Also makes the layers differ: nn.TransformerEncoder copies one.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
