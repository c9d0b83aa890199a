"""Decoding of benchmark prompts: one prefill per prompt for all seeds, and results that do not depend on the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from pipeline.data.examples import EncodedPrompt
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.evaluation.kv_cache import AnyLayer, keep_rows, with_room
from pipeline.evaluation.sampling import SeenNgrams, filter_top_p, sample, uniform_noise


@dataclass(frozen=True)
class DecodingProtocol:
    """How responses are decoded; stored with every score (hazard 11).

    Attributes:
        max_new_tokens: most tokens of a response, the end token included.
        do_sample: sample from the model's distribution, or take the most probable token.
        temperature: divides the logits; only sampling reads it.
        top_p: mass of the nucleus that is sampled from, 1 for the whole vocabulary; only sampling reads it.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and response together; 0 allows all.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (do_sample=False is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class Generation:
    """One decoded response.

    Attributes:
        id: the example's id.
        seed: the decoding seed.
        token_ids: generated tokens, ending with the end token where `finished`.
        finished: the model ended the response itself; False where it was cut at the limit.
    """

    id: str
    seed: int
    token_ids: tuple[int, ...]
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    protocol: DecodingProtocol,
    seeds: Sequence[int],
    batch_size: int,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Generation]:
    """Decode every prompt with every seed, batch by batch in the order of `plan_batches`.

    The noise of a sampled token belongs to (seed, example id, step). So a response does not depend on batch size, batch
    composition or order, save for the rounding that padding and batched matrix products bring into the logits.

    Args:
        model: a causal language model; decoded in evaluation mode, its mode is restored.
        tokenizer: gives the end token and the padding token.
        prompts: the rows, with distinct ids.
        protocol: how to decode.
        seeds: decoding seeds, distinct. Greedy decoding uses the first alone.
        batch_size: sequences (prompts × seeds) decoded together.
        max_length: most tokens of prompt and response together; None sets no limit beyond the protocol's.
        progress: called with the number of responses that have just ended.

    Raises:
        ConfigError: prompt and response would not fit into the model's context or `max_length`.
        DataError: a prompt without tokens, or an id that occurs twice.
        ModelError: logits that are not finite, or no end token.
        ValueError: `batch_size` below 1, no seeds or a repeated seed.
    """
    batches = plan_batches(prompts, protocol, seeds, batch_size)
    check_lengths(context_length(model.config), prompts, protocol, max_length)
    decoder = Decoder(model, tokenizer, protocol, seeds, batch_size, max_length)
    return (generation for batch in batches for generation in decoder.decode(batch, progress))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a response: special tokens skipped, spaces at both ends stripped."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def plan_batches(
    prompts: Sequence[EncodedPrompt], protocol: DecodingProtocol, seeds: Sequence[int], batch_size: int
) -> list[list[EncodedPrompt]]:
    """Batches of prompts of similar length, longest first, so that memory runs out at the start or not at all.

    Raises:
        DataError: an id occurs twice.
        ValueError: `batch_size` below 1, no seeds or a repeated seed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise DataError(f"{len(repeated)} prompt ids occur more than once, the first is {repeated[0]}; remove the duplicates")
    size = max(1, batch_size // len(used_seeds(protocol, seeds)))
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.input_ids), prompt.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def used_seeds(protocol: DecodingProtocol, seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds that lead to different responses: all for sampling, the first for greedy decoding.

    Raises:
        ValueError: no seeds, or one occurs twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"decoding seeds {list(seeds)}: give at least one, each once")
    return tuple(seeds) if protocol.do_sample else (seeds[0],)


def context_length(config: PretrainedConfig) -> int | None:
    """Positions that a model has; None for one without a limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def check_lengths(
    context: int | None, prompts: Sequence[EncodedPrompt], protocol: DecodingProtocol, max_length: int | None
) -> None:
    """Refuse prompts that leave no room for their response, before anything is decoded.

    Raises:
        ConfigError: prompt and response would not fit into the `context` positions of the model or `max_length`.
        DataError: a prompt without tokens.
    """
    for prompt in prompts:
        length = len(prompt.input_ids)
        if length == 0:
            raise DataError(f"prompt {prompt.id} has no tokens; a prompt needs at least one")
        if max_length is not None and length >= max_length:
            raise ConfigError(
                f"prompt {prompt.id} has {length} tokens, which leaves no room for a response within max_length {max_length}; "
                "raise max_length or lower max_prompt_tokens"
            )
        needed = length + _budget(prompt, protocol, max_length)
        if context is not None and needed > context:
            raise ConfigError(
                f"prompt {prompt.id} ({length} tokens) and its response ({needed - length} tokens) need {needed} positions, "
                f"the model has {context}; lower max_prompt_tokens or max_new_tokens by {needed - context}"
            )


