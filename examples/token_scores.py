"""Scores of tokens for a pruner of your own, beside whatever attention the model runs.

    python examples/token_scores.py models/tiny-llava-next models/tiny-llava-next/pages/demo.png EC

Flash and SDPA attention never write the attention matrix, so a method that ranks tokens by it has nothing to read.
``probe_scores`` gives every token a score without that matrix: 128 probe queries attend to all keys, in memory that
grows with the number of tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zipvl import ops


@dataclass(frozen=True)
class LayerScores:
    """What one layer's probes attended to in a prompt of ``N`` tokens; both float32 ``[B, N]``.

    Attributes:
        accumulated: attention summed over the probes, mean over heads. A row sums to its number of probes.
        normalized: the same divided by the number of probes that may see the token, so that late tokens are not at a
            disadvantage. Rank by it.
    """

    accumulated: Tensor
    normalized: Tensor


@contextmanager
def token_scores(model: PreTrainedModel, attention: str = "sdpa") -> Iterator[list[LayerScores]]:
    """Collects scores of every decoder layer for each prompt that ``model`` reads inside the block.

    Args:
        model: a causal language model or image-text-to-text model of transformers.
        attention: the attention function that computes the outputs: ``sdpa``, ``flash_attention_2``, ... Scores know
            padding from ``sdpa``'s mask; with another function pass prompts without padding.

    Yields:
        A list that gets one entry a layer and prompt.
    """
    found: list[LayerScores] = []

    def scored(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        if query.shape[2] > 1:  # a prompt, not a decode step
            # The last row of a causal mask sees every real token.
            real = attention_mask[:, 0, -1] if attention_mask is not None and attention_mask.ndim == 4 else None
            probes = ops.probe_index(query, k=key, token_mask=real)
            scale = kwargs.get("scaling")
            scores = ops.probe_scores(query, key, probes, scale=scale, token_mask=real)  # type: ignore[arg-type]
            found.append(LayerScores(*scores))
        return ALL_ATTENTION_FUNCTIONS[attention](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("token_scores", scored)
    AttentionMaskInterface.register("token_scores", AttentionMaskInterface().get(attention, sdpa_mask))
    config = model.get_decoder().config
    before, config._attn_implementation = config._attn_implementation, "token_scores"
    try:
        yield found
    finally:
        config._attn_implementation = before


def main(name: str, page: str, question: str) -> None:
    """Prints how many tokens each layer needs for nine tenths of its attention, and which ones all layers look at."""
    processor, model = AutoProcessor.from_pretrained(name), AutoModelForImageTextToText.from_pretrained(name)
    content = [{"type": "image", "url": page}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad(), token_scores(model) as layers:
        model(**inputs)
    for i, layer in enumerate(layers):
        _, count = ops.select_tokens(layer.accumulated, layer.normalized, tau=0.9)
        print(f"layer {i}: {int(count[0]):,} of {layer.normalized.shape[1]:,} tokens hold 0.9 of the attention")
    mean = torch.stack([layer.normalized for layer in layers]).mean(0)
    print("the ten tokens that all layers look at most:", mean[0].topk(10).indices.sort().values.tolist())


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
