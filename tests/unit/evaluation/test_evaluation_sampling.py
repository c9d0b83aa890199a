from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import NoRepeatNGramLogitsProcessor, TopPLogitsWarper

from pipeline.evaluation.sampling import SeenNgrams, filter_top_p, sample, uniform_noise


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=0, max_size=20))
def test_banned_tokens_equal_those_of_transformers(size: int, tokens: list[int]) -> None:
    seen = SeenNgrams(size)
    for length, token in enumerate(tokens, start=1):
        seen.push(token)
        scores = NoRepeatNGramLogitsProcessor(size)(torch.tensor([tokens[:length]]), torch.zeros(1, 4))
        assert set(seen.banned()) == set((scores[0] == -torch.inf).nonzero().flatten().tolist())


def test_copies_of_seen_ngrams_are_independent() -> None:
    first = SeenNgrams(2, [1, 2, 1])
    second = first.copy()
    first.push(3)
    first.push(1)
    assert set(first.banned()) == {2, 3}
    assert second.banned() == (2,)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(top_p: float) -> None:
    logits = torch.randn(8, 1000) * 3
    logits[0, ::3] = -torch.inf
    expected = TopPLogitsWarper(top_p)(torch.zeros(8, 1, dtype=torch.long), logits)
    assert torch.equal(filter_top_p(logits, top_p), expected)


def test_top_p_keeps_the_most_probable_token_and_one_keeps_all() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert filter_top_p(logits, 1e-6).isfinite().tolist() == [[False, True, False]]
    assert filter_top_p(logits, 1.0) is logits


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 257, 1000])
def test_sample_inverts_the_cumulative_distribution(vocabulary: int) -> None:
    logits = torch.randn(64, vocabulary) * 3
    logits[:, ::2] -= torch.inf if vocabulary > 1 else 0.0
    uniforms = torch.rand(64, dtype=torch.float64)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    expected = (cumulative <= uniforms[:, None]).sum(dim=-1)
    assert torch.equal(sample(logits, uniforms), expected)


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_excluded_tokens_are_never_drawn_at_the_ends_of_the_range(uniform: float) -> None:
    logits = torch.randn(200, 600)
    logits[:, :100] = logits[:, -100:] = -torch.inf
    tokens = sample(logits, torch.full((200,), uniform, dtype=torch.float64))
    assert set(tokens.tolist()) == {100 if uniform == 0 else 499}


def test_samples_follow_the_distribution() -> None:
    logits = torch.randn(300) * 1.5
    noise = torch.from_numpy(uniform_noise(1, "an example", 60_000))
    counts = torch.bincount(sample(logits.expand(60_000, -1), noise), minlength=300)
    expected = logits.double().softmax(dim=-1) * 60_000
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_noise_belongs_to_seed_and_example_and_begins_alike() -> None:
    noise = uniform_noise(10, "a", 8)
    assert noise.tolist() == uniform_noise(10, "a", 100)[:8].tolist()
    assert len({tuple(uniform_noise(seed, name, 8)) for seed in (10, 20) for name in ("a", "b")}) == 4
    assert ((noise >= 0) & (noise < 1)).all()


def test_noise_is_the_same_on_every_machine() -> None:
    assert uniform_noise(10, "row-1", 2).tolist() == [0.9128401764699006, 0.6898157575602373]
