"""On-policy mixing: some steps train on the student's own samples instead of the given responses (GKD)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.examples import EncodedExample, EncodedPrompt
from pipeline.evaluation.generate import DecodingProtocol, generate


@dataclass(frozen=True)
class OnPolicy:
    """Which steps are on-policy and how their responses are sampled.

    Attributes:
        fraction: λ of GKD, the expected share of on-policy steps, in (0, 1].
        protocol: how the student is sampled.
        seed: of the choice of steps and of the samples.

    Raises:
        ValueError: `fraction` is out of range.

    Source: Agarwal et al. (2024), "On-Policy Distillation of Language Models", Algorithm 1.
    """

    fraction: float
    protocol: DecodingProtocol
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it must be above 0 and at most 1")


def is_on_policy(seed: int, step: int, fraction: float) -> bool:
    """Whether a step trains on the student's own samples: true with probability `fraction`.

    The draw belongs to (seed, step) and no state is kept, so a resumed run takes the same steps on-policy. The steps chosen
    with a smaller fraction are among those chosen with a larger one.
    """
    # 53 bits fill a float's mantissa: the draw stays below 1, so that fraction 1 takes every step.
    return (_digest("step", seed, step) >> 11) / 2**53 < fraction


def sample_seed(seed: int, step: int) -> int:
    """The decoding seed of a step's samples: a row met again in a later epoch gets fresh noise."""
    return _digest("sample", seed, step)


def own_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    protocol: DecodingProtocol,
    seed: int,
    batch_size: int,
    max_tokens: int,
) -> list[EncodedExample]:
    """The rows with the model's own responses in place of the given ones, as constants: nothing is differentiated.

    The noise of a token belongs to (seed, example id, position in the response): which rows are sampled together changes
    a response no more than rounding does, and torch's random state is neither read nor moved. A response has at least one
    token; where the model ends at once it is the end token alone.

    Args:
        model: the student; sampled in evaluation mode, its mode is restored.
        tokenizer: gives the end token.
        rows: B rows with distinct ids.
        protocol: how to decode.
        seed: decoding seed, see `sample_seed`.
        batch_size: rows sampled together.
        max_tokens: most tokens of prompt and response together.

    Returns:
        B rows in the same order with the same ids and prompts; the response is the sampled tokens, with the end token where
        the model ended it itself.

    Raises:
        ConfigError: a prompt leaves no room for a response.
        DataError: an id occurs twice.
        ModelError: logits that are not finite, or no end token.

    Source: Agarwal et al. (2024), Algorithm 1; gradients do not flow through the sampling, section 3.1.
    """
    prompts = [EncodedPrompt(row.id, "", row.input_ids[: row.prompt_tokens], ()) for row in rows]
    generations = generate(model, tokenizer, prompts, protocol, [seed], batch_size, max_tokens)
    responses = {generation.id: generation.token_ids for generation in generations}
    return [EncodedExample(prompt.id, (*prompt.input_ids, *responses[prompt.id]), len(prompt.input_ids)) for prompt in prompts]


def _digest(what: str, seed: int, step: int) -> int:
    """64 uniform bits."""
    return int.from_bytes(hashlib.sha256(f"on-policy {what}\0{seed}\0{step}".encode()).digest()[:8], "big")
