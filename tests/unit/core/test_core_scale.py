from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from pipeline.data.examples import EncodedExample
from pipeline.losses.head import Head
from pipeline.losses.objective import IGNORE_INDEX, LensTerm, Objective, Side, compute
from pipeline.scale import __main__ as document
from pipeline.scale import costs, limits, shapes
from pipeline.scale.cases import A100, GPT2, GPT2_XL, H100, LLAMA3_8B, LLAMA3_70B, LLAMA_7B, TINYLLAMA
from pipeline.scale.costs import Costs
from pipeline.scale.shapes import DISTILLLENS, KD, SFT, Case, Machine, Method, Shape, Workload
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture
from pipeline.training.optim import adamw

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "scale.md"
LLAMA = Shape(2, 256, 640, 300, 4, 2, tied=True, gated_mlp=True)
GPT = Shape(2, 256, 768, 300, 4, 4, tied=True, gated_mlp=False, biases=True, positions=64)
ROWS, TOKENS = 4, 48


def config(shape: Shape) -> PretrainedConfig:
    if shape.gated_mlp:
        return LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        )  # fmt: skip
    return GPT2Config(
        vocab_size=shape.vocab, n_embd=shape.width, n_inner=shape.ffn, n_layer=shape.layers, n_head=shape.heads,
        n_positions=shape.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def model(shape: Shape, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config(shape), dtype=torch.float32, **options).train()


def forward(module: PreTrainedModel, *, half: bool = False, tokens: int = TOKENS) -> Tensor:
    ids = torch.zeros(ROWS, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch without padding takes another path through attention
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        states: Tensor = module.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states


# --- parameters ---


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (GPT2, 124_439_808),
        (GPT2_XL, 1_557_611_200),
        (TINYLLAMA, 1_100_048_384),
        (LLAMA_7B, 6_738_415_616),
        (LLAMA3_8B, 8_030_261_248),
        (LLAMA3_70B, 70_553_706_496),
        (LLAMA, None),
        (replace(LLAMA, tied=False, kv_heads=4), None),
        (GPT, None),
    ],
)
def test_parameters_are_those_of_the_model(shape: Shape, expected: int | None) -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config(shape))
    assert shapes.parameters(shape) == module.num_parameters()
    assert expected in (None, shapes.parameters(shape))


def test_adamw_holds_sixteen_bytes_per_parameter() -> None:
    module = model(LLAMA)
    optimizer = adamw([module], 1e-3, 0.0, (0.9, 0.999))
    forward(module).sum().backward()
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    held = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None), *kept]
    state = limits.memory(one(LLAMA, LLAMA), KD, half=False, online=False).state
    assert state == sum(tensor.numel() * tensor.element_size() for tensor in held)


# --- FLOPs ---


