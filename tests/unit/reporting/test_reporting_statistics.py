"""The test behind the verdicts: against scipy, and against simulated scores whose truth is known."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import DataError
from pipeline.reporting import statistics
from pipeline.reporting.statistics import (
    Array,
    Effect,
    PromptScores,
    holm,
    macro_bootstrap,
    paired_bootstrap,
    power,
    verdict,
)

SIMULATIONS = 1000


def scores(table: Array, method: str = "kd", benchmark: str = "dolly", trained: bool = True) -> PromptScores:
    """Scores from [training seeds, prompts], one decoding seed."""
    seeds: tuple[int | None, ...] = tuple(range(10, 10 + len(table))) if trained else (None,)
    ids = tuple(f"p{index}" for index in range(table.shape[1]))
    return PromptScores(method, benchmark, seeds, ids, np.asarray(table, dtype=np.float64)[:, None, :])


def drawn(
    rng: np.random.Generator,
    seeds: int,
    prompts: int,
    training_std: float,
    difference: float = 0.0,
    benchmarks: int = 1,
    noise: Callable[..., Array] | None = None,
) -> list[list[PromptScores]]:
    """Two methods whose true means differ by `difference`; prompts are common to both and hard or easy for both."""
    noise = noise or rng.standard_normal
    hard = [15 * rng.standard_normal(prompts) for _ in range(benchmarks)]
    sides = []
    for method, shift in (("a", difference), ("b", 0.0)):
        run = training_std * rng.standard_normal((seeds, 1))
        tables = [
            30 + shift + hard[index] + 4 * noise(prompts) + run + 6 * noise((seeds, prompts)) for index in range(benchmarks)
        ]
        sides.append([scores(table, method, f"bench{index}") for index, table in enumerate(tables)])
    return sides


def simulated(seed: int, draw: Callable[[np.random.Generator], list[list[PromptScores]]], count: int) -> list[Effect]:
    rng = np.random.default_rng(seed)
    return [macro_bootstrap(*draw(rng), resamples=199, seed=index) for index in range(count)]


def share(effects: list[Effect], hit: Callable[[Effect], bool]) -> float:
    return sum(map(hit, effects)) / len(effects)


@pytest.mark.parametrize(
    ("seeds", "training_std", "benchmarks", "prompts"),
    [
        pytest.param(1, 0.0, 1, 60, id="one seed"),
        pytest.param(1, 0.0, 1, 20, id="one seed, few prompts"),
        pytest.param(1, 0.0, 4, 30, id="one seed, four benchmarks"),
        pytest.param(2, 2.0, 1, 60, id="two seeds"),
        pytest.param(3, 1.5, 1, 60, id="three seeds"),
        pytest.param(3, 6.0, 1, 60, id="three seeds that differ a lot"),
        pytest.param(3, 1.5, 4, 30, id="three seeds, four benchmarks"),
        pytest.param(5, 1.5, 1, 60, id="five seeds"),
        pytest.param(5, 1.5, 4, 30, id="five seeds, four benchmarks"),
    ],
)
def test_false_positives_are_near_the_nominal_five_per_cent(
    seeds: int, training_std: float, benchmarks: int, prompts: int
) -> None:
    effects = simulated(1, lambda rng: drawn(rng, seeds, prompts, training_std, benchmarks=benchmarks), SIMULATIONS)
    assert 0.03 <= share(effects, lambda effect: effect.p_value <= 0.05) <= 0.07
    assert 0.03 <= share(effects, lambda effect: effect.p_lower <= 0.05) <= 0.07


def test_skewed_scores_do_not_raise_the_false_positives() -> None:
    def draw(rng: np.random.Generator) -> list[list[PromptScores]]:
        return drawn(rng, 1, 30, 0.0, noise=lambda shape: rng.exponential(1.0, shape) - 1)

    assert 0.03 <= share(simulated(2, draw, SIMULATIONS), lambda effect: effect.p_value <= 0.05) <= 0.07


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_rare_exact_matches_do_not_raise_the_false_positives(rate: float) -> None:
    def draw(rng: np.random.Generator) -> list[list[PromptScores]]:
        return [[scores(100.0 * (rng.random((1, 100)) < rate))] for _ in "ab"]

    assert share(simulated(3, draw, SIMULATIONS), lambda effect: effect.p_value <= 0.05) <= 0.07


def test_several_seeds_without_training_variance_claim_too_little_rather_than_too_much() -> None:
    effects = simulated(4, lambda rng: drawn(rng, 3, 60, 0.0), SIMULATIONS)
    assert 0.01 <= share(effects, lambda effect: effect.p_value <= 0.05) <= 0.05


def test_the_simulation_convicts_a_bootstrap_that_draws_three_seeds_with_replacement() -> None:
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(300):
        a, b = (side[0].per_prompt for side in drawn(rng, 3, 60, 6.0))
        prompts = np.stack([np.bincount(rng.integers(0, 60, 60), minlength=60) for _ in range(200)]) / 60
        runs = [rng.multinomial(3, [1 / 3] * 3, 200) / 3 for _ in "ab"]
        draws = np.einsum("rs,sn,rn->r", runs[0], a, prompts) - np.einsum("rs,sn,rn->r", runs[1], b, prompts)
        low, high = np.quantile(draws, [0.025, 0.975])
        wrong += low > 0 or high < 0
    assert wrong / 300 > 0.10


@pytest.mark.parametrize(("seeds", "training_std", "benchmarks"), [(1, 0.0, 1), (3, 1.5, 1), (3, 1.5, 3)])
def test_the_interval_holds_the_true_difference_95_times_in_100(seeds: int, training_std: float, benchmarks: int) -> None:
    effects = simulated(6, lambda rng: drawn(rng, seeds, 50, training_std, 4.0, benchmarks), SIMULATIONS)
    assert 0.93 <= share(effects, lambda effect: effect.low <= 4.0 <= effect.high) <= 0.97


def test_one_seed_agrees_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(7)
    for shift in (0.0, 1.0, 2.5):
        a, b = (side[0] for side in drawn(rng, 1, 120, 0.0, shift))
        ours, theirs = paired_bootstrap(a, b), stats.ttest_rel(a.per_prompt[0], b.per_prompt[0])
        low, high = theirs.confidence_interval()
        assert ours.difference == pytest.approx(a.scores.mean() - b.scores.mean())
        assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.015)
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.04 * (high - low))
        lower = stats.ttest_rel(a.per_prompt[0], b.per_prompt[0], alternative="less").pvalue
        assert ours.p_lower == pytest.approx(lower, abs=0.015)


def test_few_prompts_give_the_width_of_the_t_interval() -> None:
    rng, ratios = np.random.default_rng(20), []
    for _ in range(40):
        a, b = (side[0] for side in drawn(rng, 1, 10, 0.0, 20.0))
        ours, theirs = paired_bootstrap(a, b), stats.ttest_rel(a.per_prompt[0], b.per_prompt[0]).confidence_interval()
        ratios.append((ours.high - ours.difference) / (theirs.high - ours.difference))
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


def test_one_seed_agrees_with_the_bootstrap_of_scipy() -> None:
    a, b = (side[0] for side in drawn(np.random.default_rng(8), 1, 300, 0.0, 1.5))
    ours = paired_bootstrap(a, b)
    theirs = stats.bootstrap((a.per_prompt[0] - b.per_prompt[0],), np.mean, method="basic", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))


@pytest.mark.parametrize("seeds", [(3, 3), (2, 5)])
def test_where_only_training_varies_it_agrees_with_welchs_test_of_the_seeds(seeds: tuple[int, int]) -> None:
    rng = np.random.default_rng(9)
    hard = rng.standard_normal(200)
    tables = [30 + shift + hard + rng.standard_normal((count, 1)) for shift, count in zip((2.0, 0.0), seeds, strict=True)]
    ours = paired_bootstrap(scores(tables[0], "a"), scores(tables[1], "b"))
    theirs = stats.ttest_ind(tables[0].mean(axis=1), tables[1].mean(axis=1), equal_var=False)
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.015)
    low, high = theirs.confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_training_variance_widens_the_interval() -> None:
    rng = np.random.default_rng(10)
    (a,), (b,) = drawn(rng, 3, 200, 0.0, 1.0)
    shifts = np.array([-3.0, 0.0, 3.0])[:, None, None]
    wide = paired_bootstrap(PromptScores("a", "bench0", a.train_seeds, a.ids, a.scores + shifts), b)
    narrow = paired_bootstrap(a, b)
    assert wide.difference == pytest.approx(narrow.difference)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_training_runs_are_common_to_all_benchmarks() -> None:
    """Runs that are good on one benchmark and bad on another cancel in the mean; runs that are good on both do not."""
    rng = np.random.default_rng(11)
    base = [rng.standard_normal((3, 80)) for _ in range(4)]
    runs = np.array([[-3.0], [0.0], [3.0]])
    b = [scores(base[0], "b", "x"), scores(base[1], "b", "y")]
    cancel = macro_bootstrap([scores(base[2] + runs, "a", "x"), scores(base[3] - runs, "a", "y")], b)
    add = macro_bootstrap([scores(base[2] + runs, "a", "x"), scores(base[3] + runs, "a", "y")], b)
    assert add.high - add.low > 5 * (cancel.high - cancel.low)


def test_the_mean_over_benchmarks_weighs_benchmarks_alike_whatever_their_prompts() -> None:
    rng = np.random.default_rng(12)
    tables = {"x": rng.standard_normal((1, 40)), "y": rng.standard_normal((1, 400))}
    a = [scores(tables["x"] + 4, "a", "x"), scores(tables["y"] + 1, "a", "y")]
    b = [scores(tables["y"][:, ::-1] * 1.1, "b", "y"), scores(tables["x"][:, ::-1], "b", "x")]
    effect = macro_bootstrap(a, b)
    assert effect.difference == pytest.approx(
        np.mean([paired_bootstrap(a[0], b[1]).difference, paired_bootstrap(a[1], b[0]).difference])
    )
    assert effect.n_prompts == 440
    spread = [np.var(x.per_prompt - y.per_prompt, ddof=1) / len(x.ids) for x, y in ((a[0], b[1]), (a[1], b[0]))]
    assert effect.high - effect.difference == pytest.approx(1.99 * math.sqrt(sum(spread)) / 2, rel=0.05)


def test_prompts_are_paired_by_id() -> None:
    a, b = (side[0] for side in drawn(np.random.default_rng(13), 2, 50, 1.0, 1.0))
    order = np.random.default_rng(1).permutation(50)
    shuffled = PromptScores("b", b.benchmark, b.train_seeds, tuple(b.ids[index] for index in order), b.scores[:, :, order])
    assert paired_bootstrap(a, shuffled) == paired_bootstrap(a, b)


def test_decoding_seeds_are_averaged_first() -> None:
    (a,), (b,) = drawn(np.random.default_rng(14), 2, 40, 1.0)
    twice = PromptScores("a", a.benchmark, a.train_seeds, a.ids, np.concatenate([a.scores - 5, a.scores + 5], axis=1))
    assert paired_bootstrap(twice, b) == paired_bootstrap(a, b)


def test_the_same_seed_gives_the_same_and_the_order_of_the_methods_only_the_sign() -> None:
    a, b = (side[0] for side in drawn(np.random.default_rng(15), 3, 60, 1.0, 2.0))
    effect, back = paired_bootstrap(a, b, seed=4), paired_bootstrap(b, a, seed=4)
    assert effect == paired_bootstrap(a, b, seed=4) != paired_bootstrap(a, b, seed=5)
    assert back.difference == -effect.difference
    assert back.p_value == pytest.approx(effect.p_value, abs=0.015) and back.low == pytest.approx(-effect.high, rel=0.05)
    assert effect.p_lower > 0.5 > back.p_lower


def test_draws_are_made_in_pieces_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (side[0] for side in drawn(np.random.default_rng(16), 1, 60, 0.0, 1.0))
    whole = paired_bootstrap(a, b)
    for pieces in (10, 7000):  # fewer than the prompts, and a number that does not divide the resamples
        monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", pieces)
        pieced = paired_bootstrap(a, b)
        assert pieced.p_value == pytest.approx(whole.p_value, abs=0.015) and pieced.low == pytest.approx(whole.low, abs=0.1)


def test_equal_scores_differ_by_nothing() -> None:
    table = np.random.default_rng(17).uniform(0, 100, (1, 30))
    effect = paired_bootstrap(scores(np.repeat(table, 3, axis=0)), scores(table, trained=False))
    assert (effect.difference, effect.p_value, effect.p_lower) == (0, 1, 1)
    assert (effect.low, effect.high) == pytest.approx((0, 0), abs=1e-9)


@given(st.integers(6, 40), st.integers(0, 12), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_the_interval_holds_zero_just_where_the_test_does_not_separate(n: int, differ: int, seeds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 4, (1, n)) * 25.0
    other = np.repeat(base, seeds, axis=0)
    other[:, : min(n, differ)] += rng.integers(0, 3, (seeds, min(n, differ))) * 10.0
    effect = paired_bootstrap(scores(other), scores(base), resamples=199)
    assert (effect.low <= 0 <= effect.high) == (effect.p_value > 0.05)
    assert effect.low <= effect.difference <= effect.high
    assert 0 < effect.p_value <= 1 and 0 < effect.p_lower <= 1


@pytest.mark.parametrize(("differ", "separated"), [(1, False), (5, False), (6, True), (100, True)])
def test_few_prompts_that_differ_separate_nothing(differ: int, separated: bool) -> None:
    """The exact sign test of five pairs that all agree gives p = 2 / 2⁵."""
    right = 100.0 * (np.arange(100) < differ)[None]
    effect = paired_bootstrap(scores(right), scores(np.zeros((1, 100))))
    assert (effect.p_value <= 0.05) is separated
    assert effect.p_value >= stats.binomtest(differ, differ).pvalue


def test_a_single_prompt_tells_nothing() -> None:
    effect = paired_bootstrap(scores(np.array([[90.0]])), scores(np.array([[10.0]])))
    assert (effect.difference, effect.low, effect.high, effect.p_value) == (80, -math.inf, math.inf, 1)


@pytest.mark.parametrize(
    ("a", "b", "seeds", "measured"),
    [
        ((3, True), (2, True), 2, True),
        ((1, True), (3, True), 1, False),
        ((1, True), (1, True), 1, False),
        ((3, True), (1, False), 3, True),
        ((1, True), (1, False), 1, False),
        ((1, False), (1, False), 0, True),
    ],
)
def test_the_effect_says_whether_training_variance_is_in_it(
    a: tuple[int, bool], b: tuple[int, bool], seeds: int, measured: bool
) -> None:
    rng = np.random.default_rng(18)
    sides = [scores(rng.uniform(0, 100, (count, 20)), trained=trained) for count, trained in (a, b)]
    effect = paired_bootstrap(*sides)
    assert (effect.n_training_seeds, effect.training_variance, effect.n_prompts) == (seeds, measured, 20)


def test_other_prompts_are_refused() -> None:
    table = np.zeros((1, 3))
    b = PromptScores("sft", "dolly", (10,), ("p0", "p1", "q"), table[:, None])
    with pytest.raises(DataError, match=r"dolly: kd has 3 prompts and sft has 3, of which 2 are only .* \(for example p2\)"):
        paired_bootstrap(scores(table), b)


def test_other_benchmarks_are_refused() -> None:
    x, y = scores(np.zeros((1, 3)), benchmark="x"), scores(np.zeros((1, 3)), benchmark="y")
    for a, b in (([x], [y]), ([x, y], [x]), ([x, x], [x]), ([x], [x, x]), ([], [])):
        with pytest.raises(DataError, match="cannot pair scores"):
            macro_bootstrap(a, b)


def test_other_training_seeds_on_another_benchmark_are_refused() -> None:
    a = [scores(np.zeros((2, 3)), benchmark="x"), scores(np.zeros((1, 3)), benchmark="y")]
    with pytest.raises(DataError, match=r"kd: training seeds \[10\] on y, but \[10, 11\] on x"):
        macro_bootstrap(a, a)


def test_scores_must_fit_their_names() -> None:
    with pytest.raises(DataError, match=r"scores of kd on dolly have shape \(1, 1, 2\); expected \[1 training seeds, decoding"):
        PromptScores("kd", "dolly", (10,), ("p",), np.zeros((1, 1, 2)))
    with pytest.raises(DataError, match="at least one of each"):
        PromptScores("kd", "dolly", (10,), ("p",), np.zeros((1, 0, 1)))
    with pytest.raises(DataError, match="prompt id p is there twice"):
        PromptScores("kd", "dolly", (10,), ("q", "p", "p"), np.zeros((1, 1, 3)))
    with pytest.raises(DataError, match="not all finite"):
        PromptScores("kd", "dolly", (10,), ("p",), np.full((1, 1, 1), math.nan))


def test_too_few_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="resamples is 99"):
        paired_bootstrap(scores(np.zeros((1, 3))), scores(np.zeros((1, 3))), resamples=99)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9, 0.5]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []
    with pytest.raises(ValueError, match="0–1"):
        holm([0.2, 1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(deadline=None)
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """By definition: a hypothesis falls when every intersection that it is part of does (Marcus, Peritz, Gabriel 1976)."""
    everything = range(len(p_values))
    sets = [held for size in range(1, len(p_values) + 1) for held in itertools.combinations(everything, size)]
    brute = [
        max(min(1.0, len(held) * min(p_values[other] for other in held)) for held in sets if index in held)
        for index in everything
    ]
    assert holm(p_values) == pytest.approx(brute)


def test_the_verdict_follows_the_adjusted_p_value_and_the_sign() -> None:
    above = Effect(1.0, 0.2, 1.8, 0.01, 0.99, 100, 3, True)
    below = Effect(-1.0, -1.8, -0.2, 0.01, 0.005, 100, 3, True)
    assert (verdict(above, 0.01), verdict(below, 0.05), verdict(above, 0.051)) == ("better", "worse", "not separated")
    assert verdict(above, 0.02, alpha=0.01) == "not separated"
    assert verdict(Effect(0.0, 0.0, 0.0, 0.01, 1.0, 100, 3, True), 0.01) == "not separated"


def test_power_grows_with_the_difference_the_prompts_and_the_seeds() -> None:
    for values in (
        [power(difference, 200, 6, 6, 3, 0.5) for difference in (0, 0.5, 1, 2, 4)],
        [power(1, prompts, 6, 6, 3, 0.5) for prompts in (20, 100, 500, 2000)],
        [power(2, 200, 6, 6, seeds, 0.5) for seeds in (2, 3, 5, 10)],
        [power(2, 200, 6, 6, 3, training) for training in (2, 1, 0.5, 0)],
    ):
        assert all(low < high for low, high in itertools.pairwise(values))
    assert power(-1, 200, 6, 6, 3, 0.5) == power(1, 200, 6, 6, 3, 0.5)
    assert power(0, 200, 6, 6, 1) == pytest.approx(0.05, abs=0.005)


def test_power_with_one_seed_is_that_of_the_paired_t_test() -> None:
    for difference, prompts in ((1.0, 30), (1.0, 250), (2.0, 100)):
        shift = difference / math.sqrt((36 + 2 * 25) / prompts)
        limit = stats.t.ppf(0.975, prompts - 1)
        theirs = stats.nct.sf(limit, prompts - 1, shift) + stats.nct.cdf(-limit, prompts - 1, shift)
        assert power(difference, prompts, 6, 5) == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize(("seeds", "training_std", "difference"), [(1, 0.0, 2.0), (3, 1.0, 3.0), (5, 1.0, 2.0)])
def test_power_is_the_share_of_simulated_comparisons_that_separate(seeds: int, training_std: float, difference: float) -> None:
    effects = simulated(19, lambda rng: drawn(rng, seeds, 80, training_std, difference), SIMULATIONS)
    found = share(effects, lambda effect: effect.p_value <= 0.05)
    assert found == pytest.approx(power(difference, 80, 4 * math.sqrt(2), 6, seeds, training_std), abs=0.04)


def test_the_documented_powers_are_those_of_the_function() -> None:
    rows = re.findall(r"\| ([\d.]+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", power.__doc__ or "")
    assert len(rows) == 10
    for difference, prompts, seeds, training_std, documented in rows:
        assert f"{power(float(difference), int(prompts), 6, 6, int(seeds), float(training_std)):.2f}" == documented


def test_the_interpolated_quantile_of_t_is_that_of_scipy() -> None:
    freedom = np.geomspace(0.3, 1e6, 200)
    np.testing.assert_allclose(statistics._t_limit(freedom), stats.t.ppf(0.975, freedom), rtol=0.015)
