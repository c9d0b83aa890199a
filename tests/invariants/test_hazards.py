"""The known hazards of the design, each with a test that fails if it were mishandled."""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import stages
import tiny
import torch
from rows import encode_training, read_examples
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.artifacts import Artifact
from pipeline.config.methods import Evaluation, Features, Lens, Validation
from pipeline.data.collate import IGNORE_INDEX, collate
from pipeline.data.examples import EncodedExample, EncodedPrompt, Example
from pipeline.data.sources import LocalSource
from pipeline.errors import CacheMismatchError, ConfigError, ModelError
from pipeline.evaluation.generate import DecodingProtocol, generate
from pipeline.losses import divergences
from pipeline.losses.divergences import DIVERGENCES, divergence_of_logits
from pipeline.losses.fused import vocab_divergence
from pipeline.losses.head import Head
from pipeline.losses.objective import FeatureTerm, LensTerm, Objective, Side, feature_error, lens_divergence
from pipeline.models.lens import check_vocabulary_sizes, logit_lens
from pipeline.plan import Plan, check_inputs
from pipeline.reporting import render
from pipeline.reporting.aggregate import RunScores, result_rows, table
from pipeline.reporting.differences import differences
from pipeline.stages import evaluate, fit, prepare, train
from pipeline.stages.evaluate import read_scores
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.feed import Order, feed
from pipeline.training.step import Student, Teacher, micro_batch_loss

VOCAB, WIDTH = 300, 32
PAIRS = ((1, 2), (2, 4))
ROWS = [EncodedExample(f"e{i}", tuple(range(3 + i, 9 + 4 * i)), 2 + i % 3) for i in range(8)]


def grid_side(states: dict[int, Tensor], weight: Tensor, last: int = 9) -> Side:
    """A model of which only the states [B, T, d] by layer and the head are known."""
    return Side(lambda layer, at: states[layer].flatten(0, 1)[at], Head(weight), lambda x: x, last)


def loss_of(
    model: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, rows: Sequence[EncodedExample]
) -> Tensor:
    batch = collate(rows, pad_token_id=0)
    asked = None if teacher is None else Teacher(OnlineTeacher(teacher), logit_lens(teacher))
    student = Student(model, logit_lens(model))
    return micro_batch_loss(student, asked, objective, batch, denominator=sum(batch.response_counts), autocast=None).total


# 1


def test_hazard_01_every_lens_row_has_its_own_response_mask() -> None:
    labels = torch.full((3, 8), IGNORE_INDEX)
    labels[0, 1:3], labels[1, 4:5], labels[2, 2:8] = 7, 7, 7
    students = {layer: torch.randn(3, 8, WIDTH) for layer in (1, 2)}
    teachers = {layer: torch.randn(3, 8, WIDTH) for layer in (2, 4)}
    heads = torch.randn(2, VOCAB, WIDTH)

    def lens(layout: str, rows: slice, states: dict[int, Tensor] = students) -> float:
        term, own = LensTerm(1.0, "jensen_shannon", PAIRS, False, layout), labels[rows]
        positions = (own != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        student = grid_side({layer: grid[rows] for layer, grid in states.items()}, heads[0])
        teacher = grid_side({layer: grid[rows] for layer, grid in teachers.items()}, heads[1])
        return float(lens_divergence(term, student, teacher, own, positions))

    counts = (labels != IGNORE_INDEX).sum(1).tolist()
    alone = [lens("aligned", slice(row, row + 1)) for row in range(3)]
    weighted = sum(count * value for count, value in zip(counts, alone, strict=True)) / sum(counts)
    everything = slice(None)
    assert lens("aligned", everything) == pytest.approx(weighted, rel=1e-5)
    # What a model makes of prompt and padding plays no role; under the published layout it does.
    outside = (labels == IGNORE_INDEX).unsqueeze(-1)
    disturbed = {layer: torch.where(outside, 10 * torch.randn_like(grid), grid) for layer, grid in students.items()}
    assert lens("aligned", everything, disturbed) == pytest.approx(weighted, rel=1e-5)
    assert abs(lens("official", everything, disturbed) - lens("official", everything)) > 1e-3
    assert Lens().mask_layout == "aligned"


# 2


@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2])
def test_hazard_02_the_final_state_is_never_normed_again(family: Callable[..., PreTrainedModel]) -> None:
    student, teacher = family(layers=3, seed=1), family(layers=6, seed=2)
    for model in (student, teacher):
        torch.nn.init.normal_(logit_lens(model).norm.weight, mean=2.0)  # norming twice is not norming once
    final = LensTerm(1.0, "reverse_kl", ((3, 6),), True, "aligned")
    task = loss_of(student, teacher, Objective(1.0, "reverse_kl"), ROWS[:3])
    both = loss_of(student, teacher, Objective(1.0, "reverse_kl", lens=final), ROWS[:3])
    torch.testing.assert_close(both, 2 * task)