@dataclass(frozen=True)
class Decoder:
    """Decodes batches of prompts with one model and protocol; the arguments are those of `generate`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    protocol: DecodingProtocol
    seeds: Sequence[int]
    batch_size: int
    max_length: int | None = None

    def decode(self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], None] | None = None) -> list[Generation]:
        """The responses to one batch of prompts, in the order prompts × seeds.

        Raises:
            ModelError: see `generate`.
        """
        was_training = self.model.training
        self.model.train(False)
        try:
            rows = self._decode(prompts, progress)
        finally:
            self.model.train(was_training)
        by_key = {(row.id, row.seed): row for row in rows}
        ordered = [by_key[prompt.id, seed] for prompt in prompts for seed in used_seeds(self.protocol, self.seeds)]
        return [Generation(row.id, row.seed, tuple(row.tokens), row.finished) for row in ordered]

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], None] | None) -> list[_Row]:
        end, pad = _end_and_pad(self.tokenizer)
        seeds = used_seeds(self.protocol, self.seeds)
        prefix = _prefill(self.model, prompts, pad)
        # More seeds than a batch holds: the same prefix serves several turns.
        turns = [seeds[start : start + self.batch_size] for start in range(0, len(seeds), self.batch_size)]
        rows: list[_Row] = []
        for turn in turns:
            layers = prefix.layers if turn is turns[-1] else list(prefix.layers)
            batch = _start(prefix, layers, prompts, turn, self.protocol, self.max_length)
            rows += batch.rows
            _run(self.model, batch, self.protocol, end, progress)
        return rows


@dataclass(slots=True)
class _Row:
    id: str
    seed: int
    budget: int
    seen: SeenNgrams | None
    tokens: list[int]
    finished: bool = False

    @property
    def ended(self) -> bool:
        return self.finished or len(self.tokens) == self.budget

    def push(self, token: int, end: int) -> None:
        self.tokens.append(token)
        self.finished = token == end
        if self.seen is not None:
            self.seen.push(token)


@dataclass
class _Prefix:
    """The prefilled prompts: cache layers of P rows, attention mask [P, T] padded on the left, first token's logits [P, V]."""

    layers: list[AnyLayer]
    mask: Tensor
    logits: Tensor


@dataclass
class _Batch:
    """Sequences in progress, one per cache row.

    Attributes:
        rows: R sequences.
        cache: R rows of T tokens, from `with_room`.
        mask: [R, T] 1 for real tokens.
        positions: [R] position of the next token.
        uniforms: [R, S] the noise of every step.
        logits: [R, V] of the next token.
    """

    rows: list[_Row]
    cache: Cache
    mask: Tensor
    positions: Tensor
    uniforms: Tensor
    logits: Tensor


