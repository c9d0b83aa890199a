"""Decoding by vLLM on a GPU, in the shape of `pipeline.evaluation.generate.Decoder`; imported only where it is asked for."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.examples import EncodedPrompt
from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation import vllm_ngrams
from pipeline.evaluation.generate import DecodingProtocol, Generation, used_seeds

_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.01, 2.0
_ELSE = "set evaluation.engine=transformers"


class Completion(Protocol):
    """What is read of vLLM's CompletionOutput."""

    token_ids: Sequence[int]
    finish_reason: str | None
    cumulative_logprob: float | None


class RequestOutput(Protocol):
    """What is read of vLLM's RequestOutput."""

    outputs: Sequence[Completion]


class Engine(Protocol):
    """What is used of vLLM's LLM."""

    def generate(
        self, prompts: Sequence[Mapping[str, list[int]]], sampling_params: Sequence[Any], /, *, use_tqdm: bool
    ) -> Sequence[RequestOutput]:
        """The outputs in the order of the prompts."""
        ...


def check_available() -> None:
    """Refuse a machine that cannot run vLLM.

    Raises:
        ConfigError: the package or a CUDA device is missing; names both if both are.
    """
    problems = []
    try:
        importlib.import_module("vllm")
    # An installation that does not fit the machine fails in its shared libraries.
    except (ImportError, OSError) as error:
        problems.append(f"evaluation.engine is vllm, which cannot be imported ({error}); pip install vllm, or {_ELSE}")
    if not torch.cuda.is_available():
        problems.append(
            f"evaluation.engine is vllm, which needs a CUDA device, and there is none; use another machine, or {_ELSE}"
        )
    if problems:
        raise ConfigError(problems)


def check_protocol(protocol: DecodingProtocol) -> None:
    """Refuse what vLLM would not decode as written, before anything is loaded.

    Raises:
        ConfigError: a field that vLLM's SamplingParams does not have, or a value that it replaces by another.
    """
    problems = []
    if protocol.no_repeat_ngram_size and not vllm_ngrams.supported():
        problems.append(
            f"decoding.no_repeat_ngram_size is {protocol.no_repeat_ngram_size}, which this vLLM cannot do; "
            f'pip install "vllm>=0.33", set it to 0 for every model of the comparison, or {_ELSE}'
        )
    if protocol.do_sample and not _LOWEST_TEMPERATURE <= protocol.temperature <= _HIGHEST_TEMPERATURE:
        problems.append(
            f"decoding.temperature is {protocol.temperature}, vLLM samples between {_LOWEST_TEMPERATURE} and "
            f"{_HIGHEST_TEMPERATURE}; change it, or {_ELSE}"
        )
    if problems:
        raise ConfigError(problems)


def load_engine(
    folder: Path,
    dtype: Literal["float32", "bfloat16", "float16"],
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
) -> Engine:
    """Start vLLM on a model folder.

    Args:
        folder: configuration and weights; no tokenizer is needed, since token ids go in and out.
        dtype: of weights and activations, given because vLLM would by itself lower float32.
        max_model_len: most tokens of prompt and response; None for the model's context.
        gpu_memory_utilization: share of the device's memory for weights, activations and cache, in (0, 1].

    Raises:
        ConfigError: see `check_available`.
        ModelError: vLLM cannot load or place the model.
    """
    check_available()
    vllm = importlib.import_module("vllm")
    try:
        engine: Engine = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            # The model's generation_config.json must not add sampling settings or further end tokens.
            generation_config="vllm",
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            logits_processors=[vllm_ngrams.PROCESSOR] if vllm_ngrams.supported() else None,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: vLLM cannot load it ({error}); fix the cause, or {_ELSE}") from error
    return engine