@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2])
def test_hazard_02_intermediate_states_are_raw_as_in_the_paper_or_normed_on_request(
    family: Callable[..., PreTrainedModel],
) -> None:
    student, teacher = family(layers=3, seed=1), family(layers=6, seed=2)
    batch = collate(ROWS[:2], 0)

    def states(model: PreTrainedModel, layer: int, normed: bool) -> Tensor:
        body = model.base_model
        output = body(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states[layer]
        norm = body.ln_f if hasattr(body, "ln_f") else body.norm
        return (norm(output) if normed else output).flatten(0, 1)[batch.response_positions]

    for normed in (False, True):
        objective = Objective(1.0, lens=LensTerm(1.0, "jensen_shannon", ((2, 4),), normed, "aligned"))
        logits = [model.lm_head(states(model, layer, normed)) for model, layer in ((teacher, 4), (student, 2))]
        expected = divergences.jensen_shannon(*logits).mean()
        torch.testing.assert_close(loss_of(student, teacher, objective, ROWS[:2]), expected)
    assert Lens().final_norm is False


# 3


def test_hazard_03_feature_matching_looks_at_the_response_alone() -> None:
    labels = torch.full((2, 6), IGNORE_INDEX)
    labels[0, 2:4], labels[1, 3:6] = 7, 7
    positions = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    states, target = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    projection = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    outside = (labels == IGNORE_INDEX).unsqueeze(-1)
    disturbed = torch.where(outside, states + 5.0, states)
    head = torch.randn(VOCAB, 8)

    def error(where: str, grid: Tensor) -> float:
        term, teacher = FeatureTerm(1.0, ((1, 1),), where, "teacher"), grid_side({1: target}, head)
        with torch.no_grad():
            return float(feature_error(term, grid_side({1: grid}, head), teacher, labels, positions, projection))

    assert error("response", disturbed) == error("response", states)
    assert error("all", disturbed) > error("all", states) + 1
    assert Features().positions == "response"


# 4


@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2, tiny.qwen2])
def test_hazard_04_labels_are_shifted_exactly_once(family: Callable[..., PreTrainedModel]) -> None:
    model, rows = family(layers=3, seed=1), [ROWS[3], ROWS[5]]
    width = max(len(row.input_ids) for row in rows)
    ids, unshifted = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), IGNORE_INDEX)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        unshifted[index, row.prompt_tokens : len(row.input_ids)] = torch.tensor(row.input_ids[row.prompt_tokens :])
    expected = model(ids, labels=unshifted).loss  # transformers shifts by itself
    torch.testing.assert_close(loss_of(model, None, Objective(0.0), rows), expected)


# 5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_hazard_05_minus_infinity_gives_finite_values_and_gradients(name: str) -> None:
    teacher, student = torch.randn(4, 20), torch.randn(4, 20)
    teacher[0, 3] = student[1, 5] = teacher[2, 7] = student[2, 7] = -math.inf
    teacher[3, 1:] = student[3, :-1] = -math.inf  # disjoint
    student.requires_grad_()
    nats = divergence_of_logits(DIVERGENCES[name], teacher, student)
    nats.sum().backward()
    assert nats.isfinite().all() and student.grad.isfinite().all()
    assert student.grad[0].abs().max() > 1e-3  # and not switched off


