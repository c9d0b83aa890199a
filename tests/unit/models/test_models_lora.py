"""Adapters on the architectures of the paper: what is trained, what stays frozen, files, merging, exact resume."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.data.tokenize import read_encoded, write_encoded
from pipeline.errors import ConfigError, ModelError
from pipeline.losses.objective import LensTerm, Objective
from pipeline.models import load
from pipeline.models.lens import blocks, final_norm, logit_lens
from pipeline.models.lora import add_lora, is_adapter, load_adapter, merge, save_adapter, trainable
from pipeline.models.student import prune
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.loop import train
from pipeline.training.step import Student, Teacher, micro_batch_loss

MODELS = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}
LINEAR_LAYERS = {"llama": 7, "qwen2": 7, "gpt2": 4}
IDS = torch.tensor([[5, 9, 17, 30, 2]])
DISTILLLENS = Objective(1.0, "reverse_kl", lens=LensTerm(1.0, "jensen_shannon", ((1, 2), (2, 4)), False, "aligned"))
SETTINGS = tiny.settings(
    max_steps=5, micro_batch_size=2, learning_rate=2e-2, warmup_steps=0, weight_decay=0.1, validate_every=None
)


def adapted(name: str, targets: Any = "all-linear", seed: int = 1, dropout: float = 0.0, noise: float = 0.0) -> PreTrainedModel:
    """A model with an adapter; `noise` above 0 moves it away from the neutral start."""
    model = MODELS[name]()
    add_lora(model, rank=4, alpha=8.0, dropout=dropout, targets=targets, seed=seed)
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable(model).values():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def adapter(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("error::UserWarning")  # peft warns where Conv1D's transposed weights are not announced
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_of_the_blocks_get_an_adapter_and_nothing_else_is_trained(name: str) -> None:
    model = adapted(name)
    names = set(trainable(model))
    assert len(names) == 2 * 4 * LINEAR_LAYERS[name]  # A and B, four blocks
    assert all(".lora_A." in key or ".lora_B." in key for key in names)
    assert torch.equal(logits(model), logits(MODELS[name]()))  # B is zero


@pytest.mark.parametrize("name", MODELS)
def test_the_model_keeps_its_blocks_norm_and_lens(name: str) -> None:
    model, plain = adapted(name, noise=0.1), MODELS[name]()
    assert type(model) is type(plain) and len(blocks(model)) == 4
    lens = logit_lens(model)
    assert lens.head.weight is model.get_output_embeddings().weight and lens.norm is final_norm(model)
    assert torch.equal(lens.head.weight, plain.get_output_embeddings().weight)
    frozen = [lens.head.weight, model.get_input_embeddings().weight, *final_norm(model).parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    if model.config.tie_word_embeddings:
        assert lens.head.weight is model.get_input_embeddings().weight
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "targets", "layers"),
    [
        ("llama", ["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("gpt2", ["c_attn"], {"c_attn"}),
        ("gpt2", ["mlp.c_proj"], {"mlp.c_proj"}),
        ("gpt2", ["c_proj"], {"attn.c_proj", "mlp.c_proj"}),
    ],
)
def test_named_targets_only(name: str, targets: list[str], layers: set[str]) -> None:
    found = {key.partition(".lora_")[0] for key in trainable(adapted(name, targets))}
    assert len(found) == 4 * len(layers) and all(any(key.endswith(f".{layer}") for layer in layers) for key in found)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_layer_outside_the_blocks_is_left_alone_whatever_its_name(targets: Any) -> None:
    model = tiny.llama()
    model.model.q_proj = torch.nn.Linear(4, 4)
    add_lora(model, rank=2, alpha=4.0, dropout=0.0, targets=targets, seed=0)
    assert type(model.model.q_proj) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "norm", "self_attn", "proj", ""])
def test_an_unknown_target_is_refused(target: str) -> None:
    model = tiny.llama()
    with pytest.raises(ConfigError) as caught:
        add_lora(model, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj", target], seed=0)
    (problem,) = caught.value.problems
    assert problem.startswith(f"train.lora.target_modules: {target!r} is no linear layer")
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in problem and "'all-linear'" in problem
    assert len(trainable(model)) == len(list(model.parameters()))  # untouched


def test_every_unknown_target_is_named_and_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(tiny.gpt2(), rank=2, alpha=4.0, dropout=0.0, targets=["wte", "q_proj"], seed=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="list is empty"):
        add_lora(tiny.gpt2(), rank=2, alpha=4.0, dropout=0.0, targets=[], seed=0)


def test_the_seed_alone_decides_the_start() -> None:
    first = adapter(adapted("llama", seed=1))
    torch.rand(7)
    before = torch.get_rng_state()
    model = tiny.llama()
    torch.set_rng_state(before)
    add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, adapter(model)) and not equal(first, adapter(adapted("llama", seed=2)))


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_the_adapters_too(training: bool) -> None:
    model = tiny.llama().train(training)
    add_lora(model, rank=4, alpha=8.0, dropout=0.25, targets="all-linear", seed=1)
    assert {module.training for module in model.modules()} == {training}


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted("gpt2")
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="an adapter already"):
        add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=1)
    with pytest.raises(ValueError, match="an adapter already"):
        load_adapter(model, tmp_path)


def test_without_an_adapter_there_is_nothing_to_save_or_merge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(tiny.gpt2(), tmp_path)
    with pytest.raises(ValueError, match="no adapter"):
        merge(tiny.gpt2())


@pytest.mark.parametrize("name", MODELS)
def test_the_definition(name: str) -> None:
    """W + alpha / rank · B A, written out on the plain model's weights."""
    model, plain = adapted(name, noise=0.1), MODELS[name]()
    weights = trainable(model)
    for key in {key.partition(".lora_")[0] for key in weights}:
        change = 8.0 / 4 * weights[f"{key}.lora_B.default.weight"] @ weights[f"{key}.lora_A.default.weight"]
        layer = plain.get_submodule(key)
        layer.weight.data += change.detach().T if name == "gpt2" else change.detach()
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_plain_peft_reads_the_adapter(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(name, noise=0.1)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    wrapped = PeftModel.from_pretrained(MODELS[name](), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(wrapped), logits(model)) and not torch.equal(logits(model), logits(MODELS[name]()))


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_read_back(name: str, tmp_path: Path) -> None:
    model = adapted(name, noise=0.1, dropout=0.25)
    save_adapter(model, tmp_path)
    state = torch.get_rng_state()
    other = MODELS[name]()
    torch.set_rng_state(state)
    load_adapter(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(adapter(model), adapter(other))  # the same values, and trainable
    assert torch.equal(logits(other), logits(model))
    other.train()
    assert not torch.equal(logits(other), logits(other))  # its dropout came along


def test_a_peft_made_adapter_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(tmp_path))
    model = tiny.llama()
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(wrapped.eval()))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = adapted("llama", noise=0.1)
    for folder in ("a", "b"):
        save_adapter(model, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # not in the order of a set, which changes from process to process


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_is_a_plain_checkpoint_with_equal_outputs(name: str, tmp_path: Path) -> None:
    model = adapted(name, noise=0.1)
    expected = logits(model)
    merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert model.state_dict().keys() == MODELS[name]().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    tiny.save(model, tmp_path / "merged")
    assert not is_adapter(tmp_path / "merged")
    read = load.load_model(tmp_path / "merged", device=torch.device("cpu"))
    assert torch.equal(logits(read), logits(model))
    pruned, _ = prune(model, 2, 2)
    assert len(blocks(pruned)) == 2
    add_lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=1)  # a new adapter may follow


