"""Every method against a plain derivation from its formula: the loss, and every gradient of the student and the projection.

The plain side knows nothing of the losses' code: full logits of the models' own forward passes, sums in Python loops over
rows, positions and pairs, gradients by autograd. Its formulas are those of the design (L, M, JSD by g(c)) and of the papers.

    L = (1 − α)·CE(labels, q) + α·[ D_task(p, q) + λ·mean over pairs of D_lens(p_l', q_l) + w·MSE(features) ]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from pipeline.config.methods import MethodConfig
from pipeline.data.collate import Batch, collate
from pipeline.data.examples import EncodedExample
from pipeline.losses import fused
from pipeline.losses.objective import Objective, new_projection
from pipeline.models.lens import logit_lens
from pipeline.stages.objectives import Method, build_objective
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.step import Student, Teacher, micro_batch_loss

STUDENT_LAYERS, TEACHER_LAYERS = 3, 5
Pairs = list[tuple[int, int]]
UNIFORM: Pairs = [(1, 2), (2, 3)]
"""Two pairs for 3 of 5 layers: l = 1, 2 and l' = round(l · 5 / 3)."""

# --- plain formulas, each for one position: logits [V] in, nats out


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return forward_kl(q, p)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """½·E_p[g(c)], c = q/p, g(c) = c·log c − (1 + c)·log((1 + c)/2)."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    c = (log_q - log_p).exp()
    return 0.5 * (log_p.exp() * (c * c.log() - (1 + c) * ((1 + c) / 2).log())).sum()


def jeffreys(p: Tensor, q: Tensor) -> Tensor:
    return forward_kl(p, q) + reverse_kl(p, q)


def adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    """Share of Σ|p − q| on the teacher's head · forward KL + the rest · reverse KL; the share is a constant."""
    probs = [(float(a), float(b)) for a, b in zip(p.detach().softmax(-1), q.detach().softmax(-1), strict=True)]
    cumulative = head_gap = tail_gap = 0.0
    for rank, (a, b) in enumerate(sorted(probs, reverse=True)):
        cumulative += a
        if rank == 0 or cumulative <= 0.5:
            head_gap += abs(a - b)
        else:
            tail_gap += abs(a - b)
    share = head_gap / (head_gap + tail_gap)
    return share * forward_kl(p, q) + (1 - share) * reverse_kl(p, q)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "fkl_rkl": jeffreys,
    "jensen_shannon": jensen_shannon,
    "adaptive_kl": adaptive_kl,
    "jeffreys": jeffreys,
}
FINAL_DIVERGENCE = {
    "kd": "forward_kl",
    "rkl": "reverse_kl",
    "fkl_rkl": "fkl_rkl",
    "jsd": "jensen_shannon",
    "akl": "adaptive_kl",
    "mse": "forward_kl",
    "distilllens": "reverse_kl",
}
"""What a method compares the final distributions by, unless its `task` says otherwise."""
TERM = {"distilllens": "lens", "mse": "features"}


@dataclass(frozen=True)
class View:
    """A model's forward pass on one batch: logits [B, T, V] and states of every layer, the last one normed."""

    model: PreTrainedModel
    logits: Tensor
    states: tuple[Tensor, ...]

    def lens_logits(self, layer: int, row: int, position: int, normed: bool, vocab: int) -> Tensor:
        """[V'] of the model's own head on one state."""
        if layer == len(self.states) - 1:
            return self.logits[row, position, :vocab]
        state = self.states[layer][row, position]
        body = self.model.base_model
        norm = body.ln_f if hasattr(body, "ln_f") else body.norm
        return self.model.lm_head(norm(state) if normed else state)[:vocab]


def view(model: PreTrainedModel, batch: Batch) -> View:
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False)
    return View(model, output.logits, output.hidden_states)