@pytest.mark.parametrize("name", DIVERGENCES)
def test_hazard_05_minus_infinity_in_a_head_gives_finite_values_and_gradients(name: str) -> None:
    student, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    bias = torch.zeros(20)
    bias[4] = -math.inf
    bias.requires_grad_()
    value = vocab_divergence(
        student, Head(weight, bias), torch.randn(5, 8), Head(torch.randn(20, 8), bias.detach().roll(3)), divergence=name
    )
    value.backward()
    assert value.isfinite()
    for tensor in (student, weight, bias):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hazard_05_adaptive_kl_of_equals_is_zero_with_a_zero_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 50, dtype=dtype)
    logits[1, 3] = -math.inf
    student = logits.clone().requires_grad_()
    nats = divergences.adaptive_kl(logits, student)
    nats.sum().backward()
    torch.testing.assert_close(nats.detach(), torch.zeros(6, dtype=dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)


def test_hazard_05_adaptive_kl_of_a_student_that_is_its_teacher_leaves_every_weight_alone() -> None:
    model, teacher = tiny.llama(layers=3, seed=1), tiny.llama(layers=3, seed=1)
    loss = loss_of(model, teacher, Objective(1.0, "adaptive_kl"), ROWS[:3])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-5, name


def test_hazard_05_jensen_shannon_keeps_small_probabilities() -> None:
    """log(x + 1e-8) would see nothing below 1e-8: q = 1e-12 where p = ½ has the gradient ½·q·(log(q/m) − JSD's own mean)."""
    tiny_logit = math.log(1e-12)
    teacher = torch.tensor([[math.log(0.5), math.log(0.5)]])
    student = torch.tensor([[0.0, tiny_logit]], requires_grad=True)
    divergences.jensen_shannon(teacher, student).sum().backward()
    q = 1e-12
    own = 0.5 * q * math.log(q / 0.25)
    others = 0.5 * math.log(1 / 0.75)
    assert float(student.grad[0, 1]) == pytest.approx(own - q * (own + others), rel=1e-4)
    flat = torch.zeros(1, 300_000)  # every probability is 3e-6
    shifted = flat + torch.linspace(-1, 1, 300_000)
    exact = divergences.jensen_shannon(flat.double(), shifted.double())
    assert float(divergences.jensen_shannon(flat, shifted)) == pytest.approx(float(exact), rel=1e-5)
    far = torch.tensor([[0.0, 500.0]])
    assert float(divergences.jensen_shannon(far, far.flip(-1))) == pytest.approx(math.log(2), rel=1e-6)


# 6


def test_hazard_06_padding_with_the_end_token_masks_no_real_end_token() -> None:
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = [Example("short", "say", "", ("the cat",)), Example("long", "say", "", ("the cat sat on a mat and saw birds",))]
    rows, _ = encode_training(texts, tokenizer, "alpaca", 250, 500)
    batch = collate(rows, tokenizer.pad_token_id)
    for row, labels in zip(rows, batch.labels, strict=True):
        learned = labels[labels != IGNORE_INDEX].tolist()
        assert learned == list(row.input_ids[row.prompt_tokens :]) and learned[-1] == tokenizer.eos_token_id
    assert batch.attention_mask.sum(1).tolist() == [len(row.input_ids) - 1 for row in rows]


@pytest.mark.parametrize("family", [tiny.gpt2, tiny.llama])
def test_hazard_06_left_padding_moves_no_position(family: Callable[..., PreTrainedModel]) -> None:
    model, tokenizer = family(seed=5), tiny.tokenizer()
    prompts = [EncodedPrompt(f"p{n}", "", tuple(range(20, 20 + n)), ("",)) for n in (3, 11, 7)]
    found = {
        generation.id: list(generation.token_ids)
        for generation in generate(model, tokenizer, prompts, DecodingProtocol(8, do_sample=False), [1], batch_size=3)
    }
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        for _ in range(8):
            with torch.no_grad():
                token = model(ids).logits[:, -1].argmax(-1, keepdim=True)  # no padding, no cache
            ids = torch.cat([ids, token], dim=1)
            if int(token) == tokenizer.eos_token_id:
                break
        assert found[prompt.id] == ids[0, len(prompt.input_ids) :].tolist()


# 7


def test_hazard_07_padded_heads_are_compared_on_the_common_prefix() -> None:
    student, teacher = tiny.llama(layers=3, vocab=320, tie=False, seed=1), tiny.llama(layers=6, vocab=304, seed=2)
    common = check_vocabulary_sizes(304, 320, 300)
    batch = collate(ROWS[:3], 0)

    def loss() -> Tensor:
        objective = Objective(0.5, "forward_kl", lens=LensTerm(1.0, "jensen_shannon", PAIRS, False, "aligned"))
        asked = Teacher(OnlineTeacher(teacher), logit_lens(teacher, common))
        mine = Student(student, logit_lens(student, common))
        return micro_batch_loss(mine, asked, objective, batch, denominator=sum(batch.response_counts), autocast=None).total

    expected = loss()
    expected.backward()
    gradient = student.lm_head.weight.grad
    assert common == 304 and gradient[304:].abs().max() == 0 and gradient[:304].abs().max() > 1e-4
    with torch.no_grad():
        student.lm_head.weight[304:] = 50.0  # would take all of the probability
    torch.testing.assert_close(loss(), expected)


def with_student(folder: Path, vocab: int, swap: bool = False) -> Plan:
    """An experiment whose student is a model of its own; `swap` gives its tokenizer other ids for the same tokens."""
    student = tiny.save(tiny.llama(layers=3, vocab=vocab), folder / f"student{vocab}")
    if swap:
        content = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
        ids = content["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        (student / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return stages.planned(folder, student={"kind": "pretrained", "model": {"kind": "local", "path": str(student)}})


def test_hazard_07_a_head_that_lacks_tokens_is_refused_and_a_padded_one_is_not(tmp_path: Path) -> None:
    check_inputs(with_student(tmp_path, 320))
    with pytest.raises(ModelError, match="vocabularies differ: the heads have 300 and 280 entries, the tokenizer has 300"):
        check_inputs(with_student(tmp_path, 280))


@pytest.mark.parametrize("vocab", [300, 320])
def test_hazard_07_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path, vocab: int) -> None:
    plan = with_student(tmp_path, vocab, swap=True)
    with pytest.raises(ModelError, match="tokenizer"):
        check_inputs(plan)


# 8


def test_hazard_08_overlong_prompts_are_dropped_or_truncated_and_counted() -> None:
    tokenizer = tiny.tokenizer()
    rows = [
        Example("short", "say", "the cat", ("birds",)),
        Example("context", "say", "first " + "the cat sat on a mat " * 40 + "final", ("birds",)),
        Example("instruction", "say " * 400, "the cat", ("birds",)),
    ]
    limit = 220
    kept, counts = encode_training(rows, tokenizer, "alpaca", limit, 500, "drop")
    assert [row.id for row in kept] == ["short"]
    assert (counts.kept, counts.overlong_prompt, counts.truncated_context) == (1, 2, 0)
    kept, counts = encode_training(rows, tokenizer, "alpaca", limit, 500, "truncate_context")
    assert [row.id for row in kept] == ["short", "context"]
    assert (counts.kept, counts.overlong_prompt, counts.truncated_context) == (2, 1, 1)
    prompt = tokenizer.decode(kept[1].input_ids[: kept[1].prompt_tokens])
    assert kept[1].prompt_tokens <= limit and prompt.endswith("### Response:\n")
    assert "first" in prompt and "final" in prompt and " ... " in prompt  # the middle is what went


# 9


def test_hazard_09_a_fair_experiment_refuses_settings_of_a_methods_own(tmp_path: Path) -> None:
    for own in ({"alpha": 0.5}, {"train": {"learning_rate": 1e-4}}):
        with pytest.raises(ConfigError, match=r"fair: true gives every method"):
            stages.planned(tmp_path, methods={"kd": own, "distilllens": None})


def trained_settings(plan: Plan) -> dict[str, set[str]]:
    """Setting → its different values over the methods of the plan."""
    return {row.setting: set(row.values.values()) for row in differences(stages.method_settings(plan.trials))}


def test_hazard_09_every_difference_between_methods_is_listed(tmp_path: Path) -> None:
    lens = {"lens": {"pairs": {"kind": "uniform", "count": 2}}}
    fair = trained_settings(stages.planned(tmp_path, methods={"kd": None, "rkl": None, "distilllens": lens}))
    assert "alpha" not in fair and not any(name.startswith("train.") for name in fair)
    assert fair["task"] == {"forward_kl", "reverse_kl"} and "lens.weight" in fair
    unfair = stages.planned(
        tmp_path, fair=False, methods={"kd": {"alpha": 0.5, "train": {"learning_rate": 1e-4}}, "distilllens": lens}
    )
    found = trained_settings(unfair)
    assert found["alpha"] == {"0.5", "1"} and found["train.learning_rate"] == {"0.0001", "0.001"}
    order = {(trial.train.training.seeds[0], trial.train.training.batch_size) for trial in unfair.trials if trial.train}
    assert len(order) == 1


# 10


def test_hazard_10_training_and_decoding_seeds_have_variances_of_their_own(tmp_path: Path) -> None:
    per_run = {10: [30.0, 32.0, 34.0], 20: [20.0, 21.0, 22.0]}
    rows = result_rows([RunScores("kd", seed, "dolly", {"rouge_l": values}) for seed, values in per_run.items()])
    cell = table(rows)["kd"]["dolly"]
    assert cell.mean == 26.5
    assert cell.train_std == pytest.approx(statistics.stdev([32.0, 21.0]))
    assert cell.decoding_std == pytest.approx((2.0 + 1.0) / 2)
    one = table(result_rows([RunScores("kd", 10, "dolly", {"rouge_l": per_run[10]})]))["kd"]["dolly"]
    assert one.train_std is None and one.decoding_std == pytest.approx(2.0)  # five decodings of one checkpoint are no runs
    render.write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="") as stream:
        reader = csv.DictReader(stream)
        written = [row for row in reader if row["benchmark"] == "dolly"]
    assert reader.fieldnames == ["method", "train_seed", "benchmark", "metric", "mean", "std", "n_decoding_seeds"]
    assert [(row["train_seed"], float(row["mean"]), float(row["std"]), row["n_decoding_seeds"]) for row in written] == [
        ("10", 32.0, 2.0, "3"),
        ("20", 21.0, 1.0, "3"),
    ]