def test_saving_an_unmerged_model_the_transformers_way_writes_the_adapter(tmp_path: Path) -> None:
    model = adapted("llama", noise=0.1)
    model.save_pretrained(tmp_path)
    assert is_adapter(tmp_path) and not (tmp_path / "model.safetensors").exists()
    other = tiny.llama()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_a_broken_adapter_is_not_merged() -> None:
    model = adapted("llama")
    next(iter(trainable(model).values())).data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.0\..* cannot be merged"):
        merge(model)


def test_adapter_folders_are_told_apart(tmp_path: Path) -> None:
    save_adapter(adapted("gpt2"), tmp_path / "adapter")
    tiny.save(tiny.gpt2(), tmp_path / "whole")
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tmp_path / "whole") and not is_adapter(tmp_path / "none")


def damaged(folder: Path, what: str) -> Path:
    save_adapter(adapted("llama"), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    if what == "no config":
        (folder / "adapter_config.json").unlink()
    elif what == "torn config":
        (folder / "adapter_config.json").write_text("{")
    elif what == "other kind":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    elif what == "unknown kind":
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "XYZ"}))
    elif what == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif what == "torn weights":
        (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    elif what == "a tensor less":
        save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    elif what == "a tensor more":
        extra = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
        save_file(weights | extra, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "has no adapter_config.json"),
        ("torn config", "not an adapter's configuration"),
        ("unknown kind", "not an adapter's configuration"),
        ("other kind", "only LORA"),
        ("no weights", "cannot be read"),
        ("torn weights", "cannot be read"),
        ("a tensor less", "1 tensors are missing or unknown"),
        ("a tensor more", "1 tensors are missing or unknown"),
    ],
)
def test_a_damaged_adapter_is_refused(what: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(tiny.llama(), damaged(tmp_path, what))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("model", [tiny.gpt2(), tiny.llama(width=64), tiny.llama(layers=2)], ids=["kind", "width", "layers"])
def test_an_adapter_of_another_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path)
    with pytest.raises(ModelError, match="does not fit the model"):
        load_adapter(model, tmp_path)


