"""Comparisons: families of tests, ties with the best, and sentences that claim no more than the evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.reporting.aggregate import AVERAGE, RunScores, result_rows, table
from pipeline.reporting.compare import (
    Comparison,
    Contrast,
    Standing,
    cells,
    compare_methods,
    headline,
    prompt_scores,
    regression,
    ties,
)
from pipeline.reporting.statistics import Array, Effect, PromptScores, Verdict, holm, paired_bootstrap, verdict

EFFECT = Effect(1.4, 0.3, 2.5, 0.01, 0.995, 220, 3, True)


def drawn(
    rng: np.random.Generator,
    means: dict[str, float],
    seeds: int = 3,
    prompts: int = 60,
    benchmarks: tuple[str, ...] = ("dolly", "vicuna"),
    training_std: float = 1.0,
) -> list[PromptScores]:
    """Methods with these true means on every benchmark."""
    runs = {method: training_std * rng.standard_normal((seeds, 1, 1)) for method in means}
    ids = tuple(f"p{index}" for index in range(prompts))
    found = []
    for benchmark in benchmarks:
        hard = 15 * rng.standard_normal(prompts)
        for method, mean in means.items():
            noise = 4 * rng.standard_normal(prompts) + 6 * rng.standard_normal((seeds, 1, prompts))
            found.append(PromptScores(method, benchmark, tuple(range(seeds)), ids, 30 + mean + hard + noise + runs[method]))
    return found


def contrast(method: str, effect: Effect, adjusted_p: float, benchmark: str = AVERAGE) -> Contrast:
    return Contrast(method, benchmark, effect, adjusted_p, verdict(effect, adjusted_p))


def generations(values: Array, ids: list[str], seeds: list[int]) -> pa.Table:
    """Rows as in generations.parquet from [decoding seeds, prompts]."""
    rows = [(name, seed, values[row, column]) for column, name in enumerate(ids) for row, seed in enumerate(seeds)]
    return pa.table({"id": [r[0] for r in rows], "seed": [r[1] for r in rows], "rouge_l": [float(r[2]) for r in rows]})


def test_each_family_has_a_correction_of_its_own() -> None:
    scores = drawn(np.random.default_rng(1), {"kd": 0, "sft": -1, "rkl": 1, "distilllens": 4})
    found = compare_methods(scores, "kd", resamples=999)
    assert [c.method for c in found.averages] == ["sft", "rkl", "distilllens"]
    assert {c.benchmark for c in found.averages} == {AVERAGE}
    assert [(c.method, c.benchmark) for c in found.benchmarks] == [
        (method, benchmark) for method in ("sft", "rkl", "distilllens") for benchmark in ("dolly", "vicuna")
    ]
    for family in (found.averages, found.benchmarks):
        assert [c.adjusted_p for c in family] == holm([c.effect.p_value for c in family])
        assert all(c.verdict == verdict(c.effect, c.adjusted_p) for c in family)


def test_effects_are_the_methods_minus_the_baseline() -> None:
    scores = drawn(np.random.default_rng(2), {"distilllens": 5, "kd": 0})
    found = compare_methods(scores, "kd")
    by_name = {(own.method, own.benchmark): own for own in scores}
    dolly, vicuna = found.benchmarks
    assert dolly.effect == paired_bootstrap(by_name["distilllens", "dolly"], by_name["kd", "dolly"])
    (average,) = found.averages
    assert average.effect.difference == pytest.approx((dolly.effect.difference + vicuna.effect.difference) / 2)
    assert average.effect.n_prompts == 120 and average.verdict == "better"
    (turned,) = compare_methods(scores, "distilllens").averages
    assert (turned.method, turned.verdict) == ("kd", "worse")


def test_equal_methods_are_rarely_called_different_however_many_there_are() -> None:
    rng, wrong = np.random.default_rng(3), 0
    for index in range(400):
        found = compare_methods(drawn(rng, dict.fromkeys("abcde", 0.0), prompts=40), "a", resamples=199, seed=index)
        wrong += any(c.verdict != "not separated" for c in found.averages)
    assert 0.01 <= wrong / 400 <= 0.07  # without a correction about 0.15


def test_an_unknown_baseline_is_refused_with_the_names_that_there_are() -> None:
    scores = drawn(np.random.default_rng(4), {"kd": 0, "sft": 0})
    with pytest.raises(ConfigError, match="baseline kdd: no such method; there are kd, sft"):
        compare_methods(scores, "kdd")


def test_a_method_that_lacks_a_benchmark_is_refused() -> None:
    scores = drawn(np.random.default_rng(5), {"kd": 0, "sft": 0})
    with pytest.raises(DataError, match="cannot pair scores on dolly with scores on dolly, vicuna"):
        compare_methods([own for own in scores if (own.method, own.benchmark) != ("sft", "vicuna")], "kd")


def test_ties_are_the_methods_that_are_not_separated_from_the_best() -> None:
    scores = drawn(np.random.default_rng(6), {"kd": 0, "far": -12, "best": 1.5, "close": 1.4, "behind": -9})
    comparison = compare_methods(scores, "kd")
    found = ties(scores, comparison)
    assert list(found) == ["dolly", "vicuna", AVERAGE]
    for standing in found.values():
        assert {standing.best, *standing.tied} >= {"best", "close"}
        assert "far" not in standing.tied and "behind" not in standing.tied


def test_ties_say_of_the_baseline_what_the_comparison_says() -> None:
    rng, seen = np.random.default_rng(7), set()
    for index in range(60):
        means = {"kd": 0.0, "a": 4.0, "b": 0.0, "c": -4.0} if index % 2 else {"kd": 4.0, "a": 0.0, "b": 4.0, "c": 0.0}
        scores = drawn(rng, means, prompts=40)
        comparison = compare_methods(scores, "kd", resamples=199)
        for column, standing in ties(scores, comparison, resamples=199).items():
            said = {c.method: c.verdict for c in (*comparison.averages, *comparison.benchmarks) if c.benchmark == column}
            if standing.best == "kd":
                assert set(standing.tied) == {name for name, own in said.items() if own == "not separated"}
            else:
                assert ("kd" in standing.tied) == (said[standing.best] == "not separated")
            seen.add((standing.best == "kd", "kd" in standing.tied))
    assert seen == {(True, False), (False, True), (False, False)}


def test_the_truly_best_of_many_is_rarely_left_out() -> None:
    """Without the correction for a best one chosen by the data, chance lifts one of eight above it in 1 of 9 comparisons."""
    rng, lost = np.random.default_rng(8), 0
    means = {"kd": -8.0, **dict.fromkeys("abcdefgh", 0.0), "best": 0.01}
    for index in range(300):
        scores = drawn(rng, means, seeds=1, prompts=40, benchmarks=("dolly",), training_std=0.0)
        standing = ties(scores, compare_methods(scores, "kd", 199, index), 199, index)[AVERAGE]
        lost += standing.best != "best" and "best" not in standing.tied
    assert lost / 300 <= 0.05


def test_a_method_alone_is_best_without_ties() -> None:
    scores = drawn(np.random.default_rng(9), {"kd": 0})
    comparison = compare_methods(scores, "kd")
    assert comparison == Comparison("kd", (), ())
    assert ties(scores, comparison)[AVERAGE] == Standing("kd", ())
    assert headline(comparison) == "kd is the only method: there is nothing to compare it with."


def test_the_headline_of_a_separated_method() -> None:
    found = Comparison("kd", (contrast("distilllens", EFFECT, 0.02), contrast("sft", replace(EFFECT, difference=0.5), 0.4)), ())
    assert headline(found) == (
        "distilllens scores 1.40 ROUGE-L above kd (95 % interval of the difference 0.30 to 2.50, p = 0.020 after Holm over "
        "2 methods, 3 training seeds, 220 prompts)."
    )


def test_the_headline_of_methods_that_are_not_separated_at_one_training_seed() -> None:
    effect = Effect(0.5, -0.4, 1.4, 0.3, 0.8, 80, 1, False)
    assert headline(Comparison("kd", (contrast("distilllens", effect, 0.3),), ())) == (
        "distilllens and kd are not separated at this budget: difference 0.50 ROUGE-L (95 % interval −0.40 to 1.40), "
        "p = 0.300, 1 training seed, 80 prompts; the variance of training is unmeasured, "
        "so this holds for these checkpoints only."
    )


def test_the_headline_of_a_separated_method_at_one_training_seed_claims_no_more_than_the_checkpoints() -> None:
    effect = replace(EFFECT, p_value=1e-4, n_training_seeds=1, training_variance=False)
    text = headline(Comparison("kd", (contrast("sft", effect, 1e-4),), ()), "exact match")
    assert text == (
        "sft scores 1.40 exact match above kd (95 % interval of the difference 0.30 to 2.50, p < 0.001, 1 training seed, "
        "220 prompts); the variance of training is unmeasured, so this holds for these checkpoints only."
    )


def test_the_headline_of_a_baseline_that_nothing_reaches() -> None:
    below = Effect(-2.0, -3.0, -1.0, 0.001, 0.0005, 220, 3, True)
    found = Comparison("kd", (contrast("sft", below, 0.002), contrast("rkl", replace(below, difference=-4.0), 0.002)), ())
    assert headline(found).startswith("sft scores 2.00 ROUGE-L below kd (95 % interval of the difference −3.00 to −1.00, ")


def test_the_headline_prefers_what_is_separated_to_what_is_larger() -> None:
    noisy = Effect(3.0, -1.0, 7.0, 0.14, 0.93, 220, 3, True)
    found = Comparison("kd", (contrast("a", noisy, 0.14), contrast("b", EFFECT, 0.02)), ())
    assert headline(found).startswith("b scores 1.40 ROUGE-L above kd")


@pytest.mark.parametrize("difference", [-3.0, -0.001, 0.0, 0.2, 9.0])
def test_the_headline_names_no_winner_without_evidence(difference: float) -> None:
    effect = Effect(difference, -math.inf, math.inf, 0.06, 0.5, 1, 0, True)
    text = headline(Comparison("kd", (contrast("distilllens", effect, 0.06),), ()))
    assert "not separated at this budget" in text and "−∞ to ∞" in text and text.endswith("p = 0.060, 1 prompt.")
    assert not any(word in text for word in ("above", "below", "better", "worse", "−0.00"))


def test_a_large_interval_without_zero_does_not_outweigh_the_correction() -> None:
    found = Comparison("kd", (contrast("a", replace(EFFECT, p_value=0.03), 0.09),), ())
    assert "not separated at this budget" in headline(found)


def test_a_regression_is_a_fall_beyond_noise() -> None:
    rng = np.random.default_rng(10)
    accepted = drawn(rng, {"kd": 0}, seeds=1, prompts=200)

    def tonight(shift: float) -> list[PromptScores]:
        return [replace(own, scores=own.scores + shift + 6 * rng.standard_normal(own.scores.shape)) for own in accepted]

    assert regression(tonight(-2), accepted).regressed
    assert not regression(tonight(2), accepted).regressed and not regression(accepted, accepted).regressed
    assert regression(tonight(-2), accepted).effect.difference == pytest.approx(-2, abs=1)


def test_a_regression_test_sounds_a_false_alarm_once_in_twenty_nights() -> None:
    rng, alarms = np.random.default_rng(11), 0
    for index in range(1000):
        new, accepted = drawn(rng, {"new": 0, "accepted": 0}, 1, 60, ("dolly",), 0.0)
        alarms += regression([new], [accepted], resamples=199, seed=index).regressed
    assert 0.03 <= alarms / 1000 <= 0.07


def test_generations_become_an_array() -> None:
    values = np.arange(12.0).reshape(2, 2, 3)
    ids = ["p", "q", "r"]
    tables = {10: generations(values[0], ids, [1, 2]), 20: generations(values[1], ids, [1, 2]).take([5, 2, 0, 4, 1, 3])}
    found = prompt_scores("kd", "dolly", tables)
    assert (found.method, found.benchmark, found.train_seeds, found.ids) == ("kd", "dolly", (10, 20), ("p", "q", "r"))
    np.testing.assert_array_equal(found.scores, values)
    assert not prompt_scores("teacher", "dolly", {None: tables[10]}).trained


def test_another_metric_is_another_column() -> None:
    found = generations(np.ones((1, 2)), ["p", "q"], [1]).append_column("exact_match", [[100.0, 0.0]])
    np.testing.assert_array_equal(prompt_scores("kd", "dolly", {10: found}, "exact_match").scores, [[[100, 0]]])


def test_generations_that_do_not_fit_together_are_refused() -> None:
    good = generations(np.ones((2, 3)), ["p", "q", "r"], [1, 2])
    with pytest.raises(DataError, match="kd s20 on dolly: 5 rows, expected one for each of 3 prompts and 2 decoding seeds"):
        prompt_scores("kd", "dolly", {10: good, 20: good.slice(1)})
    with pytest.raises(DataError, match="kd s10 on dolly: 12 rows"):
        prompt_scores("kd", "dolly", {10: pa.concat_tables([good, good])})
    with pytest.raises(DataError, match="kd s20 on dolly"):
        prompt_scores("kd", "dolly", {10: good, 20: generations(np.ones((2, 3)), ["p", "q", "x"], [1, 2])})
    with pytest.raises(DataError, match=r"training seeds \[10, 20\] have \[2, 1\] decoding seeds"):
        prompt_scores("kd", "dolly", {10: good, 20: generations(np.ones((1, 3)), ["p", "q", "r"], [1])})
    with pytest.raises(DataError, match="kd on dolly: no generations"):
        prompt_scores("kd", "dolly", {})


def test_cells_are_those_of_the_table() -> None:
    """The same prompts as rows of scores per decoding seed, as the comparison stage aggregates them."""
    rng = np.random.default_rng(12)
    values = {name: rng.uniform(0, 100, (3, 2, 20)) for name in ("dolly", "vicuna")}
    ids = tuple(f"p{index}" for index in range(20))
    found = cells([PromptScores("kd", name, (1, 2, 3), ids, own) for name, own in values.items()])
    runs = [
        RunScores("kd", seed, name, {"rouge_l": own[index].mean(axis=-1).tolist()})
        for name, own in values.items()
        for index, seed in enumerate((1, 2, 3))
    ]
    assert found == table(result_rows(runs))
    cell = found["kd"]["dolly"]
    per_run = values["dolly"].mean(axis=2)
    assert cell.train_std == pytest.approx(per_run.mean(axis=1).std(ddof=1))
    assert cell.decoding_std == pytest.approx(per_run.std(axis=1, ddof=1).mean())
    alone = cells([PromptScores("kd", "dolly", (1,), ids, values["dolly"][:1])])["kd"][AVERAGE]
    assert alone.train_std is None and alone.decoding_std is not None


def test_verdicts_are_words_of_the_report() -> None:
    words: set[Verdict] = {"better", "worse", "not separated"}
    found = compare_methods(drawn(np.random.default_rng(14), {"kd": 0, "a": 8, "b": -8, "c": 0}), "kd")
    assert {c.verdict for c in found.averages} == words