def test_hazard_10_every_training_seed_is_a_run_that_every_decoding_seed_decodes(tmp_path: Path) -> None:
    plan = stages.planned(tmp_path, methods={"kd": None}, train={"max_steps": 2, "batch_size": 6, "seeds": [1, 2, 3]})
    runs = [trial for trial in plan.trials if trial.train is not None]
    assert [trial.seed for trial in runs] == [1, 2, 3]
    assert len({trial.train.place.fingerprint for trial in runs}) == 3
    assert all(evaluation.seeds == [1, 2] for trial in runs for evaluation in trial.evaluations)


def evaluated_teacher(folder: Path, *overrides: str) -> Artifact:
    """The teacher's scores on a benchmark of which a random model gets something right."""
    rows, path = [{**row, "output": " ".join("abcdefghijklmnopqrstuvwxyz")} for row in tiny.rows(4)], folder / "letters.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = stages.planned(folder, *overrides, methods={"sft": None}, benchmarks={"letters": {"source": {"path": str(path)}}})
    prepare.run_benchmark(plan.benchmarks[0])
    (evaluation,) = plan.trials[0].evaluations
    return evaluate.run(evaluation, evaluate.load_subject(evaluation.subject))


def test_hazard_10_decoding_seeds_decode_one_checkpoint(tmp_path: Path) -> None:
    longer = "evaluation.decoding.max_new_tokens=40"
    scores = read_scores(evaluated_teacher(tmp_path, longer, "evaluation.seeds=[5,6,7]").path)
    assert [seed["seed"] for seed in scores["per_seed"]] == scores["protocol"]["seeds"] == [5, 6, 7]
    found = [seed["rouge_l"] for seed in scores["per_seed"]]
    assert scores["rouge_l"]["mean"] == pytest.approx(statistics.fmean(found))
    assert scores["rouge_l"]["std"] == pytest.approx(statistics.stdev(found)) and scores["rouge_l"]["std"] > 0
    one = read_scores(evaluated_teacher(tmp_path, longer, "evaluation.seeds=[6]").path)
    assert one["rouge_l"] == {"mean": pytest.approx(found[1]), "std": None}