@dataclass(frozen=True)
class VllmDecoder:
    """Decodes batches of prompts with one model and protocol; stands in for `pipeline.evaluation.generate.Decoder`.

    A sampled response's noise belongs to (seed, example id), as there, but the noise is vLLM's own: the two engines sample
    other responses from the same distribution, so one comparison must not mix them. vLLM's kernels may also round
    differently from batch to batch.

    Attributes:
        engine: from `load_engine`.
        tokenizer: gives the end token.
        protocol: how to decode.
        seeds: decoding seeds, distinct. Greedy decoding uses the first alone.
        max_length: most tokens of prompt and response together; None sets no limit beyond the protocol's.

    Raises:
        ConfigError: see `check_protocol`.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    protocol: DecodingProtocol
    seeds: Sequence[int]
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_protocol(self.protocol)

    def decode(self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], None] | None = None) -> list[Generation]:
        """The responses to one batch of prompts that `check_lengths` has passed, in the order prompts × seeds.

        vLLM plans its own batches, so the more prompts the better.

        Raises:
            ModelError: no end token, logits that are not finite, or a response that vLLM did not finish by the protocol.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError("the tokenizer has no end token, so no response could end; set its eos_token")
        requests = [(prompt, seed) for prompt in prompts for seed in used_seeds(self.protocol, self.seeds)]
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(prompt.input_ids)} for prompt, _ in requests],
            [self._parameters(prompt, seed, end) for prompt, seed in requests],
            use_tqdm=False,
        )
        generations = [
            self._generation(prompt, seed, output.outputs[0], end)
            for (prompt, seed), output in zip(requests, outputs, strict=True)
        ]
        if progress is not None:
            progress(len(generations))
        return generations

    def _parameters(self, prompt: EncodedPrompt, seed: int, end: int) -> Any:
        protocol = self.protocol
        return importlib.import_module("vllm").SamplingParams(
            temperature=protocol.temperature if protocol.do_sample else 0.0,
            top_p=protocol.top_p if protocol.do_sample else 1.0,
            seed=request_seed(seed, prompt.id) if protocol.do_sample else None,
            max_tokens=self._budget(prompt),
            # The end token is ours alone: not the tokenizer's that vLLM finds, nor those of a generation config.
            ignore_eos=True,
            stop_token_ids=[end],
            detokenize=False,
            # The sampled token's log-probability is what shows logits that are not finite.
            logprobs=0,
            extra_args={vllm_ngrams.ARGUMENT: protocol.no_repeat_ngram_size},
        )

    def _budget(self, prompt: EncodedPrompt) -> int:
        limit = self.protocol.max_new_tokens
        return limit if self.max_length is None else min(limit, self.max_length - len(prompt.input_ids))

    def _generation(self, prompt: EncodedPrompt, seed: int, completion: Completion, end: int) -> Generation:
        tokens, reason = tuple(completion.token_ids), completion.finish_reason
        logprob = completion.cumulative_logprob
        if logprob is None or not math.isfinite(logprob):
            raise ModelError(
                f"no finite log-probability of the response to {prompt.id} (seed {seed}): the model has diverged, or overflows "
                "in its data type; use an earlier checkpoint or another dtype"
            )
        if reason == "length" and len(tokens) < self._budget(prompt):
            raise ModelError(
                f"vLLM cut the response to {prompt.id} at {len(tokens)} of {self._budget(prompt)} tokens; raise the engine's "
                "max_model_len, or lower max_prompt_tokens or max_new_tokens"
            )
        if reason not in ("stop", "length"):
            raise ModelError(
                f"vLLM ended the response to {prompt.id} (seed {seed}) with {reason!r}; its log says why, mend that, or {_ELSE}"
            )
        finished = reason == "stop"
        if finished and tokens[-1:] != (end,):
            raise ModelError(f"vLLM ended the response to {prompt.id} (seed {seed}) without the end token {end}; {_ELSE}")
        return Generation(prompt.id, seed, tokens, finished)


def request_seed(seed: int, example_id: str) -> int:
    """The seed of one request, 0 to 2⁶³ − 1, so that prompts of one decoding seed do not share their noise."""
    digest = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