def test_without_peft_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_adapter(adapted("gpt2"), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for attempt in (
        lambda: add_lora(tiny.gpt2(), rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=0),
        lambda: load_adapter(tiny.gpt2(), tmp_path),
    ):
        with pytest.raises(ModelError, match=r'pip install "peft>='):
            attempt()


def test_peft_is_loaded_only_when_an_adapter_is_used() -> None:
    code = "import sys, pipeline.models.lora; print('peft' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def teacher() -> Teacher:
    model = tiny.gpt2(layers=6, seed=8)
    return Teacher(OnlineTeacher(model), logit_lens(model))


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_loss_reaches_the_adapter_and_leaves_the_head_alone(name: str) -> None:
    model = adapted(name, noise=0.05)
    rows = [EncodedExample("a", (5, 9, 17, 30, 2, 8), 2), EncodedExample("b", (6, 1, 44, 7), 1)]
    student = Student(model, logit_lens(model))
    micro_batch_loss(student, teacher(), DISTILLLENS, collate(rows, 0), denominator=7, autocast=None).total.backward()
    weights = trainable(model)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in weights.values())
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if key not in weights)


def run(folder: Path, stop_at: int | None = None) -> PreTrainedModel:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 300, (8 + index,), generator=generator).tolist() for index in range(9)]
    write_encoded(folder / "rows.arrow", [EncodedExample(f"e{i}", tuple(row), 3) for i, row in enumerate(ids)])
    model = tiny.gpt2(layers=3, dropout=0.1, seed=7)
    add_lora(model, rank=2, alpha=4.0, dropout=0.2, targets="all-linear", seed=3)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    train(
        Student(model, logit_lens(model)),
        teacher(),
        DISTILLLENS,
        read_encoded(folder / "rows.arrow"),
        SETTINGS,
        pad_token_id=0,
        folder=folder,
        validate=lambda: {"dev/loss": 1.0},
        save_model=lambda target: save_adapter(model, target),
        watch=lambda done, total: on_step,
    )
    return model


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_training_changes_the_adapter_alone_and_resumes_exactly(stop_at: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at)
    torch.manual_seed(99)  # a new process has other random states
    resumed = run(tmp_path / "cut")
    assert equal(adapter(whole), adapter(resumed))
    start = tiny.gpt2(layers=3, seed=7)
    plain = {name.replace(".base_layer.", "."): value for name, value in whole.named_parameters() if ".lora_" not in name}
    assert equal(plain, dict(start.named_parameters()))
    add_lora(start, rank=2, alpha=4.0, dropout=0.2, targets="all-linear", seed=3)
    assert not any(torch.equal(value, adapter(whole)[name]) for name, value in adapter(start).items())


def test_the_kept_adapter_is_the_trained_one(tmp_path: Path) -> None:
    trained = run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    fresh = tiny.gpt2(layers=3, dropout=0.1, seed=7)
    load_adapter(fresh, tmp_path / "run" / "model")
    assert equal(adapter(trained), adapter(fresh))
