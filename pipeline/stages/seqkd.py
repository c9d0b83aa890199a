"""Stage: the teacher's own responses to the training prompts, for sequence-level KD."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import UNSEALED, Artifact, file_digest, is_sealed, seal, text_digest, write_text_atomically
from pipeline.config.methods import SeqGeneration
from pipeline.data.examples import EncodedExample, EncodedPrompt
from pipeline.data.tokenize import read_encoded, write_encoded
from pipeline.errors import ArtifactError, DataError
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
_PARTS, SUMMARY = "parts", "summary.json"


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
        if (finished := _finished(folder)) is not None:  # killed after the last batch, before the commit
            shutil.rmtree(folder / _PARTS, ignore_errors=True)
            return finished
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
        counts = {
            "rows": len(rows),
            "kept": len(kept),
            "empty": len(rows) - len(kept),
            "cut_response": sum(_response(row)[-1] != tokenizer.eos_token_id for row in kept),
            "tokens": sum(len(row.input_ids) for row in kept),
            "response_tokens": sum(len(_response(row)) for row in kept),
        }
        # Before the batches go, so that there is always something to go on from.
        summary = {"counts": counts, "sha256": file_digest(folder / TRAIN), "sealed_by": UNSEALED}
        write_text_atomically(folder / SUMMARY, seal(json.dumps(summary).encode()).decode())
        shutil.rmtree(folder / _PARTS)
        return counts

    return build(plan.place, work)


def _finished(folder: Path) -> dict[str, Any] | None:
    """The counts of rows that are all in TRAIN, None if they are not, or not as they were written."""
    file = folder / SUMMARY
    if not file.exists() or not is_sealed(content := file.read_bytes()):
        return None
    summary = json.loads(content)
    if not (folder / TRAIN).exists() or file_digest(folder / TRAIN) != summary["sha256"]:
        return None
    counts: dict[str, Any] = summary["counts"]
    return counts


def _generate(
    plan: SeqKdPlan, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[EncodedPrompt], parts: Path, advance: Advance
) -> dict[str, EncodedExample]:
    """Id → prompt and response; every batch is on disk before the next one begins."""
    parts.mkdir(exist_ok=True)
    protocol = DecodingProtocol(**plan.generation.decoding.model_dump())
    seeds, size, limit = [plan.generation.seed], plan.generation.batch_size, plan.data.config.max_tokens
    batches = plan_batches(prompts, protocol, seeds, size)
    files = [parts / f"{text_digest(repr([prompt.id for prompt in batch]))[:32]}.json" for batch in batches]
    if not all(file.exists() for file in files):
        model = load.load_model(plan.teacher.folder(), device=choose_device())
        check_lengths(context_length(model.config), prompts, protocol, limit)
        decoder = Decoder(model, tokenizer, protocol, seeds, size, limit)
    found: dict[str, EncodedExample] = {}
    for batch, file in zip(batches, files, strict=True):
        if not file.exists():
            _write_part(file, decoder, batch)
        found |= {row.id: row for row in _read_part(file)}
        advance(len(batch))
    return found


def _write_part(file: Path, decoder: Decoder, batch: Sequence[EncodedPrompt]) -> None:
    responses = {generation.id: generation.token_ids for generation in decoder.decode(batch)}
    rows = [[p.id, [*p.input_ids, *responses[p.id]], len(p.input_ids)] for p in batch]
    write_text_atomically(file, seal(json.dumps({"rows": rows, "sealed_by": UNSEALED}).encode()).decode())


def _read_part(file: Path) -> list[EncodedExample]:
    content = file.read_bytes()
    if not is_sealed(content):
        raise ArtifactError(f"{file}: its checksum differs; remove it and run again: only its responses are generated anew")
    return [EncodedExample(name, tuple(ids), prompt) for name, ids, prompt in json.loads(content)["rows"]]


def _response(row: EncodedExample) -> tuple[int, ...]:
    return row.input_ids[row.prompt_tokens :]
