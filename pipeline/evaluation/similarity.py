"""Similarity of meaning: cosine of sentence embeddings of predictions and references (SBERT)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.evaluation.rouge import check_paired

_INSTALL = 'pip install "sentence-transformers>=6.2"'
_LAYOUT = "modules.json"


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder.

    Attributes:
        model: the `sentence_transformers.SentenceTransformer`. It cuts texts at its `max_seq_length` (256 word pieces in
            all-MiniLM-L6-v2); what lies behind takes no part in the similarity.
    """

    model: Any

    def embed(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """Embeddings of length 1, [texts, d] float64 on the CPU; at least one text."""
        embeddings: Tensor = self.model.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.nn.functional.normalize(embeddings.cpu().double(), dim=-1)


def load_encoder(folder: Path, device: torch.device) -> Encoder:
    """A sentence encoder in float32 from a sentence-transformers folder; nothing is downloaded.

    Raises:
        ModelError: the sentence-transformers library is missing, or the folder holds no sentence encoder.
    """
    # Without this file the library would guess an architecture, and its similarities would be another metric.
    if not (folder / _LAYOUT).is_file():
        raise ModelError(f"{folder} has no {_LAYOUT}; give a sentence-transformers folder")
    library = _sentence_transformers()
    try:
        model = library.SentenceTransformer(
            str(folder),
            device=str(device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder}: cannot be loaded as a sentence encoder ({reason}); give another") from None
    return Encoder(model.eval())


def similarity_rows(
    encoder: Encoder, predictions: Sequence[str], references: Sequence[Sequence[str]], batch_size: int
) -> list[float]:
    """100 · cosine similarity of every prediction and the closest of its references.

    Sentence-BERT, Reimers & Gurevych 2019, Sec. 3. Each distinct text is encoded once.

    Args:
        encoder: embeds the texts.
        predictions: one text per row.
        references: acceptable texts of each row, at least one per row.
        batch_size: texts encoded together; it changes nothing but rounding.

    Returns:
        One value per row, at most 100 (the same meaning); about 0 for unrelated texts, which can come out slightly negative.

    Raises:
        ValueError: the lengths differ, a row has no references, a text stands where a list belongs, or `batch_size` is
            below 1.
    """
    _check(predictions, references, batch_size)
    index: dict[str, int] = {}
    for text in (*predictions, *(text for texts in references for text in texts)):
        index.setdefault(text, len(index))
    if not index:
        return []
    embeddings = encoder.embed(list(index), batch_size)
    return [
        100 * _closest(embeddings[index[prediction]], embeddings[[index[text] for text in texts]])
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def _closest(prediction: Tensor, references: Tensor) -> float:
    """Largest cosine of vectors of length 1, [d] and [R, d]."""
    # Rounding can lift the cosine of equal vectors above 1.
    return min(1.0, float((references @ prediction).max()))


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]], batch_size: int) -> None:
    check_paired(predictions, references)
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references[{row}] is {texts!r}; give a list with at least one reference")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def _sentence_transformers() -> Any:
    # Not at the top: it takes seconds, and only this metric needs it.
    try:
        return importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ModelError(
            f"SBERT similarity needs the sentence-transformers library, which cannot be imported ({error}); "
            f"install it: {_INSTALL}"
        ) from None