# 11


def test_hazard_11_test_decoding_bans_repeated_ngrams_and_validation_does_not() -> None:
    assert Evaluation().decoding.no_repeat_ngram_size == 6 and Validation().decoding.no_repeat_ngram_size == 0
    model, prompt = tiny.llama(seed=5), EncodedPrompt("p", "", (20, 21, 22), ("",))
    with torch.no_grad():
        model.lm_head.weight[0] = -1e3 * model.lm_head.weight[0].sign()  # the end token hardly ever

    def decoded(size: int) -> list[int]:
        protocol = DecodingProtocol(40, do_sample=False, no_repeat_ngram_size=size)
        (generation,) = generate(model, tiny.tokenizer(), [prompt], protocol, [1], batch_size=1)
        return [*prompt.input_ids, *generation.token_ids]

    def repeats(ids: list[int], size: int) -> int:
        grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
        return len(grams) - len(set(grams))

    assert repeats(decoded(0), 2) > 0 and repeats(decoded(2), 2) == 0


def test_hazard_11_the_protocol_is_stored_with_every_score(tmp_path: Path) -> None:
    hashes = set()
    for size in (0, 6):
        scores = read_scores(evaluated_teacher(tmp_path, f"evaluation.decoding.no_repeat_ngram_size={size}").path)
        assert scores["protocol"]["decoding"]["no_repeat_ngram_size"] == size
        hashes.add(scores["protocol_hash"])
    assert len(hashes) == 2  # and the second was not taken from the first