def plain_loss(case: Case, setting: Setting) -> Tensor:
    """The loss of one micro-batch: the sum over its response tokens, divided by the whole step's."""
    batch, vocab = setting.batch, setting.vocab
    student = view(setting.student, batch)
    with torch.no_grad():
        teacher = view(setting.teacher, batch)
    rows, width = batch.labels.shape
    response = [(b, t) for b in range(rows) for t in range(width) if batch.labels[b, t] != -100]
    alpha = 0.0 if case.kind in ("sft", "seqkd") else case.alpha
    total = student.logits.new_zeros(())
    for b, t in response:
        if alpha < 1:
            total = total - (1 - alpha) * student.logits[b, t, :vocab].log_softmax(-1)[batch.labels[b, t]]
        if alpha > 0:
            task = FORMULAS[case.extra.get("task", FINAL_DIVERGENCE[case.kind])]
            total = total + alpha * task(teacher.logits[b, t, :vocab], student.logits[b, t, :vocab])
    loss = total / setting.denominator
    share = len(response) / setting.denominator
    if alpha > 0 and case.kind == "distilllens":
        lens = plain_lens(case.term, case.pairs, student, teacher, setting)
        loss = loss + alpha * case.term.get("weight", 1.0) * share * lens
    if alpha > 0 and case.kind == "mse":
        error = plain_features(case.term, case.pairs, student, teacher, setting, response)
        loss = loss + alpha * case.term.get("weight", 1.0) * share * error
    return loss


def plain_lens(lens: dict[str, Any], pairs: Pairs, student: View, teacher: View, setting: Setting) -> Tensor:
    """Weighted mean over pairs of the mean over positions; the weights have mean 1."""
    labels, formula = setting.batch.labels, FORMULAS[lens.get("divergence", "jensen_shannon")]
    normed, vocab = lens.get("final_norm", False), setting.vocab
    weights = lens.get("layer_weights", [1.0] * len(pairs))
    rows, width = labels.shape
    total, count = student.logits.new_zeros(()), 0
    for b in range(rows):
        for k, (student_layer, teacher_layer) in enumerate(pairs):
            # The published code tiles the masks over rows that it stacks sample by sample, pair by pair.
            mask_of = (b * len(pairs) + k) % rows if lens.get("mask_layout") == "official" else b
            for t in range(width):
                if labels[mask_of, t] != -100:
                    p = teacher.lens_logits(teacher_layer, b, t, normed, vocab).detach()
                    q = student.lens_logits(student_layer, b, t, normed, vocab)
                    total = total + weights[k] * len(pairs) / sum(weights) * formula(p, q)
                    count += 1
    return total / count


def plain_features(
    features: dict[str, Any],
    pairs: Pairs,
    student: View,
    teacher: View,
    setting: Setting,
    response: list[tuple[int, int]],
) -> Tensor:
    """Mean over pairs, positions and dimensions of the squared difference, one side times the projection's matrix."""
    assert setting.projection is not None
    matrix, rows, width = setting.projection.weight, *setting.batch.labels.shape
    everything = [(b, t) for b in range(rows) for t in range(width)]
    errors = []
    for b, t in everything if features.get("positions") == "all" else response:
        for student_layer, teacher_layer in pairs:
            s, h = student.states[student_layer][b, t], teacher.states[teacher_layer][b, t]
            difference = matrix @ s - h if features.get("projection") == "student" else s - matrix @ h
            errors.append((difference**2).mean())
    return torch.stack(errors).mean()


# --- what is compared


@dataclass(frozen=True)
class Case:
    """A method's configuration; `extra` holds what the YAML would."""

    kind: str
    alpha: float
    extra: dict[str, Any]

    @property
    def term(self) -> dict[str, Any]:
        """What is given for the lens or the features."""
        return self.extra.get("lens", self.extra.get("features", {}))

    @property
    def pairs(self) -> Pairs:
        return self.term.get("pairs", UNIFORM)


def method(kind: str, alpha: float = 1.0, **extra: Any) -> Case:
    return Case(kind, alpha, {**({TERM[kind]: {}} if kind in TERM else {}), **extra})


