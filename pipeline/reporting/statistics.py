"""Whether two methods differ: a paired bootstrap over prompts with the variance of training in it, and Holm's correction.

The model: the score of training seed s on prompt i is a crossed layout (Brennan 2001, Generalizability Theory, p × r),
mean + prompt i + training run s + residual, the residual holding their interaction and the decoding noise that the mean
over decoding seeds left. The variance of a difference between two methods is therefore

    prompts: variance over prompts of the paired difference, averaged over training seeds, over the number of prompts
    training, for each method with two seeds or more: variance over seeds of the mean score over the number of seeds, less
        the residual's part of it, which the first term holds already; not below 0 (as in the two-way clustering of Cameron,
        Gelbach and Miller 2011 and the pigeonhole bootstrap of Owen 2007)

A bootstrap that draws three training seeds with replacement sees 2/3 of their variance, and none in 1 of 9 draws: its false
positives at a nominal 5 % reach 28, 16 and 10 % with 2, 3 and 5 seeds. So prompts are drawn with replacement, pairs kept
together, while the effect of training is drawn from a normal distribution of the estimated variance, and each draw is
divided by the root of a χ² draw over its degrees of freedom (Satterthwaite 1946), because that variance is an estimate
itself. With one training seed this is the paired bootstrap with a small-sample correction, close to the paired t-test (Efron
and Tibshirani 1993, §16.4).

False positives in simulation: 4.5 to 5.5 % with one training seed; at most 7, 6 and 5.5 % with 2, 3 and 5, and 2 to 4 % where
training has no variance and the residual is large: then too little is claimed. Two seeds are too few for a correction over
many methods: at a nominal 1 % they give up to 2.5 %. Training seeds of two methods are taken to be independent even if they
have the same numbers: where they share luck (the order of the data) too little is claimed as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "not separated"]

ALPHA = 0.05
RESAMPLES = 10_000
_DRAWS_AT_ONCE = 2**22
_POWER_DRAWS = 100_000
# Degrees of freedom from many to few, and the quantile.
_T_LIMITS = (
    (1e9, 1.9600), (30, 2.0423), (10, 2.2281), (6, 2.4469), (4, 2.7764), (3, 3.1824), (2.5, 3.5747), (2, 4.3027), (1.6, 5.5172),
    (1.3, 7.5005), (1.1, 10.277), (1, 12.706), (0.8, 23.328), (0.6, 67.844), (0.5, 164.56), (0.35, 1730.5), (0.25, 43640),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class PromptScores:
    """One method's scores on one benchmark, prompt by prompt.

    Attributes:
        method: its name.
        benchmark: name of the benchmark.
        train_seeds: training seeds; (None,) for a model that was not trained here, whose training has no variance.
        ids: prompt ids.
        scores: [training seeds, decoding seeds, prompts], 0–100.

    Raises:
        DataError: the array does not fit to seeds and ids, an id is there twice, or a score is not finite.
    """

    method: str
    benchmark: str
    train_seeds: tuple[int | None, ...]
    ids: tuple[str, ...]
    scores: Array

    def __post_init__(self) -> None:
        what = f"scores of {self.method} on {self.benchmark}"
        shape = self.scores.shape
        if len(shape) != 3 or (shape[0], shape[2]) != (len(self.train_seeds), len(self.ids)) or 0 in shape:
            raise DataError(
                f"{what} have shape {shape}; expected [{len(self.train_seeds)} training seeds, decoding seeds, "
                f"{len(self.ids)} prompts], at least one of each"
            )
        if len(set(self.ids)) < len(self.ids):
            twice = next(name for name in self.ids if self.ids.count(name) > 1)
            raise DataError(f"{what}: prompt id {twice} is there twice; give every prompt an id of its own")
        if not np.isfinite(self.scores).all():
            raise DataError(f"{what} are not all finite; evaluate it again")

    @property
    def trained(self) -> bool:
        """Whether it was trained here."""
        return self.train_seeds != (None,)

    @property
    def per_prompt(self) -> Array:
        """[training seeds, prompts]: means over decoding seeds."""
        mean: Array = self.scores.mean(axis=1)
        return mean


@dataclass(frozen=True)
class Effect:
    """How far one method scores above another.

    Attributes:
        difference: first minus second, points.
        low, high: 95 % interval of the difference; infinite where a benchmark has a single prompt.
        p_value: two-sided; at most 0.05 just where the interval does not hold 0.
        p_lower: one-sided, small where the first is lower.
        n_prompts: pairs, over all benchmarks together.
        n_training_seeds: the fewer of the two methods' training seeds, models not trained here left out; 0 if both are such.
        training_variance: whether the interval holds the variance of training of every method trained here. If not, it
            speaks of these checkpoints only.
    """

    difference: float
    low: float
    high: float
    p_value: float
    p_lower: float
    n_prompts: int
    n_training_seeds: int
    training_variance: bool


@dataclass(frozen=True)
class _Part:
    """A part of a difference's variance.

    Attributes:
        variance: what it adds.
        observed: the estimate that it was made from, before anything was taken off: that makes it smaller, not surer.
        freedom: degrees of freedom of `observed`.
    """

    variance: float
    observed: float
    freedom: int


def paired_bootstrap(a: PromptScores, b: PromptScores, resamples: int = RESAMPLES, seed: int = 0) -> Effect:
    """How far `a` scores above `b` on their benchmark, by the test that the module describes.

    Args:
        a: scores of one method.
        b: scores of the other on the same prompts, in any order.
        resamples: bootstrap draws, at least 100; the least p-value is 1 / (resamples + 1) (Davison and Hinkley 1997, ch. 4).
        seed: of the draws; the same data and seed give the same result.

    Raises:
        DataError: other benchmarks or prompts.
        ValueError: too few resamples.
    """
    return macro_bootstrap([a], [b], resamples, seed)


def macro_bootstrap(a: Sequence[PromptScores], b: Sequence[PromptScores], resamples: int = RESAMPLES, seed: int = 0) -> Effect:
    """How far `a` scores above `b` on the mean over benchmarks, each benchmark's prompts drawn for themselves.

    A training run is one for all benchmarks, so the variance of training is that of the runs' means over benchmarks.

    Args:
        a: scores of one method, one for each benchmark.
        b: scores of the other on the same benchmarks, in any order.
        resamples: bootstrap draws, see `paired_bootstrap`.
        seed: of the draws.

    Raises:
        DataError: other benchmarks or prompts, or training seeds that are not the same on every benchmark.
        ValueError: too few resamples.
    """
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; a 95 % interval needs at least 100")
    pairs = _paired(a, b)
    # Rounded, so that the same scores added in another order are no difference.
    prompts = [np.round(x.mean(axis=0) - y.mean(axis=0), 9) for x, y in pairs]
    sides = [[x for x, _ in pairs], [y for _, y in pairs]]
    difference = float(np.mean([values.mean() for values in prompts]))
    seeds = [len(scores.train_seeds) for scores in (a[0], b[0]) if scores.trained]
    about = (sum(map(len, prompts)), min(seeds, default=0), 1 not in seeds)
    if min(map(len, prompts)) < 2:
        return Effect(difference, -math.inf, math.inf, 1.0, 1.0, *about)
    training = [_training(tables) for tables in sides if len(tables[0]) > 1]
    draws = _draws_around_zero(prompts, training, resamples, np.random.default_rng(seed))
    # Exact tests flip the signs of pairs; with few that differ they, and so we, cannot separate anything.
    least = 0.5 ** sum(int(np.count_nonzero(values)) for values in prompts)
    p_value = max(_share(np.abs(draws) >= abs(difference)), min(1.0, 2 * least))
    p_lower = max(_share(draws <= difference), least)
    margin = float(np.sort(np.abs(draws))[math.ceil((resamples + 1) * (1 - ALPHA)) - 1])
    low, high = difference - margin, difference + margin
    if p_value > ALPHA:
        low, high = min(low, 0.0), max(high, 0.0)
    return Effect(difference, low, high, p_value, p_lower, *about)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold the family-wise error rate (Holm 1979), in the given order.

    Raises:
        ValueError: a value outside 0–1.
    """
    if not all(0 <= value <= 1 for value in p_values):
        raise ValueError(f"p-values must lie in 0–1, not {list(p_values)}")
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def verdict(effect: Effect, adjusted_p: float, alpha: float = ALPHA) -> Verdict:
    """What may be said of the first method: its p-value after correction decides, not the size of the difference."""
    if adjusted_p > alpha or effect.difference == 0:
        return "not separated"
    return "better" if effect.difference > 0 else "worse"


