"""The model card: valid metadata for the hub, a licence only where all inputs agree, every figure in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from huggingface_hub import ModelCard

from pipeline.config.methods import METHOD_KINDS
from pipeline.reporting.model_card import (
    APACHE,
    CC0,
    DEV_ROWS,
    LICENCES,
    MIT,
    OBJECTIVES,
    STUDENT,
    TEACHER,
    TRAINING_ROWS,
    UNKNOWN_LOCAL,
    CardFacts,
    Input,
    Licence,
    Score,
    front_matter,
    model_card,
)

PROTOCOL: dict[str, Any] = {
    "benchmark": "general", "version": 1, "filter": None, "sample": None, "template": "alpaca@1", "max_prompt_tokens": 256,
    "overlong": "truncate_context", "seeds": [10, 20], "engine": "transformers",
    "decoding": {"max_new_tokens": 48, "do_sample": True, "temperature": 0.7, "top_p": 1.0, "no_repeat_ngram_size": 6},
}  # fmt: skip


def given(role: str, licence: Licence = APACHE, repo: str | None = None, **changes: Any) -> Input:
    kind: Literal["model", "dataset"] = "dataset" if "rows" in role else "model"
    return replace(Input(role, (repo or role).rpartition("/")[2], "somewhere", kind, licence, repo), **changes)


def score(benchmark: str = "general", **changes: Any) -> Score:
    source = given(f"test rows of {benchmark}", UNKNOWN_LOCAL, in_weights=False)
    base = Score(
        benchmark, source, 20, 11.824, 1.25, 0.581, (9.871, 13.8), PROTOCOL, "a" * 16, {"untrained": 7.39, "teacher": 10.65}
    )
    return replace(base, **changes)


def facts(**changes: Any) -> CardFacts:
    base = CardFacts(
        fingerprint="f" * 16,
        method="distilllens",
        seed=10,
        settings={"alpha": 1.0, "training.learning_rate": [1e-4, 2e-4], "validation.select": "loss", "autocast": "None"},
        counts={"steps": 48, "tokens": 23681, "best_step": 32, "best_value": 1.5, "learning_rate": 2e-4},
        student="Before training it had the teacher's weights.",
        parameters=99_114_048,
        inputs=(
            given(TEACHER, repo="org/teacher"),
            given(STUDENT, repo="org/student"),
            given(TRAINING_ROWS, repo="org/rows"),
            given(DEV_ROWS, repo="org/rows"),
        ),
        rows={TRAINING_ROWS: {"kept": 9, "rows": 10, "tokens": 1234, "response_tokens": 500}},
        encoding={"template": "alpaca@1", "max_prompt_tokens": 256, "max_tokens": 512, "overlong": "drop"},
        example="### Instruction:\nName three rivers.\n",
        scores=(score(), score("tasks", rows=7)),
        provenance={"training": "f" * 16},
    )
    return replace(base, **changes)


def with_licences(*licences: Licence, tested: Licence = UNKNOWN_LOCAL) -> CardFacts:
    inputs = tuple(given(f"{index} rows", licence) for index, licence in enumerate(licences))
    return facts(inputs=inputs, scores=(score(source=given("test rows", tested, in_weights=False)),))


def test_the_hubs_own_reader_understands_the_card() -> None:
    card = ModelCard(model_card(facts()), ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["base_model"] == ["org/student"] and data["datasets"] == ["org/rows"]
    assert data["tags"] == ["knowledge-distillation", "distilllens"] and data["pipeline_tag"] == "text-generation"
    results = [(result.dataset_name, result.metric_name, result.metric_value) for result in card.data.eval_results]
    assert ("general", "ROUGE-L", 11.82) in results and ("tasks", "exact match", 1.25) in results
    assert card.text.lstrip().startswith("# student · distilllens · seed 10")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ((APACHE, APACHE), {"license": "apache-2.0"}),
        ((MIT,), {"license": "mit"}),
        ((APACHE, CC0), {"license": "other", "license_name": "not-decided"}),
        ((APACHE, UNKNOWN_LOCAL), {"license": "other", "license_name": "not-decided"}),
        ((UNKNOWN_LOCAL, UNKNOWN_LOCAL), {"license": "other", "license_name": "not-decided"}),
        ((LICENCES["Qwen/Qwen2.5-3B"],), {"license": "other", "license_name": "qwen-research"}),
        ((), {"license": "other", "license_name": "not-decided"}),
    ],
)
def test_a_licence_is_named_only_where_all_inputs_of_the_weights_agree(
    licences: tuple[Licence, ...], expected: dict[str, str]
) -> None:
    made = with_licences(*licences)
    assert {key: value for key, value in front_matter(made).items() if key.startswith("license")} == expected
    text = model_card(made)
    assert all(licence.text in text for licence in licences)
    assert ("choose terms that all of them allow" in text) == (expected["license"] == "other")


def test_test_rows_have_their_licence_but_no_say() -> None:
    made = with_licences(MIT, tested=LICENCES["databricks/databricks-dolly-15k"])
    assert front_matter(made)["license"] == "mit" and "CC BY-SA 3.0" in model_card(made)


def test_dolly_keeps_the_licence_of_its_source() -> None:
    for repo in ("databricks/databricks-dolly-15k", "MiniLLM/dolly", "MiniLLM/dolly-processed"):
        assert LICENCES[repo].identifier == "cc-by-sa-3.0"


def test_scores_are_shown_with_interval_deviation_and_other_models() -> None:
    text = model_card(facts())
    assert "| general | 20 | 11.82 | 9.87 to 13.80 | 0.58 | 1.25 | 7.39 | 10.65 |" in text
    assert "(tasks) has 7 prompts" in text
    assert (
        "sampled at temperature 0.7, top-p 1, no repeated 6-grams, at most 48 new tokens, decoding seeds 10, 20, "
        "template alpaca@1, prompts over 256 tokens: truncate context, engine transformers."
    ) in text
    assert f"Protocol of general (`{'a' * 16}`), tasks (`{'a' * 16}`): sampled" in text


def test_one_decoding_seed_has_no_deviation_and_a_missing_model_no_score() -> None:
    text = model_card(facts(scores=(score(deviation=None), score("tasks", others={"teacher": 3.0}))))
    assert "| general | 20 | 11.82 | 9.87 to 13.80 | one seed | 1.25 | 7.39 | 10.65 |" in text
    assert "| tasks | 20 | 11.82 | 9.87 to 13.80 | 0.58 | 1.25 | – | 3.00 |" in text


def test_a_benchmark_under_two_protocols_has_two_rows_that_can_be_told_apart() -> None:
    greedy = {
        **PROTOCOL, "decoding": {**PROTOCOL["decoding"], "do_sample": False, "no_repeat_ngram_size": 0},
        "filter": {"min_reference_tokens": 11, "min_reference_words": None}, "sample": {"rows": 100, "seed": 42},
    }  # fmt: skip
    text = model_card(facts(scores=(score(), score(protocol=greedy, protocol_hash="b" * 16))))
    assert f"| general `{'a' * 16}` |" in text and f"| general `{'b' * 16}` |" in text
    assert f"Protocol of general (`{'b' * 16}`): decoded greedily, at most 48 new tokens" in text
    assert "filter: min_reference_tokens 11, sample: rows 100, seed 42" in text


def test_without_scores_none_are_claimed() -> None:
    text, metadata = model_card(facts(scores=())), front_matter(facts(scores=()))
    assert "No evaluation of this checkpoint was found" in text and "smallest test set" not in text
    assert "metrics" not in metadata and "model-index" not in metadata


def test_method_settings_and_data_are_told() -> None:
    text = model_card(facts())
    for part in (
        OBJECTIVES["distilllens"], "α = 1", "48 optimiser steps over 23,681 input tokens at a peak learning rate of 0.0002",
        "the weights kept are those of step 32, selected on dev rows (loss)", "| `autocast` | none |",
        "| `training.learning_rate` | [0.0001, 0.0002] |", "99,114,048 parameters", "with teacher as its teacher",
        "training rows: rows (somewhere); 9 of 10 rows kept, 1,234 tokens, 500 of them in responses",
        "prompts of at most 256 tokens", "prompt = '### Instruction:\\nName three rivers.\\n'", "add_special_tokens=True",
        "@misc{distilllens", "2602.13567", "DistillLens: Symmetric Knowledge Distillation Through Logit Lens",
    ):  # fmt: skip
        assert part in text, part


def test_what_is_not_known_is_called_so() -> None:
    text = model_card(facts(inputs=(), rows={}, counts={**facts().counts, "best_value": None}))
    assert "# distilllens · seed 10" in text and "without a teacher" in text
    assert "not known: the prepared rows" in text and "selected on dev rows" not in text


def test_a_chat_prompt_spells_out_its_special_tokens() -> None:
    assert "add_special_tokens=False" in model_card(facts(encoding={**facts().encoding, "template": "chat@1"}))


def test_every_method_is_described() -> None:
    assert set(OBJECTIVES) == set(METHOD_KINDS)
    assert "(1 − α)" not in model_card(facts(method="sft", settings={**facts().settings, "alpha": 0.0}))


def test_a_bar_in_a_name_breaks_no_table() -> None:
    text = model_card(facts(inputs=(given(TEACHER, name="a|b"),)))
    assert "| teacher | a\\|b (somewhere) |" in text
