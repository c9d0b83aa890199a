from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, PreTrainedModel, TopPLogitsWarper

from pipeline.data.examples import EncodedPrompt
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.evaluation.generate import DecodingProtocol, Generation, decode, generate, plan_batches
from pipeline.evaluation.sampling import uniform_noise

END, CONTEXT = 60, 64
SAMPLED = DecodingProtocol(max_new_tokens=24, do_sample=True)
GREEDY = DecodingProtocol(max_new_tokens=24, do_sample=False)
PROTOCOLS = {
    "sampled": SAMPLED,
    "greedy": GREEDY,
    "greedy without repeats": replace(GREEDY, no_repeat_ngram_size=2),
    "sampled with everything": DecodingProtocol(24, True, temperature=0.7, top_p=0.8, no_repeat_ngram_size=3),
}


@torch.no_grad()
def plain(model: PreTrainedModel, prompt: EncodedPrompt, protocol: DecodingProtocol, seed: int, room: int = 10**9) -> list[int]:
    """One sequence without padding, cache or batch, through transformers' own processors."""
    ids = torch.tensor([prompt.input_ids])
    noise = uniform_noise(seed, prompt.id, protocol.max_new_tokens)
    new: list[int] = []
    while len(new) < min(protocol.max_new_tokens, room) and END not in new:
        logits = model(input_ids=ids).logits[:, -1]
        if protocol.no_repeat_ngram_size:
            logits = NoRepeatNGramLogitsProcessor(protocol.no_repeat_ngram_size)(ids, logits)
        if protocol.do_sample:
            logits = TopPLogitsWarper(protocol.top_p)(ids, logits / protocol.temperature)
            token = int((logits[0].double().softmax(dim=-1).cumsum(dim=-1) <= noise[len(new)]).sum())
        else:
            token = int(logits.argmax())
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return new


def by_key(generations: Sequence[Generation]) -> dict[tuple[str, int], Generation]:
    found = {(generation.id, generation.seed): generation for generation in generations}
    assert len(found) == len(generations)
    return found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_batched_decoding_equals_one_unpadded_sequence_at_a_time(
    model: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], name: str
) -> None:
    protocol = PROTOCOLS[name]
    seeds = [10, 20, 30] if protocol.do_sample else [10]
    found = by_key(list(generate(model, tokenizer, prompts, protocol, [10, 20, 30], batch_size=15)))
    assert found.keys() == {(prompt.id, seed) for prompt in prompts for seed in seeds}
    for prompt in prompts:
        for seed in seeds:
            generation = found[prompt.id, seed]
            assert list(generation.token_ids) == plain(model, prompt, protocol, seed)
            assert generation.finished == (generation.token_ids[-1] == END)
    lengths = {len(generation.token_ids) for generation in found.values()}
    assert len(lengths) > 1 or not protocol.do_sample, "rows must end at different steps for this test to mean something"


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_sampling_does_not_depend_on_batch_size_or_order(
    model: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt], batch_size: int
) -> None:
    expected = by_key(list(generate(model, tokenizer, prompts, SAMPLED, [1, 2, 3], batch_size=12)))
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert by_key(list(generate(model, tokenizer, shuffled, SAMPLED, [3, 1, 2], batch_size))) == expected


def test_a_row_decodes_alike_alone_and_among_others(
    model: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    together = by_key(list(generate(model, tokenizer, prompts, SAMPLED, [5], batch_size=20)))
    for prompt in prompts:
        assert list(generate(model, tokenizer, [prompt], SAMPLED, [5], batch_size=1)) == [together[prompt.id, 5]]


def test_greedy_equals_transformers_generate(model: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt]) -> None:
    found = by_key(list(generate(model, tokenizer, prompts, replace(GREEDY, no_repeat_ngram_size=3), [0], batch_size=4)))
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            no_repeat_ngram_size=3,
            pad_token_id=END,
        )
        assert list(found[prompt.id, 0].token_ids) == theirs[0, len(prompt.input_ids) :].tolist()


def test_each_prompt_is_prefilled_once_and_ended_rows_leave(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    model, shapes = tiny_models["llama"], []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        rows = list(generate(model, tokenizer, prompts, SAMPLED, [1, 2, 3], batch_size=100))
    finally:
        handle.remove()
    assert shapes[0] == (len(prompts), 20)
    assert shapes[1] <= (3 * len(prompts), 1)
    assert {width for _, width in shapes[1:]} == {1}
    steps = sorted((len(row.token_ids) for row in rows), reverse=True)
    assert len(shapes) == steps[0]
    assert [count for count, _ in shapes[1:]] == [sum(length > step for length in steps) for step in range(1, steps[0])]
    assert shapes[-1][0] < 3 * len(prompts)


def test_more_seeds_than_the_batch_holds_share_one_prefill(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    model, shapes = tiny_models["gpt2"], []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        rows = list(generate(model, tokenizer, prompts[1:2], SAMPLED, [1, 2, 3, 4, 5], batch_size=2))
    finally:
        handle.remove()
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 17)]
    assert max(count for count, _ in shapes) <= 2
    assert [row.seed for row in rows] == [1, 2, 3, 4, 5]


