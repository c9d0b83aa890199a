"""Scores on the dev rows during training: cross-entropy and ROUGE-L of generations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.collate import batches_by_length
from pipeline.data.examples import EncodedExample, EncodedPrompt
from pipeline.evaluation.generate import DecodingProtocol, decode, generate
from pipeline.evaluation.rouge import score
from pipeline.losses.fused import vocab_cross_entropy
from pipeline.models.lens import LogitLens


@torch.no_grad()
def dev_loss(
    model: PreTrainedModel, lens: LogitLens, rows: Sequence[EncodedExample], batch_size: int, pad_token_id: int
) -> float:
    """Mean cross-entropy per response token, nats."""
    total, tokens = 0.0, 0
    for cpu_batch in batches_by_length(rows, batch_size, pad_token_id):
        batch = cpu_batch.to(model.device)
        states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        final = states.last_hidden_state.flatten(0, 1)[batch.response_positions]
        count = len(batch.response_positions)
        total += float(vocab_cross_entropy(final, lens.head, batch.response_labels)) * count
        tokens += count
    return total / max(tokens, 1)


def dev_rouge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    protocol: DecodingProtocol,
    seed: int,
    batch_size: int,
) -> float:
    """ROUGE-L F of one generation per prompt, 0–100."""
    texts = {
        generation.id: decode(tokenizer, generation.token_ids)
        for generation in generate(model, tokenizer, prompts, protocol, [seed], batch_size)
    }
    return score([texts[prompt.id] for prompt in prompts], [prompt.references for prompt in prompts]).rouge_l