@dataclass(frozen=True)
class Setting:
    """Models, rows and shapes of one comparison.

    Attributes:
        student, teacher: of any two families; their heads may be padded to different lengths.
        vocab: entries that both heads have.
        rows: 1 to 4, of different lengths.
        batch: the rows, padded.
        denominator: response tokens of the whole optimiser step, at least the batch's.
        projection: for feature matching.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    vocab: int
    rows: tuple[EncodedExample, ...]
    batch: Batch
    denominator: int
    projection: nn.Linear | None


def lm(family: str, layers: int, width: int, vocab: int, seed: int) -> PreTrainedModel:
    if family == "gpt2":
        return tiny.gpt2(layers=layers, width=width, vocab=vocab, seed=seed)
    if family == "qwen2":
        return tiny.qwen2(layers=layers, width=width, vocab=vocab, seed=seed)
    return tiny.llama(layers=layers, width=width, vocab=vocab, tie=family == "llama-tied", seed=seed)


FAMILIES = ("gpt2", "llama-tied", "llama-untied", "qwen2")
"""GPT-2 is tied, Qwen2 is not."""


def random_setting(seed: int, dtype: str, case: Case, rows: int | None = None) -> Setting:
    """Random shapes; the student's family goes with the seed, so four seeds see all of them."""
    rng, kind = random.Random(seed), getattr(torch, dtype)
    common = rng.randint(29, 61)
    vocabs = [common, common + rng.choice([0, 7])]
    rng.shuffle(vocabs)
    student = lm(FAMILIES[seed % 4], STUDENT_LAYERS, rng.choice([8, 16, 24]), vocabs[0], seed).to(kind)
    teacher = lm(rng.choice(FAMILIES), TEACHER_LAYERS, rng.choice([16, 24, 32]), vocabs[1], seed + 1).to(kind)
    examples = tuple(random_row(rng, f"e{index}", common) for index in range(rows or rng.randint(1, 4)))
    batch = collate(examples, pad_token_id=0, pad_to=rng.choice([None, 10]))
    term = objective_of(case).features
    projection = None
    if term is not None:
        torch.manual_seed(seed)
        projection = new_projection(term, student.config.hidden_size, teacher.config.hidden_size).to(kind)
        nn.init.normal_(projection.weight, std=0.3)
    denominator = sum(batch.response_counts) + rng.choice([0, 13])
    return Setting(student, teacher, common, examples, batch, denominator, projection)


def random_row(rng: random.Random, name: str, vocab: int) -> EncodedExample:
    length = rng.randint(4, 9)
    return EncodedExample(name, tuple(rng.randrange(vocab) for _ in range(length)), rng.randint(1, length - 1))


def objective_of(case: Case) -> Objective:
    """The objective as an experiment file would give it."""
    content = {"kind": case.kind, **case.extra}
    if case.kind in TERM:
        given = "pairs" in case.term
        pairs = {"kind": "explicit", "pairs": case.pairs} if given else {"kind": "uniform", "count": len(UNIFORM)}
        content[TERM[case.kind]] = {**case.term, "pairs": pairs}
    config = TypeAdapter(MethodConfig).validate_python(content)
    alpha = 0.0 if case.kind in ("sft", "seqkd") else case.alpha
    return build_objective(Method(case.kind, config, alpha, STUDENT_LAYERS, TEACHER_LAYERS, pruned=False), None)


def pipeline_loss(case: Case, setting: Setting) -> Tensor:
    student = Student(setting.student, logit_lens(setting.student, setting.vocab), setting.projection)
    teacher = Teacher(OnlineTeacher(setting.teacher), logit_lens(setting.teacher, setting.vocab))
    return micro_batch_loss(
        student, teacher, objective_of(case), setting.batch, denominator=setting.denominator, autocast=None
    ).total


def parameters(setting: Setting) -> dict[str, nn.Parameter]:
    named = dict(setting.student.named_parameters())
    if setting.projection is not None:
        named["projection"] = setting.projection.weight
    return named


def gradients(loss: Tensor, setting: Setting) -> dict[str, Tensor]:
    named = parameters(setting)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), found, strict=True)
    }


def compare(case: Case, setting: Setting, dtype: str) -> None:
    agree(plain_loss(case, setting), pipeline_loss(case, setting), setting, TOLERANCE[dtype])


def agree(expected: Tensor, found: Tensor, setting: Setting, tolerance: float) -> None:
    """Values relative to their size; each parameter's gradient relative to the norm of all of them."""
    assert float(expected.detach()) > 1e-3
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=0)
    wanted, got = gradients(expected, setting), gradients(found, setting)
    norm = float(torch.stack([grad.norm() for grad in wanted.values()]).norm())
    assert norm > 1e-3
    off = {name: float((got[name] - wanted[name]).norm()) / norm for name in wanted}
    assert max(off.values()) <= tolerance, {name: error for name, error in off.items() if error > tolerance}
    if setting.projection is not None:
        assert wanted["projection"].norm() > 1e-4