def power(
    difference: float,
    n_prompts: int,
    prompt_std: float,
    residual_std: float,
    n_training_seeds: int = 1,
    training_std: float = 0.0,
) -> float:
    """Chance that the test at 5 % separates two methods that truly differ: one benchmark, no correction, normal effects.

    It draws the estimates that the test rests on instead of scores. With prompt_std 6 and residual_std 6 (ROUGE-L points):

    | difference | prompts | training seeds | training_std | power |
    | ---: | ---: | ---: | ---: | ---: |
    | 1 | 100 | 1 | 0 | 0.16 |
    | 2 | 100 | 1 | 0 | 0.48 |
    | 1 | 250 | 1 | 0 | 0.33 |
    | 2 | 250 | 1 | 0 | 0.86 |
    | 1 | 1000 | 1 | 0 | 0.86 |
    | 2 | 250 | 2 | 0.5 | 0.47 |
    | 2 | 250 | 3 | 0.5 | 0.75 |
    | 2 | 250 | 5 | 0.5 | 0.93 |
    | 1 | 1000 | 3 | 0.5 | 0.38 |
    | 1 | 1000 | 5 | 0.5 | 0.65 |

    A row with several seeds claims more than one with a single seed, which speaks of two checkpoints only.

    Args:
        difference: true difference, points.
        n_prompts: paired prompts, at least 2.
        prompt_std: standard deviation over prompts of the true difference.
        residual_std: standard deviation of a method's mean over decoding seeds on a prompt, from training seed to training
            seed, beyond `training_std`.
        n_training_seeds: of each method.
        training_std: standard deviation over training runs of a method's true mean score; plays no role with a single seed.
    """
    draws, seeds = _POWER_DRAWS, n_training_seeds
    rng = np.random.default_rng(0)
    residual = residual_std**2 / (n_prompts * seeds)
    prompts = prompt_std**2 / n_prompts + 2 * residual
    shift, error = rng.standard_normal(draws), math.sqrt(prompts)
    variance = prompts * rng.chisquare(n_prompts - 1, draws) / (n_prompts - 1)
    spread = variance**2 / (n_prompts - 1)
    if seeds > 1:
        observed = (training_std**2 / seeds + residual) * rng.chisquare(seeds - 1, (2, draws)) / (seeds - 1)
        variance += np.maximum(0.0, observed - residual).sum(axis=0)
        spread += (observed**2).sum(axis=0) / (seeds - 1)
        error = math.sqrt(prompts + 2 * training_std**2 / seeds)
    limit = _t_limit(variance**2 / spread) * np.sqrt(variance)
    # Both signs of a draw make the power of −difference that of difference, and no larger difference weaker.
    return float(np.mean([np.abs(difference + error * shift) > limit, np.abs(difference - error * shift) > limit]))