@pytest.mark.parametrize("shape", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_flops_of_the_blocks_are_those_that_torch_counts(shape: Shape) -> None:
    # Eager attention, because the counter does not know the fused kernel of CPUs.
    module = model(shape, attn_implementation="eager")
    with FlopCounterMode(display=False) as ahead:
        states = forward(module)
    with FlopCounterMode(display=False) as back:
        states.sum().backward()
    tokens = ROWS * TOKENS
    assert shapes.forward_flops(shape, tokens, TOKENS) == pytest.approx(ahead.get_total_flops(), rel=0.02)
    both = ahead.get_total_flops() + back.get_total_flops()
    assert shapes.training_flops(shape, tokens, TOKENS) == pytest.approx(both, rel=0.02)


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize(
    "method", [SFT, KD, Method("distilllens", task=True, pairs=2, cross_entropy=False)], ids=lambda m: m.name
)
def test_flops_of_the_objective_are_those_that_torch_counts(method: Method, trained_head: bool) -> None:
    vocab, response = 300, 20
    student, teacher = replace(LLAMA, width=32, vocab=vocab), replace(LLAMA, width=48, vocab=vocab)
    labels = torch.full((1, 64), IGNORE_INDEX)
    labels[0, :response] = 1
    states = {layer: torch.randn(64, 32, requires_grad=True) for layer in (1, 2, 4)}
    own = Side(lambda layer, at: states[layer][at], Head(torch.randn(vocab, 32, requires_grad=trained_head)), lambda x: x, 4)
    fixed = torch.randn(64, 48)
    other = Side(lambda _, at: fixed[at], Head(torch.randn(vocab, 48)), lambda x: x, 4)
    lens = LensTerm(1.0, "jensen_shannon", ((1, 1), (2, 2)), False, "aligned") if method.pairs else None
    alpha = 1.0 if not method.cross_entropy else 0.5 if method.task else 0.0
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        compute(Objective(alpha, "reverse_kl", lens=lens), own, other, labels, denominator=response).total.backward()
    expected = response * shapes.objective_flops(student, teacher, replace(method, head_gradient=trained_head))
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def added(total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    del total
    return 2 * a[0] * a[1] * b[1]


def test_equal_widths_cost_eight_products_of_head_and_state() -> None:
    lens = replace(DISTILLLENS, task=False, pairs=1)
    assert shapes.objective_flops(LLAMA, LLAMA, lens) == 8 * LLAMA.width * LLAMA.vocab


# --- bytes that operations move and that autograd keeps ---

_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class _Traffic(TorchDispatchMode):
    """Bytes of inputs and outputs of every operation that is neither a matrix product nor a view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        taken, given = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        shared = {t.untyped_storage()._cdata for t in taken} & {t.untyped_storage()._cdata for t in given}
        view = function.is_view or (shared and not function._schema.is_mutable)
        if not view and function.overloadpacket.__name__ not in _PRODUCTS:
            self.bytes += sum(t.numel() * t.element_size() for t in (*taken, *given))
        return result


def moved(shape: Shape, tokens: int, *, half: bool, training: bool) -> int:
    module = model(shape).requires_grad_(training)
    with _Traffic() as traffic:
        states = forward(module, half=half, tokens=tokens)
        if training:
            states.backward(torch.ones_like(states))
    return traffic.bytes


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_bytes_between_the_products_are_those_of_the_operations(shape: Shape, half: bool, training: bool) -> None:
    """Bytes per token and layer, and per weight: what a layer more adds, for rows of two lengths."""

    def layer(tokens: int) -> int:
        shallow, deep = (moved(replace(shape, layers=n), tokens, half=half, training=training) for n in (1, 2))
        return deep - shallow

    short, long = layer(TOKENS // 2), layer(TOKENS)
    per_token = (long - short) / (ROWS * TOKENS / 2)
    per_weight = (2 * short - long) / shapes.block_weights(replace(shape, layers=1))
    # Only the bytes show in the seconds of a machine whose other rates have no end.
    machine = fast(activation_bandwidth=1.0, half=half)
    one_layer = replace(shape, layers=1)
    assert costs.body_seconds(one_layer, machine, 1, 0, 0, training=training) == pytest.approx(per_token, rel=0.05)
    cast = costs.body_seconds(one_layer, fast(memory_bandwidth=1.0, half=half), 0, 0, 1, training=training)
    assert cast / shapes.block_weights(one_layer) == pytest.approx(per_weight, abs=0.2)


@contextmanager
def kept(module: PreTrainedModel) -> Iterator[dict[int, Any]]:
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    found: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_activations_are_what_autograd_keeps(shape: Shape, half: bool) -> None:
    def bytes_kept(layers: int) -> int:
        module = model(replace(shape, layers=layers))
        with kept(module) as found:
            forward(module, half=half)
        return sum(storage.nbytes() for storage in found.values())

    a_layer = bytes_kept(3) - bytes_kept(2)
    work = replace(one(shape, shape).workload, tokens=TOKENS, micro_batch=ROWS)
    found = limits.memory(Case("", shape, replace(shape, layers=1), work), SFT, half=half, online=False)
    assert found.activations + found.gathered == pytest.approx(a_layer, rel=0.05)


# --- cache ---


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_cache_bytes_are_those_of_a_capture(tmp_path: Path, dtype: str) -> None:
    rows = [EncodedExample(f"{index:016x}", tuple(range(3, 43 + index)), 5) for index in range(24)]
    key = CacheKey("t", "k", "alpaca/1", "d", (0, 1, 2), dtype, 64)
    counts = capture(
        model(LLAMA), rows, key.layers, tmp_path, key, batch_size=8, pad_token_id=0, device=torch.device("cpu")
    )  # fmt: skip
    method = Method("distilllens", task=True, pairs=2, cross_entropy=False)
    work = Workload(24, 50, counts.response_tokens / 24, 1, 8, 8, (SFT, method), dtype=dtype)
    assert shapes.cache_bytes(Case("", LLAMA, LLAMA, work)) == pytest.approx(counts.bytes, rel=0.02)


# --- time ---


def fast(**slow: Any) -> Machine:
    """Rates without end, but for those that are given."""
    rates = {field.name: math.inf for field in fields(Machine)}
    return Machine(**{**rates, "name": "", "devices": 1, "half": False, **slow})


def one(teacher: Shape, student: Shape, methods: tuple[Method, ...] = (DISTILLLENS,), **changes: Any) -> Case:
    return Case("", teacher, student, replace(Workload(64, 20.0, 10.0, 1, 8, 8, methods), **changes))


def test_a_step_is_the_sum_of_its_parts() -> None:
    case, tokens, response = one(GPT, LLAMA, (KD,)), 8 * 20, 8 * 10
    body, teacher = shapes.training_flops(LLAMA, tokens, 20), shapes.forward_flops(GPT, tokens, 20)
    objective = response * shapes.objective_flops(LLAMA, GPT, KD)
    assert costs.step_seconds(case, KD, fast(body_flops=2.0), online=True) == pytest.approx((body + teacher) / 2)
    assert costs.step_seconds(case, KD, fast(body_flops=2.0), online=False) == pytest.approx(body / 2)
    assert costs.step_seconds(case, KD, fast(lens_flops=2.0), online=True) == pytest.approx(objective / 2)
    assert costs.step_seconds(case, KD, fast(entries=2.0), online=False) == pytest.approx(response * 2 * 300 / 2)
    assert costs.update_seconds(LLAMA, fast(memory_bandwidth=1.0)) == 40 * shapes.parameters(LLAMA)
    assert costs.step_seconds(case, SFT, fast(body_flops=2.0), online=True) == pytest.approx(body / 2)


def test_reading_shows_only_where_it_takes_longer_than_the_step() -> None:
    case = one(GPT, LLAMA)
    bytes_per_step = shapes.cache_bytes(case) / 8
    computing = costs.step_seconds(case, DISTILLLENS, fast(body_flops=1e9), online=False)
    needed = bytes_per_step / computing
    assert costs.read_bandwidth(case, DISTILLLENS, fast(body_flops=1e9, disk_read=1.0)) == pytest.approx(needed)
    quick, slow = (fast(body_flops=1e9, disk_read=factor * needed) for factor in (2, 0.5))
    assert costs.step_seconds(case, DISTILLLENS, quick, online=False) == pytest.approx(computing)
    assert costs.step_seconds(case, DISTILLLENS, slow, online=False) == pytest.approx(2 * computing)
    assert costs.read_bandwidth(case, SFT, quick) == 0.0


def test_a_method_reads_its_own_layers_of_a_shared_cache() -> None:
    case, machine = one(GPT, LLAMA, (KD, DISTILLLENS)), fast(disk_read=1.0)
    all_layers = shapes.cache_bytes(case) / 8
    assert costs.step_seconds(case, DISTILLLENS, machine, online=False) == pytest.approx(all_layers)
    assert costs.step_seconds(case, KD, machine, online=False) == pytest.approx(all_layers / 6)


def test_a_capture_takes_the_longer_of_computing_in_float32_and_writing() -> None:
    case = one(GPT, LLAMA)
    flops = shapes.forward_flops(GPT, 64 * 20, 20)
    assert costs.capture_seconds(case, fast(body_flops=4.0, float32_flops=2.0)) == pytest.approx(flops / 2)
    assert costs.capture_seconds(case, fast(float32_flops=flops, disk_write=1.0)) == shapes.cache_bytes(case)


def test_heads_are_moved_once_per_chunk_where_that_takes_longer_than_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(chunk: int, **rates: float) -> float:
        monkeypatch.setattr(costs, "default_chunk_tokens", lambda _: chunk)
        return costs.objective_seconds(LLAMA, LLAMA, replace(DISTILLLENS, head_gradient=False), fast(**rates), 64.0, 1)

    assert seconds(16, memory_bandwidth=1.0) == 2 * seconds(32, memory_bandwidth=1.0) == 4 * 6 * 3 * 4 * LLAMA.head_weights
    assert seconds(16, memory_bandwidth=1e9, lens_flops=1.0) == seconds(32, memory_bandwidth=1e9, lens_flops=1.0)


# --- cache or online ---


def test_break_even() -> None:
    assert costs.break_even(10.0, [4.0]) == 3
    assert costs.break_even(10.0, [5.0]) == 3  # two runs only save what the capture costs
    assert costs.break_even(10.0, [1.0, 9.0]) == 3
    assert costs.break_even(10.0, [0.0]) is None
    assert costs.break_even(10.0, [-1.0]) is None
    assert costs.break_even(10.0, []) is None


def test_the_cache_wins_from_the_break_even_on() -> None:
    slow_capture = fast(body_flops=1e9, float32_flops=1e9 / 5, disk_read=1e12)
    for epochs in (1, 2, 4):
        found = costs.costs(one(GPT, LLAMA, (KD,), epochs=epochs), slow_capture)
        assert found.break_even == 5 // epochs + 1
        for seeds in range(1, 8):
            many = costs.costs(one(GPT, LLAMA, (KD,), epochs=epochs, seeds=seeds), slow_capture)
            assert (many.capture + many.cached < many.online) == (seeds >= found.break_even)


def test_a_cache_that_reads_slower_than_the_teacher_runs_never_pays() -> None:
    assert costs.costs(one(GPT, LLAMA, (KD,)), fast(body_flops=1e12, disk_read=1.0)).break_even is None


def test_methods_without_a_teacher_save_nothing() -> None:
    found = costs.costs(one(GPT, LLAMA, (SFT,)), fast(body_flops=1e9))
    assert found.online == found.cached and found.break_even is None


# --- workers ---


@pytest.mark.parametrize(
    ("wall", "cached", "processes", "expected"),
    [
        (39.0, False, 1, None),  # a run alone takes 40 s
        (40.0, False, 1, 4),
        (160.0, False, 1, 1),
        (20.0, False, 2, 8),
        (80.0, False, 1, 3),  # 160 / 3 + 40 · 2/3 = 80
        (39.0, True, 1, None),  # a run of 30 s after a quarter of the capture of 40 s
        (40.0, True, 1, 4),
        (160.0, True, 1, 1),
        (20.0, True, 2, 8),
    ],
)
def test_workers(wall: float, cached: bool, processes: int, expected: int | None) -> None:
    found = Costs(capture=40.0, online=160.0, cached=120.0, longest=30.0, longest_online=40.0, break_even=2)
    assert costs.workers_needed(found, 4, wall, processes=processes, cached=cached) == expected


# --- memory and limits ---


def test_memory_of_a_shared_student() -> None:
    case = one(GPT, LLAMA)
    alone = limits.memory(case, DISTILLLENS, half=False, online=False)
    copies = limits.memory(case, DISTILLLENS, half=False, processes=4, online=False)
    shards = limits.memory(case, DISTILLLENS, half=False, strategy="fsdp", processes=4, online=False)
    assert copies == alone and shards.state == alone.state / 4
    assert alone.gathered == 0 and shards.gathered > 0


def test_memory_of_the_teacher() -> None:
    case = one(GPT, LLAMA)
    assert limits.memory(case, DISTILLLENS, half=False, online=True).teacher == 4 * shapes.parameters(GPT)
    assert limits.memory(case, DISTILLLENS, half=False, online=False).teacher == 4 * GPT.width * LLAMA.vocab
    assert limits.memory(case, SFT, half=False, online=True).teacher == 0


def test_exchanged_bytes() -> None:
    held = shapes.parameters(LLAMA)
    assert limits.exchange_bytes(LLAMA, "ddp", 1, 3) == 0
    assert limits.exchange_bytes(LLAMA, "ddp", 2, 3) == 4 * held
    assert limits.exchange_bytes(LLAMA, "fsdp", 2, 3) == 4 * 0.5 * 9 * held


@pytest.mark.parametrize(
    ("scarce", "cached", "first"),
    [
        ({"memory": 1e6}, True, "memory"),
        ({"memory": 1e6}, False, "memory"),
        ({"body_flops": 1e6, "float32_flops": 1e6}, True, "compute"),
        ({"disk": 1e3}, True, "disk"),
        ({"disk_read": 1e3}, True, "disk read"),
        ({"network": 1e3}, True, "network"),
        ({"link": 1e3}, False, "link"),
    ],
    ids=str,
)
def test_the_scarce_resource_is_the_first_limit(scarce: dict[str, float], cached: bool, first: str) -> None:
    plenty = dict(
        body_flops=1e15, float32_flops=1e15, lens_flops=1e15, entries=1e15, memory=1e15, disk=1e15, disk_read=1e15,
        network=1e15, link=1e15, devices=8,
    )  # fmt: skip
    machine = fast(**(plenty | scarce))
    demand = limits.limits(one(GPT, LLAMA), machine, workers=8, wall=60.0, strategy="fsdp", processes=8, cached=cached)
    assert limits.first_limit(demand) == first and demand[first] > 1
    others = {name: value for name, value in demand.items() if name not in (first, "compute")}
    assert all(value < 1 for value in others.values())


def test_no_cache_needs_no_disk() -> None:
    demand = limits.limits(one(GPT, LLAMA), A100, workers=8, wall=60.0, strategy="ddp", processes=1, cached=False)
    assert demand["disk"] == demand["disk read"] == demand["network"] == demand["link"] == 0.0


def test_a_capture_needs_the_whole_teacher_in_memory() -> None:
    case = one(replace(GPT, layers=64), LLAMA)
    demand = limits.limits(
        case, fast(memory=1.0, body_flops=1e9), workers=1, wall=60.0, strategy="ddp", processes=1, cached=True
    )
    assert demand["memory"] == 4 * shapes.parameters(case.teacher)


def test_a_student_takes_as_few_devices_as_hold_it() -> None:
    case = one(GPT, LLAMA)
    alone = limits.memory(case, DISTILLLENS, half=False, online=False).total
    shards = {n: limits.memory(case, DISTILLLENS, half=False, strategy="fsdp", processes=n, online=False).total for n in (4, 8)}
    assert limits.sharing(case, fast(memory=alone, devices=8), cached=True) == ("ddp", 1)
    assert limits.sharing(case, fast(memory=shards[4], devices=8), cached=True) == ("fsdp", 4)
    assert limits.sharing(case, fast(memory=shards[8] / 2, devices=8), cached=True) == ("fsdp", 8)


def test_more_devices_per_run_only_where_runs_beside_each_other_are_not_enough() -> None:
    case, machine = one(GPT, LLAMA, (KD,), seeds=2), fast(body_flops=1e9, float32_flops=1e12, devices=4)
    longest = costs.costs(case, machine).longest_online
    assert limits.recommended(case, machine, 2 * longest, cached=False) == ("ddp", 1, 1)
    assert limits.recommended(case, machine, longest, cached=False) == ("ddp", 1, 2)
    assert limits.recommended(case, machine, longest / 2, cached=False) == ("ddp", 2, 4)
    assert limits.recommended(case, machine, longest / 5, cached=False) == ("ddp", 4, None)


def test_the_choice_is_the_cheaper_one_that_fits() -> None:
    case, rates = one(GPT, LLAMA, (KD,)), dict(body_flops=1e9, float32_flops=1e9 / 5)
    held = {online: limits.memory(case, KD, half=False, online=online).total for online in (True, False)}
    capture_needs, both = 4.0 * shapes.parameters(GPT), max(held.values())
    assert held[False] < held[True] and capture_needs < held[True]

    def chosen(runs: int, epochs: float, **supply: float) -> str:
        return limits.choice(case, fast(**rates, **{"memory": both, **supply}), runs=runs, epochs=epochs)

    assert [chosen(runs, 1) for runs in (1, 5, 6)] == ["online", "online", "cache"]
    assert [chosen(runs, 2) for runs in (2, 3)] == ["online", "cache"]
    assert chosen(1, 1, memory=held[True] - 1) == "cache"
    assert chosen(6, 1, disk=shapes.cache_bytes(case) - 1) == "online"
    assert chosen(6, 1, memory=held[False] - 1) == "neither"
    assert chosen(6, 1, memory=capture_needs - 1) == "neither"


# --- the document ---


def test_the_documents_tables_are_what_the_model_says() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document.filled(text, document.tables()) == text, "write them anew: python -m pipeline.scale docs/scale.md"


def test_tables_are_filled_between_their_markers() -> None:
    text = "a\n<!-- table:x -->\nold\n<!-- end -->\nb\n<!-- table:y -->\n<!-- end -->\n"
    new = "a\n<!-- table:x -->\n| 1 |\n<!-- end -->\nb\n<!-- table:y -->\n| 2 |\n<!-- end -->\n"
    assert document.filled(text, {"x": "| 1 |", "y": "| 2 |"}) == new == document.filled(new, {"x": "| 1 |", "y": "| 2 |"})


@pytest.mark.parametrize("names", [("x",), ("x", "y", "z")])
def test_every_table_has_its_markers(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"the document has markers for \['x', 'y'\], the tables are"):
        document.filled("<!-- table:x -->\n<!-- end -->\n<!-- table:y -->\n<!-- end -->", dict.fromkeys(names, ""))


def test_the_module_prints_and_writes_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document.main([])
    printed = capsys.readouterr().out
    file = tmp_path / "doc.md"
    file.write_text("".join(f"<!-- table:{name} -->\n<!-- end -->\n" for name in document.tables()), encoding="utf-8")
    document.main([str(file)])
    assert file.read_text(encoding="utf-8").replace("\n", "") == printed.replace("\n", "")
    assert H100.name in printed