METHODS = {
    "sft": method("sft"),
    "seqkd": method("seqkd"),
    "kd": method("kd"),
    "rkl": method("rkl"),
    "fkl_rkl": method("fkl_rkl"),
    "jsd": method("jsd"),
    "akl": method("akl"),
    "mse": method("mse"),
    "distilllens": method("distilllens"),
}
ABLATIONS = {
    **{f"{kind}, half CE": method(kind, 0.5) for kind in ("kd", "rkl", "fkl_rkl", "jsd", "akl", "mse", "distilllens")},
    **{f"{kind}, all CE": method(kind, 0.0) for kind in ("kd", "rkl", "fkl_rkl", "jsd", "akl", "distilllens")},
    **{f"lens {name}": method("distilllens", lens={"divergence": name}) for name in FORMULAS if name != "jensen_shannon"},
    **{f"task {name}": method("distilllens", task=name) for name in FORMULAS if name != "reverse_kl"},
    "lambda": method("distilllens", lens={"weight": 2.5}),
    "lambda 0": method("distilllens", lens={"weight": 0.0}),
    "final norm": method("distilllens", lens={"final_norm": True}),
    "final norm, Jeffreys, half CE": method("distilllens", 0.5, lens={"final_norm": True, "divergence": "jeffreys"}),
    "first and last layers": method("distilllens", lens={"pairs": [(0, 0), (3, 5), (2, 5), (0, 3)]}),
    "first and last layers, final norm": method("distilllens", lens={"pairs": [(0, 0), (3, 5), (2, 5)], "final_norm": True}),
    "one pair": method("distilllens", lens={"pairs": [(2, 3)]}),
    "layer weights": method("distilllens", lens={"layer_weights": [1.0, 3.0]}),
    "layer weights, one is 0": method(
        "distilllens", lens={"pairs": [(1, 1), (1, 2), (2, 4), (3, 5)], "layer_weights": [1.0, 2.0, 5.0, 0.0]}
    ),
    "mse of student's projection": method("mse", features={"projection": "student"}),
    "mse at all positions": method("mse", features={"positions": "all"}),
    "mse of student's projection at all positions": method("mse", 0.5, features={"projection": "student", "positions": "all"}),
    "mse beside another divergence": method("mse", task="jensen_shannon", features={"weight": 0.3}),
    "mse of final states": method("mse", features={"pairs": [(0, 0), (3, 5)]}),
}
OFFICIAL = {
    "official masks": method("distilllens", lens={"mask_layout": "official"}),
    "official masks, three pairs": method("distilllens", lens={"mask_layout": "official", "pairs": [(1, 1), (2, 3), (3, 5)]}),
    "official masks, weighed": method("distilllens", 0.5, lens={"mask_layout": "official", "layer_weights": [3.0, 1.0]}),
    "official masks, final norm": method("distilllens", lens={"mask_layout": "official", "final_norm": True}),
}
TOLERANCE = {"float64": 1e-8, "float32": 1e-5}


@pytest.fixture(autouse=True)
def _norms_keep_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers' RMS norms narrow to float32; these do not, so that float64 is float64 on both sides."""

    def norm(self: Any, states: Tensor) -> Tensor:
        variance = states.square().mean(-1, keepdim=True)
        return self.weight * states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm)
    yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", METHODS)
def test_a_method(name: str, seed: int, dtype: str) -> None:
    compare(METHODS[name], random_setting(seed, dtype, METHODS[name]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("index", "name"), enumerate(ABLATIONS))
def test_an_ablation(index: int, name: str, dtype: str) -> None:
    compare(ABLATIONS[name], random_setting(100 + index, dtype, ABLATIONS[name]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize(("index", "name"), enumerate(OFFICIAL))
def test_the_published_mask_layout(index: int, name: str, rows: int, dtype: str) -> None:
    compare(OFFICIAL[name], random_setting(200 + index, dtype, OFFICIAL[name], rows), dtype)


@pytest.mark.parametrize("name", ["sft", "akl", "distilllens"])
def test_a_method_in_small_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "default_chunk_tokens", lambda vocab_size: 3)
    setting = random_setting(301, "float64", METHODS[name], rows=4)
    assert len(setting.batch.response_positions) > 6
    compare(METHODS[name], setting, "float64")


@pytest.mark.parametrize("cuts", [[1], [2], [1, 2]])
@pytest.mark.parametrize(("index", "name"), enumerate(METHODS))
def test_micro_batches_sum_to_the_whole_batch(index: int, name: str, cuts: list[int]) -> None:
    case = METHODS[name]
    whole = random_setting(400 + index, "float64", case, rows=4)
    parts = [whole.rows[start:stop] for start, stop in zip([0, *cuts], [*cuts, 4], strict=True)]
    losses = [pipeline_loss(case, replace(whole, batch=collate(rows, pad_token_id=0))) for rows in parts]
    agree(plain_loss(case, whole), sum(losses[1:], losses[0]), whole, TOLERANCE["float64"])