def _t_limit(freedom: Array) -> Array:
    """97.5 % quantile of Student's t, interpolated, within about 1 %."""
    known = np.array(_T_LIMITS)
    limit: Array = np.exp(np.interp(1 / freedom, 1 / known[:, 0], np.log(known[:, 1])))
    return limit


def _paired(a: Sequence[PromptScores], b: Sequence[PromptScores]) -> list[tuple[Array, Array]]:
    """For each benchmark [training seeds, prompts] of both, prompts in one order."""
    others = {scores.benchmark: scores for scores in b}
    names = [scores.benchmark for scores in a]
    if not names or len(set(names)) < len(names) or len(others) < len(b) or set(names) != set(others):
        raise DataError(
            f"cannot pair scores on {', '.join(names) or 'no benchmark'} with scores on "
            f"{', '.join(scores.benchmark for scores in b) or 'no benchmark'}; both must be of the same benchmarks, each once"
        )
    for side in (a, b):
        for scores in side:
            if scores.train_seeds != side[0].train_seeds:
                raise DataError(
                    f"{scores.method}: training seeds {list(scores.train_seeds)} on {scores.benchmark}, but "
                    f"{list(side[0].train_seeds)} on {side[0].benchmark}; evaluate every checkpoint on every benchmark"
                )
    return [_paired_prompts(scores, others[scores.benchmark]) for scores in a]


