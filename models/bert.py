"""BERT (Devlin et al., 2018) for sequence classification: the encoder of transformers, dropout and a linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class BertClassifier(nn.Module):
    """Logits (B, classes) from the pooled [CLS] output; `attention_mask` (B, S) is 1 at real tokens, 0 at padding.

    Random weights from a transformers `BertConfig` (BERT-base by default); `from_pretrained` for trained ones.
    `attention="fastops"` needs `import fastops.integrations.transformers` first.
    """

    def __init__(self, classes: int = 2, config: Any = None, attention: str | None = None, bert: Any = None) -> None:
        super().__init__()
        if bert is None:
            from transformers import BertConfig, BertModel

            bert = BertModel(config or BertConfig())
        if attention is not None:
            bert.set_attn_implementation(attention)
        self.bert = bert
        dropout = bert.config.classifier_dropout
        self.dropout = nn.Dropout(bert.config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(bert.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=bert.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, classes: int = 2, attention: str | None = None, **options: Any
    ) -> BertClassifier:
        """Trained encoder from a folder (or a name of the Hugging Face hub, where it can be reached), new classifier.

        Args:
            path: folder with `config.json` and the weights.
            classes: number of classes.
            attention: attention implementation, e.g. "fastops" or "sdpa"; transformers' choice where None.
            options: passed to `BertModel.from_pretrained`, e.g. `dtype=torch.bfloat16`.
        """
        from transformers import BertModel

        bert = BertModel.from_pretrained(str(path), **options)
        return cls(classes, attention=attention, bert=bert).to(bert.dtype)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        pooled = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).pooler_output
        return self.classifier(self.dropout(pooled))
