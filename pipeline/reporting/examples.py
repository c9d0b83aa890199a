"""Which generations a report shows: chosen by a rule that is named, never by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.reporting.statistics import PromptScores

SHOWN, GAINS, LOSSES = 20, 7, 7
GAIN, LOSS, RANDOM = "largest gain", "largest loss", "random"
RULE = (
    f"The {GAINS} prompts with the largest gains over the baseline, the {LOSSES} with the largest losses, and others drawn by "
    f"a seeded hash of their ids until there are {SHOWN}. Gains and losses are of a prompt's ROUGE-L, the mean over all "
    "training and decoding seeds; methods take turns in the order of the table, and no prompt is shown twice. The texts are "
    "those of the first training seed and the first decoding seed."
)
DRAWN_RULE = (
    f"{SHOWN} prompts, or as many as there are, drawn by a seeded hash of their ids. The texts are those of the first decoding "
    "seed."
)


@dataclass(frozen=True)
class Choice:
    """A prompt that the report shows.

    Attributes:
        rule: GAIN, LOSS or RANDOM.
        method: whose gain or loss it is, None where the prompt is drawn.
        benchmark: the prompt's benchmark.
        id: the prompt.
        gain: the method's score minus the baseline's on it, points; None where the prompt is drawn.
    """

    rule: str
    method: str | None
    benchmark: str
    id: str
    gain: float | None


Prompt = tuple[str, str]
"""Benchmark and id."""


def choose(scores: Sequence[PromptScores], baseline: str | None, seed: int = 0) -> list[Choice]:
    """The same scores, baseline and seed always give the same prompts; fewer where there are no more.

    A prompt on which a method and the baseline score alike is neither its gain nor its loss.

    Args:
        scores: of every model on every benchmark. Only methods beside the baseline have gains and losses.
        baseline: name of a method; None draws every prompt.
        seed: of the drawn ones.
    """
    gains = {} if baseline is None else _gains(scores, baseline)
    shown: set[Prompt] = set()
    chosen = [
        *_extreme(gains, GAIN, GAINS, shown, sign=-1.0),
        *_extreme(gains, LOSS, LOSSES, shown, sign=1.0),
    ]
    prompts = dict.fromkeys((own.benchmark, name) for own in scores for name in own.ids)
    rest = sorted((prompt for prompt in prompts if prompt not in shown), key=lambda prompt: _draw(prompt, seed))
    drawn = rest[: SHOWN - len(chosen)]
    return [*chosen, *(Choice(RANDOM, None, benchmark, name, None) for benchmark, name in drawn)]


def _gains(scores: Sequence[PromptScores], baseline: str) -> dict[str, dict[Prompt, float]]:
    """Method → prompt → its score minus the baseline's."""
    found: dict[str, dict[Prompt, float]] = {}
    for own in scores:
        found.setdefault(own.method, {}).update(
            {(own.benchmark, name): float(value) for name, value in zip(own.ids, own.per_prompt.mean(axis=0), strict=True)}
        )
    base = found.pop(baseline)
    return {method: {prompt: own[prompt] - base[prompt] for prompt in own if prompt in base} for method, own in found.items()}


def _extreme(
    gains: Mapping[str, Mapping[Prompt, float]], rule: str, count: int, shown: set[Prompt], sign: float
) -> Iterator[Choice]:
    """Methods in turn give their most extreme prompt that is not yet shown; what is chosen is added to `shown`."""
    queues = {
        method: sorted((prompt for prompt in own if sign * own[prompt] < 0), key=lambda prompt: (sign * own[prompt], prompt))
        for method, own in gains.items()
    }
    while count and any(queues.values()):
        for method, queue in queues.items():
            while queue and queue[0] in shown:
                queue.pop(0)
            if queue and count:
                prompt = queue.pop(0)
                shown.add(prompt)
                count -= 1
                yield Choice(rule, method, *prompt, gains[method][prompt])


def _draw(prompt: Prompt, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{prompt[0]}:{prompt[1]}".encode()).hexdigest()