def test_batches_hold_prompts_of_similar_length_and_count_sequences(prompts: list[EncodedPrompt]) -> None:
    batches = plan_batches(prompts, SAMPLED, [1, 2, 3], batch_size=12)
    assert [[len(prompt.input_ids) for prompt in batch] for batch in batches] == [[20, 17, 14, 12], [9, 8, 8, 5], [3, 2, 1]]
    assert [len(batch) for batch in plan_batches(prompts, GREEDY, [1, 2, 3], batch_size=6)] == [6, 5]


def test_max_length_limits_prompt_and_response_together(
    model: PreTrainedModel, tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    found = by_key(list(generate(model, tokenizer, prompts, SAMPLED, [1, 2], batch_size=9, max_length=22)))
    for prompt in prompts:
        room = 22 - len(prompt.input_ids)
        assert list(found[prompt.id, 1].token_ids) == plain(model, prompt, SAMPLED, 1, room)


def test_rows_may_use_the_whole_context(tiny_models: dict[str, PreTrainedModel], tokenizer: Any) -> None:
    # The long prompt ends early; its row must not run on beyond the last position while the short one continues.
    long = EncodedPrompt("long", "", tuple(range(50)), ("a",))
    short = EncodedPrompt("short", "", (1, 2), ("a",))
    protocol = replace(SAMPLED, max_new_tokens=62)
    rows = by_key(list(generate(tiny_models["gpt2"], tokenizer, [long, short], protocol, range(20), 40, max_length=CONTEXT)))
    assert max(len(row.token_ids) for (name, _), row in rows.items() if name == "long") <= CONTEXT - 50
    assert max(len(row.token_ids) for (name, _), row in rows.items() if name == "short") > CONTEXT - 50


def test_training_mode_is_off_during_decoding_and_restored(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    model = tiny_models["gpt2"]
    expected = list(generate(model, tokenizer, prompts, SAMPLED, [1], 4))
    model.train()
    try:
        assert list(generate(model, tokenizer, prompts, SAMPLED, [1], 4)) == expected
        assert model.training
    finally:
        model.eval()


def test_progress_counts_every_response_once(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    counts: list[int] = []
    list(generate(tiny_models["gpt2"], tokenizer, prompts, SAMPLED, [1, 2], 6, progress=counts.append))
    assert sum(counts) == 2 * len(prompts)
    assert len(counts) > 4


def test_text_is_stripped_and_has_no_special_tokens(tokenizer: Any) -> None:
    assert decode(tokenizer, (5, 7, END)) == "w5 w7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
    ],
)
def test_protocol_values_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SAMPLED, **change)


def test_prompts_beyond_the_context_are_refused_before_decoding(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any
) -> None:
    prompt = EncodedPrompt("long", "", tuple(range(50)), ("a",))
    with pytest.raises(ConfigError, match=r"prompt long \(50 tokens\).*need 74 positions, the model has 64.*by 10"):
        generate(tiny_models["gpt2"], tokenizer, [prompt], SAMPLED, [1], 1)
    with pytest.raises(ConfigError, match="no room for a response within max_length 50"):
        generate(tiny_models["gpt2"], tokenizer, [prompt], SAMPLED, [1], 1, max_length=50)


@pytest.mark.parametrize(
    ("ids", "seeds", "batch_size", "error", "message"),
    [
        (["a", "a"], [1], 1, DataError, "ids occur more than once, the first is a"),
        (["a"], [], 1, ValueError, "at least one"),
        (["a"], [1, 1], 1, ValueError, "each once"),
        (["a"], [1], 0, ValueError, "batch_size is 0"),
    ],
)
def test_wrong_arguments_are_refused(
    tiny_models: dict[str, PreTrainedModel],
    tokenizer: Any,
    ids: list[str],
    seeds: list[int],
    batch_size: int,
    error: type[Exception],
    message: str,
) -> None:
    rows = [EncodedPrompt(name, "", (1, 2), ("a",)) for name in ids]
    with pytest.raises(error, match=message):
        generate(tiny_models["gpt2"], tokenizer, rows, SAMPLED, seeds, batch_size)


def test_prompts_without_tokens_are_refused(tiny_models: dict[str, PreTrainedModel], tokenizer: Any) -> None:
    with pytest.raises(DataError, match="prompt a has no tokens"):
        generate(tiny_models["gpt2"], tokenizer, [EncodedPrompt("a", "", (), ("a",))], SAMPLED, [1], 1)


@pytest.mark.parametrize("protocol", [SAMPLED, GREEDY])
def test_logits_that_are_not_finite_are_an_error(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any, prompts: list[EncodedPrompt], protocol: DecodingProtocol
) -> None:
    model = tiny_models["llama"]
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * torch.nan)
    try:
        with pytest.raises(ModelError, match="no finite next-token logits after 0 tokens of the response to row-"):
            list(generate(model, tokenizer, prompts, protocol, [1], 4))
    finally:
        handle.remove()


def test_tokenizers_without_end_token_are_refused(
    tiny_models: dict[str, PreTrainedModel], tokenizer: Any, prompts: list[EncodedPrompt]
) -> None:
    tokenizer.eos_token_id = None
    with pytest.raises(ModelError, match="no end token"):
        list(generate(tiny_models["gpt2"], tokenizer, prompts, SAMPLED, [1], 4))
