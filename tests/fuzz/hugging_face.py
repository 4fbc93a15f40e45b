"""The attention and mask functions that transformers calls, against its own eager ones."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.attention import score_terms
from tests.fuzz.engine import (
    KERNEL_FLOATS,
    ROUNDED_FLOATS,
    SEEDED_DROPOUT,
    SEEDS,
    agree,
    environment,
    fuzzed,
    rarely,
    seeded,
    specs,
)


@dataclass(frozen=True)
class Model:
    tensors: tuple[Any, ...]  # query, key, value, a bias or None, sinks or None
    sees: str  # which mask function of transformers
    window: int
    past: int  # keys of a cache, before those of the queries
    padding: Any  # (B, Sk), True at real tokens, or None
    skip: bool  # whether a mask may be left out
    options: dict[str, Any]
    impl: str
    seed: int


class SelfAttention(nn.Module):
    """What an attention module tells by its attributes and the arguments of its forward."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@st.composite
def models(draw: Any, impl: str, dtypes: Any) -> Model:
    dtype, batch, heads = draw(dtypes), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([1, 2])) if heads > 1 else 1
    q_len, past = draw(st.integers(1, 6)), draw(rarely(st.just(0), st.integers(1, 4)))
    k_len, width = past + q_len, draw(st.sampled_from([4, 8]))
    shapes = [(batch, heads, q_len, width), *[(batch, heads // groups, k_len, width)] * 2]
    tensors = [draw(specs(shape, dtype)) for shape in shapes]
    odd = rarely(st.just(False), st.just(True))
    tensors.append(draw(specs((1, heads, q_len, k_len), dtype)) if draw(odd) else None)
    tensors.append(draw(specs((heads,), dtype)) if draw(odd) else None)
    padding, side = None, draw(st.sampled_from(["none", "right", "left", "anywhere"]))
    if side == "anywhere":
        padding = torch.tensor([[draw(st.booleans()) for _ in range(k_len)] for _ in range(batch)])
    elif side != "none":
        real = torch.tensor([[draw(st.integers(0, k_len))] for _ in range(batch)])
        place = torch.arange(k_len)
        padding = place < real if side == "right" else place >= k_len - real
    options: dict[str, Any] = {"output_attentions": draw(odd)}
    if draw(st.booleans()):
        options["scaling"] = draw(st.sampled_from([0.3, 1.0]))
    if draw(odd):
        options["softcap"] = 2.0
    options["dropout"] = draw(st.sampled_from([0.0, 0.0, 0.5 if SEEDED_DROPOUT and impl == "auto" else 1.0, 1.0]))
    sees = draw(st.sampled_from(["causal", "both", "window", "window of both"]))
    skip = draw(rarely(st.just(True), st.just(False)))
    return Model(tuple(tensors), sees, draw(st.integers(1, 7)), past, padding, skip, options, impl, draw(SEEDS))


def model_call(case: Model) -> str:
    from transformers import masking_utils

    from fastops.integrations.transformers import fastops_attention, fastops_mask

    causal = case.sees in ("causal", "window")
    function = {
        "causal": masking_utils.causal_mask_function,
        "both": masking_utils.bidirectional_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(case.window),
        "window of both": masking_utils.sliding_window_bidirectional_mask_function(case.window),
    }[case.sees]
    batch, _, q_len, _ = case.tensors[0].shape
    sizes = (batch, q_len, case.past + q_len, case.past)
    usual: dict[str, Any] = {"mask_function": function, "attention_mask": case.padding}
    visible = masking_utils.sdpa_mask(*sizes, **usual, allow_is_causal_skip=False)
    alive = visible.any(-1)[:, 0].expand(batch, -1)  # other queries get of eager a mean of all values
    if case.padding is not None:
        alive = alive & case.padding[:, case.past :]
    module = SelfAttention(causal)

    def shown(out: Tensor, weights: Tensor | None) -> list[Tensor]:
        found = [out * alive[:, :, None, None]]
        return found if weights is None else [*found, weights * alive[:, None, :, None]]

    def ours(query: Tensor, key: Tensor, value: Tensor, bias: Any, sinks: Any) -> Any:
        skips = {"allow_is_causal_skip": causal and case.skip, "allow_is_bidirectional_skip": not causal and case.skip}
        mask = fastops_mask(*sizes, **usual, **skips)
        return shown(
            *fastops_attention(module, query, key, value, mask, position_bias=bias, s_aux=sinks, **case.options)
        )

    def eager(query: Tensor, key: Tensor, value: Tensor, bias: Any, sinks: Any) -> Any:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = query @ key.mT * case.options.get("scaling", query.shape[-1] ** -0.5)
        if "softcap" in case.options:
            scores = (scores / case.options["softcap"]).tanh() * case.options["softcap"]
        scores = scores if bias is None else scores + bias
        scores = scores + masking_utils.eager_mask(*sizes, **usual, dtype=query.dtype)
        if sinks is not None:
            scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(batch, -1, q_len, 1)], -1)
        weights = scores.softmax(-1)
        weights = weights if sinks is None else weights[..., :-1]
        weights = nn.functional.dropout(weights, case.options["dropout"])
        return shown((weights @ value).transpose(1, 2), weights if case.options["output_attentions"] else None)

    terms, explicit = score_terms(case.options.get("scaling")), case.impl == "triton"
    with environment(FASTOPS_IMPL="triton" if explicit else None):
        return agree(seeded(ours, case.seed), seeded(eager, case.seed), case.tensors, explicit=explicit, terms=terms)


if importlib.util.find_spec("transformers") is not None:

    @fuzzed(models("auto", ROUNDED_FLOATS))
    def transformers_attention(case: Model) -> str:
        return model_call(case)

    @fuzzed(models("triton", KERNEL_FLOATS))
    def transformers_attention_kernels(case: Model) -> str:
        return model_call(case)
