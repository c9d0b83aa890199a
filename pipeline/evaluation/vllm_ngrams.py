"""`no_repeat_ngram_size` for vLLM, which has no such setting, as a custom logits processor that its workers load by name."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROCESSOR = "pipeline.evaluation.vllm_ngrams:NoRepeatNgrams"
"""For `vllm.LLM(logits_processors=[PROCESSOR])`."""
ARGUMENT = "no_repeat_ngram_size"
"""The key of `SamplingParams.extra_args` that holds the size; requests without it, or with 0, are left alone."""
_INTERFACE = "vllm.v1.worker.gpu.sample.logits_processor"


def supported() -> bool:
    """Whether the installed vLLM has the interface of custom logits processors that sees prompt and response (0.32 on)."""
    try:
        importlib.import_module(_INTERFACE)
    except ImportError:
        return False
    return True


def ban_repeats(logits: Tensor, tokens: Tensor, lengths: Tensor, size: int) -> None:
    """Set the logits of tokens that would repeat an n-gram to −inf, in place; as transformers' NoRepeatNGramLogitsProcessor.

    Args:
        logits: [R, V] of the next token.
        tokens: [R, T] prompt and response so far; what lies behind `lengths` is not looked at.
        lengths: [R] tokens of each row.
        size: n, at least 1.
    """
    if tokens.shape[1] < size:
        return
    ngrams = tokens.long().unfold(1, size, 1)
    ends = torch.arange(size, tokens.shape[1] + 1, device=tokens.device)
    # The n − 1 latest tokens; a row that has fewer has no whole n-gram either.
    latest = lengths[:, None] + torch.arange(1 - size, 0, device=tokens.device)
    current = tokens.long().gather(1, latest.clamp(min=0))
    repeats = (ngrams[..., :-1] == current[:, None]).all(-1) & (ends <= lengths[:, None])
    rows, starts = repeats.nonzero(as_tuple=True)
    logits[rows, ngrams[rows, starts, -1]] = -torch.inf


def __getattr__(name: str) -> Any:
    # The class derives from one of vLLM's, so there is none to define where vLLM is not installed.
    if name == "NoRepeatNgrams":
        return _processor()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _processor() -> type[Any]:
    interface = importlib.import_module(_INTERFACE)

    class NoRepeatNgrams(interface.LogitsProcessor):  # type: ignore[misc, name-defined]
        """Bans repeated n-grams of prompt and response, before temperature and top-p, for vLLM's Model Runner V2."""

        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            if vllm_config.speculative_config is not None:
                raise ValueError(f"{ARGUMENT} does not work with speculative decoding, whose draft tokens it does not see")
            self._tokens = req_states.all_token_ids
            self._sizes = np.zeros(req_states.max_num_reqs, dtype=np.int64)

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            size = _size(sampling_params)
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"{ARGUMENT} is {size!r}; it must be a whole number, 0 or more")

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            # The slot may have been another request's.
            self._sizes[req_idx] = _size(sampling_params)
            return bool(self._sizes[req_idx] > 0)

        def apply(self, logits: Tensor, ctx: Any) -> Tensor:
            sizes = self._sizes[ctx.idx_mapping_np]
            for size in np.unique(sizes[sizes > 0]).tolist():
                found = np.flatnonzero(sizes == size)
                rows = torch.from_numpy(found).to(logits.device)
                longest = int(ctx.seq_lens_upper_bound_np[found].max())
                tokens = self._tokens.gpu[ctx.idx_mapping[rows].long(), :longest]
                chosen = logits[rows]
                ban_repeats(chosen, tokens, ctx.pos[rows] + 1, size)
                logits[rows] = chosen
            return logits

    return NoRepeatNgrams


def _size(sampling_params: Any) -> Any:
    return (sampling_params.extra_args or {}).get(ARGUMENT, 0)