def _end_and_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end token, so no response could end; set its eos_token")
    # Padding is masked by position, so any valid token will do (hazard 6).
    return int(end), int(end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _budget(prompt: EncodedPrompt, protocol: DecodingProtocol, max_length: int | None) -> int:
    room = protocol.max_new_tokens if max_length is None else max_length - len(prompt.input_ids)
    return min(protocol.max_new_tokens, room)


def _prefill(model: PreTrainedModel, prompts: Sequence[EncodedPrompt], pad: int) -> _Prefix:
    shape = (len(prompts), max(len(prompt.input_ids) for prompt in prompts))
    input_ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, -len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        mask[row, -len(prompt.input_ids) :] = 1
    mask = mask.to(model.device)
    cache = DynamicCache(config=model.config)
    # Learned positions count tokens, not columns, so that left padding does not shift them (hazard 6).
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = _forward(model, input_ids.to(model.device), mask, positions, cache)
    return _Prefix(cache.layers, mask, logits)


def _forward(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """[R, V] float32 logits of the token after the last column; the cache grows by the input."""
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


def _start(
    prefix: _Prefix,
    layers: list[AnyLayer],
    prompts: Sequence[EncodedPrompt],
    seeds: Sequence[int],
    protocol: DecodingProtocol,
    max_length: int | None,
) -> _Batch:
    size = protocol.no_repeat_ngram_size
    rows: list[_Row] = []
    for prompt in prompts:
        seen = SeenNgrams(size, prompt.input_ids) if size else None
        budget = _budget(prompt, protocol, max_length)
        rows += [_Row(prompt.id, seed, budget, seen.copy() if seen else None, []) for seed in seeds]
    mask = prefix.mask.repeat_interleave(len(seeds), dim=0)
    return _Batch(
        rows=rows,
        # The last token of a response is never fed back.
        cache=with_room(layers, copies=len(seeds), room=max(row.budget for row in rows) - 1),
        mask=mask,
        positions=mask.sum(dim=1),
        uniforms=torch.from_numpy(_noise(rows, protocol)).to(mask.device),
        logits=prefix.logits.repeat_interleave(len(seeds), dim=0),
    )


def _noise(rows: Sequence[_Row], protocol: DecodingProtocol) -> NDArray[np.float64]:
    if not protocol.do_sample:
        return np.zeros((len(rows), 0))
    return np.stack([uniform_noise(row.seed, row.id, protocol.max_new_tokens) for row in rows])


def _run(
    model: PreTrainedModel,
    batch: _Batch,
    protocol: DecodingProtocol,
    end: int,
    progress: Callable[[int], None] | None,
) -> None:
    for step in range(protocol.max_new_tokens):
        for row, token in zip(batch.rows, _choose(batch, protocol, step).tolist(), strict=True):
            row.push(token, end)
        remaining = [index for index, row in enumerate(batch.rows) if not row.ended]
        ended = len(batch.rows) - len(remaining)
        if ended and progress is not None:
            progress(ended)
        if not remaining:
            return
        if ended:
            _keep(batch, remaining)
        _advance(model, batch)


def _choose(batch: _Batch, protocol: DecodingProtocol, step: int) -> Tensor:
    """[R] next tokens, with the processors in transformers' order: n-grams, temperature, top-p."""
    logits = batch.logits
    _ban_repeats(logits, batch.rows)
    best, likeliest = logits.max(dim=-1)
    _check_finite(best, batch.rows)
    if not protocol.do_sample:
        return likeliest
    if protocol.temperature != 1:
        logits = logits / protocol.temperature
    return sample(filter_top_p(logits, protocol.top_p), batch.uniforms[:, step])


def _ban_repeats(logits: Tensor, rows: Sequence[_Row]) -> None:
    banned = [(index, token) for index, row in enumerate(rows) if row.seen is not None for token in row.seen.banned()]
    if banned:
        index = torch.tensor(banned, device=logits.device)
        logits[index[:, 0], index[:, 1]] = -torch.inf


def _check_finite(best: Tensor, rows: Sequence[_Row]) -> None:
    finite = best.isfinite()
    if not bool(finite.all()):
        row = rows[finite.tolist().index(False)]
        raise ModelError(
            f"no finite next-token logits after {len(row.tokens)} tokens of the response to {row.id}: the model has diverged, "
            "or no_repeat_ngram_size excludes its whole vocabulary; use an earlier checkpoint or lower no_repeat_ngram_size"
        )


def _keep(batch: _Batch, remaining: Sequence[int]) -> None:
    order = keep_rows(batch.cache, remaining)
    index = torch.tensor(order, device=batch.mask.device)
    batch.rows = [batch.rows[row] for row in order]
    batch.mask, batch.positions, batch.uniforms = batch.mask[index], batch.positions[index], batch.uniforms[index]


def _advance(model: PreTrainedModel, batch: _Batch) -> None:
    tokens = torch.tensor([[row.tokens[-1]] for row in batch.rows], device=batch.mask.device)
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(tokens.shape)], dim=1)
    batch.logits = _forward(model, tokens, batch.mask, batch.positions[:, None], batch.cache)
    batch.positions = batch.positions + 1