def _paired_prompts(a: PromptScores, b: PromptScores) -> tuple[Array, Array]:
    if set(a.ids) != set(b.ids):
        odd = sorted(set(a.ids) ^ set(b.ids))
        raise DataError(
            f"{a.benchmark}: {a.method} has {len(a.ids)} prompts and {b.method} has {len(b.ids)}, of which {len(odd)} are only "
            f"in one of them (for example {odd[0]}); a paired comparison needs the same prompts, evaluate both on them"
        )
    place = {name: index for index, name in enumerate(b.ids)}
    return a.per_prompt, b.per_prompt[:, [place[name] for name in a.ids]]


def _training(tables: Sequence[Array]) -> _Part:
    """What the training of one method adds, from [training seeds, prompts] of each benchmark, at least two of both."""
    seeds = len(tables[0])
    runs = np.mean([table.mean(axis=1) for table in tables], axis=0)
    observed = float(runs.var(ddof=1)) / seeds
    residual = sum(_residual_variance(table) / table.size for table in tables) / len(tables) ** 2
    return _Part(max(0.0, observed - residual), observed, seeds - 1)


def _residual_variance(table: Array) -> float:
    """Mean square of the interaction of rows and columns."""
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((rest**2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1)))


def _draws_around_zero(prompts: Sequence[Array], training: Sequence[_Part], resamples: int, rng: np.random.Generator) -> Array:
    """[resamples]: differences as they would be if there were none, widened by the doubt about their variance."""
    draws, parts = np.zeros(resamples), list(training)
    for values in prompts:
        count, share = len(values), 1 / len(prompts)
        # Drawing n of n with replacement has (n − 1)/n of the variance.
        scale = share * math.sqrt(count / (count - 1))
        draws += scale * (_resampled(values, resamples, rng) - values.mean())
        variance = share**2 * float(values.var(ddof=1)) / count
        parts.append(_Part(variance, variance, count - 1))
    total = sum(part.variance for part in parts)
    if total == 0:
        return draws
    draws += math.sqrt(sum(part.variance for part in training)) * rng.standard_normal(resamples)
    freedom = total**2 / sum(part.observed**2 / part.freedom for part in parts)
    # With few degrees of freedom the draws underflow to 0: the interval is then as wide as numbers go, and not NaN.
    spread = np.maximum(rng.chisquare(freedom, resamples), np.finfo(np.float64).tiny)
    widened: Array = draws / np.sqrt(spread / freedom)
    return widened


def _resampled(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """[resamples]: means of values drawn with replacement, in pieces that fit into memory."""
    step = max(1, _DRAWS_AT_ONCE // len(values))
    counts = [min(step, resamples - start) for start in range(0, resamples, step)]
    return np.concatenate([values[rng.integers(0, len(values), (count, len(values)))].mean(axis=1) for count in counts])


def _share(hits: NDArray[np.bool_]) -> float:
    return (1 + int(np.count_nonzero(hits))) / (len(hits) + 1)
