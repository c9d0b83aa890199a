"""vLLM's place in the pipeline, with a stand-in for the package: what it is asked for, and what of its answers is accepted."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.data.examples import EncodedPrompt
from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation import vllm_backend
from pipeline.evaluation.generate import DecodingProtocol, Generation
from pipeline.evaluation.vllm_backend import VllmDecoder, check_available, check_protocol, load_engine, request_seed

END = 60
NGRAMS = "vllm.v1.worker.gpu.sample.logits_processor"
SAMPLED = DecodingProtocol(max_new_tokens=8, do_sample=True, temperature=0.7, top_p=0.9)
GREEDY = DecodingProtocol(max_new_tokens=8, do_sample=False, temperature=0.7, top_p=0.9)


@dataclass(frozen=True)
class SamplingParams:
    """The fields of vLLM's class that are in use, with its defaults; any other name is an error here."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    detokenize: bool = True
    logprobs: int | None = None
    extra_args: dict[str, Any] | None = None


@dataclass
class Completion:
    token_ids: Sequence[int]
    finish_reason: str | None
    cumulative_logprob: float | None = -3.0


@dataclass
class Output:
    outputs: list[Completion]


@dataclass
class FakeLLM:
    """Answers request i with token i and the end token, or with what `answers` says."""

    options: dict[str, Any] = field(default_factory=dict)
    answers: dict[int, Completion] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    parameters: list[SamplingParams] = field(default_factory=list)

    def generate(self, prompts: Any, sampling_params: Any, /, *, use_tqdm: bool) -> list[Output]:
        assert not use_tqdm
        self.prompts += [prompt["prompt_token_ids"] for prompt in prompts]
        self.parameters += sampling_params
        return [Output([self.answers.get(index, Completion([index, END], "stop"))]) for index in range(len(prompts))]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    module.LLM = lambda **options: FakeLLM(options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return module


@pytest.fixture
def few(prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
    return prompts[:3]


def decoder(tokenizer: Any, engine: FakeLLM, protocol: DecodingProtocol = SAMPLED, **changes: Any) -> VllmDecoder:
    return replace(VllmDecoder(engine, tokenizer, protocol, [10, 20]), **changes)


def test_every_field_of_a_sampled_protocol_is_handed_over(vllm: Any, tokenizer: Any, few: list[EncodedPrompt]) -> None:
    engine = FakeLLM()
    decoder(tokenizer, engine).decode(few)
    pairs = [(prompt, seed) for prompt in few for seed in (10, 20)]
    assert engine.prompts == [list(prompt.input_ids) for prompt, _ in pairs]
    assert engine.parameters == [
        SamplingParams(
            temperature=0.7, top_p=0.9, top_k=0, seed=request_seed(seed, prompt.id), max_tokens=8, ignore_eos=True,
            stop_token_ids=[END], detokenize=False, logprobs=0, extra_args={"no_repeat_ngram_size": 0},
        )
        for prompt, seed in pairs
    ]  # fmt: skip


def test_repeated_ngrams_are_banned_by_our_processor(
    vllm: Any, tokenizer: Any, few: list[EncodedPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, NGRAMS, ModuleType(NGRAMS))
    engine: Any = load_engine(tmp_path, "float32")
    assert engine.options["logits_processors"] == ["pipeline.evaluation.vllm_ngrams:NoRepeatNgrams"]
    decoder(tokenizer, engine, replace(SAMPLED, no_repeat_ngram_size=6)).decode(few)
    assert [asked.extra_args for asked in engine.parameters] == [{"no_repeat_ngram_size": 6}] * 6


def test_greedy_decoding_asks_once_at_temperature_zero(vllm: Any, tokenizer: Any, few: list[EncodedPrompt]) -> None:
    engine = FakeLLM()
    found = decoder(tokenizer, engine, GREEDY).decode(few)
    assert [(row.id, row.seed) for row in found] == [(prompt.id, 10) for prompt in few]
    assert {(asked.temperature, asked.top_p, asked.seed) for asked in engine.parameters} == {(0.0, 1.0, None)}


def test_seeds_belong_to_decoding_seed_and_example_not_to_the_batch(
    vllm: Any, tokenizer: Any, few: list[EncodedPrompt]
) -> None:
    together, alone = FakeLLM(), FakeLLM()
    decoder(tokenizer, together).decode(few)
    decoder(tokenizer, alone, seeds=[20]).decode(few[2:])
    seeds = [asked.seed for asked in together.parameters]
    assert len(set(seeds)) == 6 and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert alone.parameters[0].seed == seeds[-1]
    # Another value would change every score that is stored with a seed.
    assert request_seed(10, "row-0") == 600113859342135986


def test_max_length_leaves_the_rest_to_the_response(vllm: Any, tokenizer: Any, few: list[EncodedPrompt]) -> None:
    engine = FakeLLM()
    assert [len(prompt.input_ids) for prompt in few] == [3, 17, 8]
    decoder(tokenizer, engine, max_length=19, seeds=[1]).decode(few)
    assert [asked.max_tokens for asked in engine.parameters] == [8, 2, 8]


def test_responses_come_in_the_order_prompts_by_seeds(vllm: Any, tokenizer: Any, few: list[EncodedPrompt]) -> None:
    engine = FakeLLM(answers={1: Completion([5, 6, 7, 8, 9, 1, 2, 3], "length")})
    done: list[int] = []
    found = decoder(tokenizer, engine).decode(few, done.append)
    assert found[:3] == [
        Generation("row-0", 10, (0, END), True),
        Generation("row-0", 20, (5, 6, 7, 8, 9, 1, 2, 3), False),
        Generation("row-1", 10, (2, END), True),
    ]
    assert [(row.id, row.seed) for row in found[3:]] == [("row-1", 20), ("row-2", 10), ("row-2", 20)]
    assert sum(done) == 6


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (Completion([1, END], "stop", math.nan), "no finite log-probability of the response to row-1"),
        (Completion([1, END], "stop", None), "no finite log-probability of the response to row-1"),
        (Completion([1, 2], "length"), r"cut the response to row-1 at 2 of 8 tokens; raise the engine's max_model_len"),
        (Completion([1], "abort"), r"ended the response to row-1 \(seed 10\) with 'abort'"),
        (Completion([1, 2], "stop"), "without the end token 60"),
    ],
)
def test_a_response_that_the_protocol_does_not_explain_is_an_error(
    vllm: Any, tokenizer: Any, few: list[EncodedPrompt], completion: Completion, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        decoder(tokenizer, FakeLLM(answers={2: completion})).decode(few)


def test_a_tokenizer_without_an_end_token_is_an_error(vllm: Any, tokenizer: Any, few: list[EncodedPrompt]) -> None:
    tokenizer.eos_token_id = None
    with pytest.raises(ModelError, match="no end token"):
        decoder(tokenizer, FakeLLM()).decode(few)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"no_repeat_ngram_size": 6},
            r"decoding.no_repeat_ngram_size is 6, which this vLLM cannot do; .*evaluation.engine=transformers",
        ),
        ({"temperature": 0.005}, "decoding.temperature is 0.005, vLLM samples between 0.01 and 2.0"),
        ({"temperature": 2.5}, "decoding.temperature is 2.5"),
    ],
)
def test_what_vllm_would_drop_or_replace_is_refused(tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder(tokenizer, FakeLLM(), replace(SAMPLED, **changes))


def test_every_problem_of_a_protocol_is_told_and_greedy_decoding_has_no_temperature() -> None:
    with pytest.raises(ConfigError) as caught:
        check_protocol(replace(SAMPLED, no_repeat_ngram_size=6, temperature=0.001))
    assert len(caught.value.problems) == 2
    check_protocol(replace(GREEDY, temperature=0.001))


def test_a_missing_package_and_a_missing_device_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        load_engine(Path("model"), "bfloat16")
    package, device = caught.value.problems
    assert "pip install vllm" in package and "needs a CUDA device, and there is none" in device
    assert all("or set evaluation.engine=transformers" in problem for problem in caught.value.problems)


def test_a_missing_device_alone_is_told(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        check_available()


def test_the_engine_takes_token_ids_and_no_settings_from_the_model_folder(vllm: Any, tmp_path: Path) -> None:
    engine: Any = load_engine(tmp_path, "float32", max_model_len=512, gpu_memory_utilization=0.5)
    assert engine.options == {
        "model": str(tmp_path),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "generation_config": "vllm",
        "dtype": "float32",
        "max_model_len": 512,
        "gpu_memory_utilization": 0.5,
        "logits_processors": None,
    }


def test_a_model_that_vllm_cannot_load_is_a_clear_error(vllm: Any, tmp_path: Path) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("no room for the cache")

    vllm.LLM = refuse
    with pytest.raises(ModelError, match=r"vLLM cannot load it \(no room for the cache\)"):
        load_engine(tmp_path, "bfloat16")


def test_the_module_can_be_loaded_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "VllmDecoder" in runpy.run_path(str(vllm_backend.__file__))
