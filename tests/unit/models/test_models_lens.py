"""Logit lens and student initialisation on the architectures of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample
from pipeline.errors import ConfigError, ModelError
from pipeline.models import load
from pipeline.models.lens import check_vocabulary_sizes, load_lens, logit_lens
from pipeline.models.student import angular_distances, from_scratch, prune

MODELS = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}
IDS = torch.tensor([[5, 9, 17, 30]])


def states(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.base_model(IDS, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_of_the_last_state_is_the_models_logits(name: str) -> None:
    model = MODELS[name]()
    lens = logit_lens(model)
    last = states(model)[-1]
    assert torch.allclose(lens.logits(last, 4), model(IDS).logits, atol=1e-5)
    assert torch.equal(lens.logits(last, 4, final_norm=True), lens.logits(last, 4))  # never normed twice


@pytest.mark.parametrize("name", MODELS)
def test_intermediate_states_are_raw_unless_the_norm_is_asked_for(name: str) -> None:
    model = MODELS[name]()
    lens = logit_lens(model)
    middle = states(model)[2]
    assert torch.allclose(lens.logits(middle, 2), middle @ lens.head.weight.T, atol=1e-5)
    assert torch.allclose(lens.logits(middle, 2, final_norm=True), lens.norm(middle) @ lens.head.weight.T, atol=1e-5)
    # One more layer less than the model would norm exactly this state.
    pruned, _ = prune(model, 2, 2)
    assert torch.allclose(lens.logits(middle, 2, final_norm=True), pruned(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_is_read_from_disk_without_the_body(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    lens = load_lens(tiny.save(model, tmp_path / "m"), torch.device("cpu"))
    expected = logit_lens(model)
    for layer, state in enumerate(states(model)):
        assert torch.equal(lens.logits(state, layer, final_norm=True), expected.logits(state, layer, final_norm=True))
    assert lens.num_layers == 4 and not lens.head.weight.requires_grad


def test_an_unknown_logit_scaling_is_refused() -> None:
    model = tiny.llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ModelError, match="logit lens would be wrong"):
        logit_lens(model)


def test_vocabularies_share_a_prefix_that_covers_the_tokenizer() -> None:
    assert check_vocabulary_sizes(304, 320, 300) == 304
    with pytest.raises(ModelError, match="the heads have 304 and 320 entries, the tokenizer has 310"):
        check_vocabulary_sizes(304, 320, 310)


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_student_keeps_the_other_layers(name: str) -> None:
    model = MODELS[name](layers=6)
    student, provenance = prune(model, 2, 3)
    assert provenance == [0, 1, 2, 6]
    full, cut = states(model), states(student)
    for layer in range(3):
        assert torch.equal(full[layer], cut[layer])
    assert not torch.equal(full[-1], cut[-1])
    same, everything = prune(model, 0, 0)
    assert torch.equal(same(IDS).logits, model(IDS).logits) and everything == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("start", "size"), [(0, 4), (3, 2), (-1, 1)])
def test_pruning_what_is_not_there(start: int, size: int) -> None:
    with pytest.raises(ConfigError, match="student"):
        prune(tiny.llama(), start, size)


def test_the_angular_distance_finds_the_block_that_does_nothing() -> None:
    # Beside 0 the angle is the root of float32's rounding, which differs from processor to processor.
    model = tiny.llama(layers=5).double()
    for block in model.model.layers[1:3]:  # layers 2 and 3 become the identity
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    batch = collate([EncodedExample("a", (5, 9, 17, 30, 2), 2), EncodedExample("b", (7, 9, 1), 1)], 0)
    distances = angular_distances(model, [batch], 2)
    assert len(distances) == 4 and int(distances.argmin()) == 1
    assert distances[1] < 1e-3 and all(0 <= value <= 1 for value in distances)
    one = angular_distances(
        model, [collate([row], 0) for row in (EncodedExample("a", (5, 9, 17, 30, 2), 2), EncodedExample("b", (7, 9, 1), 1))], 2
    )
    assert torch.allclose(one, distances, atol=1e-6)  # padding and batching change nothing


@pytest.mark.parametrize("name", MODELS)
def test_from_scratch_changes_sizes_and_is_seeded(name: str) -> None:
    teacher = MODELS[name]().config
    changes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    changes |= {} if name == "gpt2" else {"num_key_value_heads": 1}
    student = from_scratch(teacher, changes, seed=3)
    hidden = states(student)
    assert len(hidden) == 3 and hidden[0].shape[-1] == 16
    assert torch.equal(student(IDS).logits, from_scratch(teacher, changes, seed=3)(IDS).logits)
    assert not torch.equal(student(IDS).logits, from_scratch(teacher, changes, seed=4)(IDS).logits)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "m")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled weights are refused"):
        load.locate_local(folder, "teacher")
    with pytest.raises(ModelError):
        load.load_model(folder)


def test_a_local_models_digest_is_its_content_not_its_place(tmp_path: Path) -> None:
    first = load.locate_local(tiny.save(tiny.llama(), tmp_path / "a"), "teacher")
    second = load.locate_local(tiny.save(tiny.llama(), tmp_path / "b"), "teacher")
    other = load.locate_local(tiny.save(tiny.llama(seed=1), tmp_path / "c"), "teacher")
    assert first.digest == second.digest != other.digest


def test_packages_are_located_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "good.gguf").write_bytes(b"GGUF\x03\x00\x00\x00rest")
    (package / "bad.gguf").write_bytes(b"PK\x03\x04rest....")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load.locate_package("carrier", "good.gguf", "teacher").folder == package
    with pytest.raises(ModelError, match="no GGUF version"):
        load.locate_package("carrier", "bad.gguf", "teacher")
    with pytest.raises(ModelError, match="which has bad.gguf, good.gguf"):
        load.locate_package("carrier", "other.gguf", "teacher")
    with pytest.raises(ModelError, match="not an installed package"):
        load.locate_package("no_such_package", "x.gguf", "teacher")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="teacher.path: .* is not a folder"):
        load.locate_local(tmp_path / "absent", "teacher")
    with pytest.raises(ModelError, match="no config.json"):
        load.locate_local(tmp_path, "teacher")
