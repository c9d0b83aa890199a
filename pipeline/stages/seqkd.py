"""Stage: the teacher's own responses to the training prompts, for sequence-level KD."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import Artifact, text_digest
from pipeline.config.methods import SeqGeneration
from pipeline.data.examples import EncodedExample, EncodedPrompt
from pipeline.data.tokenize import read_encoded, write_encoded
from pipeline.errors import DataError
from pipeline.evaluation.generate import (
    Decoder,
    DecodingProtocol,
    check_lengths,
    context_length,
    decode,
    plan_batches,
)
from pipeline.models import load
from pipeline.progress import Advance, progress
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, build, place
from pipeline.stages.prepare import TRAIN, TrainingDataPlan
from pipeline.training.device import choose_device

VERSION = 1
_PARTS = "parts"


@dataclass(frozen=True)
class SeqKdPlan:
    """The teacher's responses to the training prompts.

    Attributes:
        place: its artifact; TRAIN in it has the format of the prepared rows.
        generation: how the teacher is decoded.
        teacher, data: the inputs.
    """

    place: Place
    generation: SeqGeneration
    teacher: ModelPlan
    data: TrainingDataPlan


def plan_generation(generation: SeqGeneration, teacher: ModelPlan, data: TrainingDataPlan, root: Path) -> SeqKdPlan:
    """Plan the responses; the number of prompts decoded together is no part of their identity."""
    recipe = {**generation.model_dump(mode="json", exclude={"batch_size"}), "max_tokens": data.config.max_tokens}
    upstream = {"teacher": teacher.digest, "prepare": data.place.fingerprint}
    return SeqKdPlan(
        place(root, "seqkd", VERSION, "generate with the teacher", recipe, upstream), generation, teacher, data
    )  # fmt: skip


def run(plan: SeqKdPlan) -> Artifact:
    """Decode the teacher on every training prompt and commit rows with its responses; goes on after the last finished batch.

    Blank responses leave nothing to learn, so their rows are dropped and counted.

    Raises:
        ConfigError: a prompt leaves no room for a response.
        DataError: every response is blank.
    """

    def work(folder: Path) -> Mapping[str, Any]:
        rows = read_encoded(plan.data.place.open().path / TRAIN)
        tokenizer = load.load_tokenizer(plan.data.tokenizer.folder())
        prompts = [EncodedPrompt(row.id, "", row.input_ids[: row.prompt_tokens], ()) for row in rows]
        with progress(plan.place.label, len(prompts), "rows") as advance:
            found = _generate(plan, tokenizer, prompts, folder / _PARTS, advance)
        written = [found[example_id] for example_id in rows.ids]
        kept = [row for row in written if decode(tokenizer, _response(row))]
        if not kept:
            raise DataError(f"{plan.place.label}: all {len(rows)} responses of the teacher are blank; use another teacher")
        write_encoded(folder / TRAIN, kept)
        shutil.rmtree(folder / _PARTS)
        return {
            "rows": len(rows),
            "kept": len(kept),
            "empty": len(rows) - len(kept),
            "cut_response": sum(_response(row)[-1] != tokenizer.eos_token_id for row in kept),
            "tokens": sum(len(row.input_ids) for row in kept),
            "response_tokens": sum(len(_response(row)) for row in kept),
        }

    return build(plan.place, work)


def _generate(
    plan: SeqKdPlan, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[EncodedPrompt], parts: Path, advance: Advance
) -> dict[str, EncodedExample]:
    """Id → prompt and response; every batch is on disk before the next one begins."""
    parts.mkdir(exist_ok=True)
    protocol = DecodingProtocol(**plan.generation.decoding.model_dump())
    seeds, size, limit = [plan.generation.seed], plan.generation.batch_size, plan.data.config.max_tokens
    batches = plan_batches(prompts, protocol, seeds, size)
    files = [parts / f"{text_digest(repr([prompt.id for prompt in batch]))[:32]}.arrow" for batch in batches]
    if not all(file.exists() for file in files):
        model = load.load_model(plan.teacher.folder(), device=choose_device())
        check_lengths(context_length(model.config), prompts, protocol, limit)
        decoder = Decoder(model, tokenizer, protocol, seeds, size, limit)
    found: dict[str, EncodedExample] = {}
    for batch, file in zip(batches, files, strict=True):
        if not file.exists():
            _write_part(file, decoder, batch)
        found |= {row.id: row for row in read_encoded(file)}
        advance(len(batch))
    return found


def _write_part(file: Path, decoder: Decoder, batch: Sequence[EncodedPrompt]) -> None:
    responses = {generation.id: generation.token_ids for generation in decoder.decode(batch)}
    rows = [EncodedExample(p.id, (*p.input_ids, *responses[p.id]), len(p.input_ids)) for p in batch]
    temporary = file.with_suffix(".tmp")
    write_encoded(temporary, rows)
    os.replace(temporary, file)


def _response(row: EncodedExample) -> tuple[int, ...]:
    return row.input_ids[row.prompt_tokens :]