def test_hazard_11_validation_decodes_by_a_protocol_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[DecodingProtocol] = []

    def spy(model: PreTrainedModel, tokenizer: object, prompts: object, protocol: DecodingProtocol, *_: int) -> float:
        used.append(protocol)
        return 1.0

    monkeypatch.setattr(fit, "dev_rouge", spy)
    plan = stages.run_inputs(stages.planned(tmp_path, "evaluation.decoding.no_repeat_ngram_size=6", methods={"sft": None}))
    train.run(stages.training(plan, "sft"))
    assert used and {protocol.no_repeat_ngram_size for protocol in used} == {0}


# 12


def capture_rows(model: PreTrainedModel, rows: Sequence[EncodedExample], folder: Path) -> CachedTeacher:
    folder.mkdir()
    key, device = CacheKey("t", "k", "alpaca", "d", (2, 6), "float32", 64), torch.device("cpu")
    capture(model, rows, key.layers, folder, key, shard_bytes=2048, batch_size=3, pad_token_id=0, device=device)
    return CachedTeacher(folder, key, num_layers=6, device=device)


def test_hazard_12_a_cache_is_keyed_by_example_id(tmp_path: Path) -> None:
    model = tiny.llama(layers=6, seed=2)
    cached = capture_rows(model, ROWS[::-1], tmp_path / "cache")
    batch = collate([ROWS[i] for i in (4, 1, 6, 0)], 0)
    found, online = cached.signal(batch, (2, 6)), OnlineTeacher(model).signal(batch, (2, 6))
    for layer in (2, 6):
        at = batch.response_positions
        torch.testing.assert_close(found.states(layer, at), online.states(layer, at), rtol=1e-5, atol=1e-5)
    # The same row under another name is another row, whatever stands at its place.
    with pytest.raises(CacheMismatchError, match="1 examples are not in the teacher cache"):
        cached.signal(collate([replace(ROWS[0], id="unknown")], 0), (2,))


def test_hazard_12_a_capture_does_not_depend_on_the_order_of_its_rows(tmp_path: Path) -> None:
    model = tiny.llama(layers=6, seed=2)
    for name, rows in (("a", ROWS), ("b", random.Random(1).sample(ROWS, len(ROWS)))):
        capture_rows(model, rows, tmp_path / name)
    shards = [sorted((tmp_path / name).glob("*.arrow")) for name in "ab"]
    assert len(shards[0]) > 1
    assert [(file.name, file.read_bytes()) for file in shards[0]] == [(file.name, file.read_bytes()) for file in shards[1]]


class Unsteady:
    """Rows, some of which take their time."""

    def __init__(self, waits: Sequence[float]) -> None:
        self._waits = iter(waits)
        self.lengths = [len(row.input_ids) - 1 for row in ROWS]

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> EncodedExample:
        time.sleep(next(self._waits))
        return ROWS[index]


def test_hazard_12_the_order_of_training_depends_on_no_worker() -> None:
    def ids(waits: Sequence[float], seed: int) -> list[tuple[str, ...]]:
        order = Order(batch_size=3, micro_batch_size=3, seed=seed, total=6)
        steps = feed(Unsteady(waits), order, 0, pad_token_id=0, device=torch.device("cpu"), source=None, layers=())
        return [batch.example_ids for step in steps for batch in step.micro_batches]

    rng = random.Random(2)
    hasty, slow = [0.0] * 99, [rng.choice([0.0, 0.01]) for _ in range(99)]
    assert ids(hasty, seed=3) == ids(slow, seed=3) != ids(hasty, seed=4)
    torch.manual_seed(77)  # nor on what has been drawn before
    assert ids(hasty, seed=3) == ids(slow, seed=3)


def test_hazard_12_an_id_names_the_content_wherever_the_row_stands(tmp_path: Path) -> None:
    def names(rows: Sequence[dict[str, str]]) -> dict[str, str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {example.instruction: example.id for example in read_examples(LocalSource(path))}

    rows = tiny.rows(9)
    first = names(rows)
    assert len(set(first.values())) == 9
    assert names(random.Random(3).sample(rows, 9)) == first
    changed = names([{**rows[0], "output": "something else"}, *rows[1:]])
    assert [name for name in first if first[name] != changed[name]] == [rows[0]["instruction"]]
