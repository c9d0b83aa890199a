"""Records on disk: records.json, prompts.parquet and generations.parquet of a comparison, checked when they are read.

They may come from anyone, so nothing about them is taken for granted: sizes are limited, checksums compared, types and what
refers to what checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import MANIFEST, Manifest, canonical_json, file_digest, peek, write_text_atomically
from pipeline.config.methods import Decoding
from pipeline.errors import ArtifactError
from pipeline.reporting.record import DATA, Facts, Generations, Prompt, Records

FACTS, PROMPTS, GENERATIONS = "records.json", "prompts.parquet", "generations.parquet"
FILES = (FACTS, PROMPTS, GENERATIONS)
STAGES = ("compare", "merge")
"""What makes comparisons."""
MAX_FILE_BYTES = {FACTS: 2**26, PROMPTS: 2**31, GENERATIONS: 2**31}
MAX_ROWS, MAX_TABLE_BYTES = 2**25, 2**32
_AGAIN = "run `distilllens reproduce` again where it was made"
_ADAPTER = TypeAdapter(Facts)
SCORED = pa.schema(
    [
        ("id", pa.string()),
        ("seed", pa.int64()),
        ("rouge_l", pa.float64()),
        ("exact_match", pa.float64()),
        ("prediction", pa.string()),
    ]
)
_GENERATION = pa.schema([("evaluation", pa.string()), *SCORED])
_PROMPT = pa.schema(
    [("prompts", pa.string()), ("id", pa.string()), ("prompt", pa.string()), ("references", pa.list_(pa.string()))]
)


def write_records(folder: Path, records: Records) -> None:
    """Write the three files."""
    write_text_atomically(folder / FACTS, json.dumps(asdict(records.facts), ensure_ascii=False, allow_nan=False))
    with parquet.ParquetWriter(folder / PROMPTS, _PROMPT, compression="zstd") as writer:
        for name, prompts in records.generations.prompts.items():
            rows = ((name, key, own.text, own.references) for key, own in prompts.items())
            writer.write_table(pa.Table.from_pydict(dict(zip(_PROMPT.names, zip(*rows, strict=True), strict=True)), _PROMPT))
    with parquet.ParquetWriter(folder / GENERATIONS, _GENERATION, compression="zstd") as writer:
        for name, table in records.generations.tables.items():
            evaluation = pa.array([name] * len(table), pa.string())
            writer.write_table(table.select(SCORED.names).add_column(0, "evaluation", evaluation).cast(_GENERATION))


def read_records(folder: Path, what: str | None = None) -> Records:
    """Everything that a report is made from.

    Args:
        folder: of a comparison, or of the three files and the manifest of one.
        what: what it is called in messages; None takes the folder.

    Raises:
        ArtifactError: there is no comparison, one without records, or one that is damaged.
    """
    what = what or str(folder)
    facts = read_facts(folder, what)
    for name in (PROMPTS, GENERATIONS):
        _check_file(folder, name, what)
    prompts: dict[str, dict[str, Prompt]] = {}
    for row in _read_table(folder / PROMPTS, _PROMPT, what).to_pylist():
        prompts.setdefault(row["prompts"], {})[row["id"]] = Prompt(row["prompt"], row["references"])
    table = _read_table(folder / GENERATIONS, _GENERATION, what)
    names = pc.unique(table["evaluation"]).to_pylist()
    tables = {name: table.filter(pc.equal(table["evaluation"], name)).select(SCORED.names) for name in names}
    records = Records(facts, Generations(tables, prompts))
    _refuse(_missing(records), what)
    return records


def read_facts(folder: Path, what: str | None = None) -> Facts:
    """What is recorded without single generations; see `read_records`."""
    what = what or str(folder)
    _check_file(folder, FACTS, what)
    try:
        facts = _ADAPTER.validate_json((folder / FACTS).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(what, f"{FACTS}: {where}: {first['msg']}") from None
    _refuse(_inconsistent(facts), what)
    return facts


def read_manifest(folder: Path, what: str) -> Manifest:
    """The manifest of a comparison with records.

    Raises:
        ArtifactError: it is none.
    """
    manifest = peek(folder)
    if manifest is None:
        raise ArtifactError(f"{what}: no finished comparison, its {MANIFEST} is missing or damaged; {_AGAIN}")
    if manifest.stage not in STAGES:
        raise ArtifactError(f"{what}: holds a {manifest.stage} artifact, not a comparison; give RUN_DIR/NAME/comparison")
    if not set(FILES) <= manifest.files.keys():
        raise ArtifactError(f"{what}: a comparison by an older version, which kept no records; {_AGAIN}")
    return manifest


def _check_file(folder: Path, name: str, what: str) -> None:
    facts, file = read_manifest(folder, what).files[name], folder / name
    if not file.is_file():
        raise _damaged(what, f"{name} is missing")
    if file.stat().st_size > MAX_FILE_BYTES[name]:
        raise _damaged(what, f"{name} has more than {MAX_FILE_BYTES[name]} bytes")
    if file_digest(file) != facts["sha256"]:
        raise _damaged(what, f"the checksum of {name} differs")


def _read_table(file: Path, schema: pa.Schema, what: str) -> pa.Table:
    try:
        with parquet.ParquetFile(file) as opened:
            about = opened.metadata
            size = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
            if about.num_rows > MAX_ROWS or size > MAX_TABLE_BYTES:
                raise _damaged(what, f"{file.name} has more than {MAX_ROWS} rows or {MAX_TABLE_BYTES} bytes")
            if not opened.schema_arrow.equals(schema):
                raise _damaged(what, f"{file.name} has other columns than {', '.join(schema.names)}")
            table = opened.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(what, f"{file.name}: {str(error).splitlines()[0]}") from None
    for name in schema.names:
        if name != "prediction" and table[name].null_count:
            raise _damaged(what, f"{file.name} has rows without {name}")
        if pa.types.is_floating(schema.field(name).type) and not _are_scores(table[name]):
            raise _damaged(what, f"{file.name}: {name} is not 0 to 100")
    return table


def _are_scores(values: pa.ChunkedArray) -> bool:
    inside = pc.and_(pc.greater_equal(values, 0.0), pc.less_equal(values, 100.0 + 1e-6))
    return bool(pc.all(inside, min_count=0).as_py())


def _inconsistent(facts: Facts) -> Iterator[str]:
    """What refers to nothing, or is there twice."""
    if not facts.experiments or not facts.trials:
        yield "no experiments or no trials"
    names = [trial.name for trial in facts.trials]
    known, data = {own.fingerprint for own in facts.experiments}, {own.fingerprint for own in facts.data}
    if len(set(names)) < len(names) or len(known) < len(facts.experiments):
        yield "two trials or experiments of one name"
    if facts.baseline is not None and facts.baseline not in facts.rows:
        yield f"no row {facts.baseline!r}"
    for trial in facts.trials:
        if not trial.origins or not known.issuperset(trial.origins):
            yield f"{trial.name!r} is of no experiment"
        if not trial.evaluations or len(trial.by_benchmark) < len(trial.evaluations):
            yield f"{trial.name!r} has no evaluation, or two of one benchmark"
        if (trial.training is None) != (trial.seed is None):
            yield f"{trial.name!r} is said to be trained and not trained"
        if trial.training is not None and not _is_json(trial.training.settings):
            yield f"the settings of {trial.name!r} are no JSON"
        if trial.training is not None and not [own for own in trial.training.inputs if own.what == DATA]:
            yield f"{trial.name!r} has no training data"
        elif trial.training is not None and trial.training.data not in data:
            yield f"nothing is known of the training data of {trial.name!r}"
        for own in trial.evaluations:
            if own.measured is None or not all(own.measured.per_seed.values()) or "rouge_l" not in own.measured.per_seed:
                yield f"{trial.name!r} on {own.benchmark!r} has no scores"
            if not _is_protocol(own.protocol):
                yield f"{trial.name!r} on {own.benchmark!r} has no protocol"


def _is_protocol(value: Mapping[str, Any]) -> bool:
    try:
        Decoding.model_validate(value["decoding"])
        return _is_json(value) and isinstance(value["seeds"], list) and isinstance(value["engine"], str)
    except (KeyError, ValueError):
        return False


def _is_json(value: Mapping[str, Any]) -> bool:
    try:
        canonical_json(value)
    except ValueError:  # 1e999 is a number in a file, and infinite
        return False
    return True


def _missing(records: Records) -> Iterator[str]:
    """Evaluations without generations, and answers without a prompt."""
    generations = records.generations
    for trial in records.facts.trials:
        for own in trial.evaluations:
            if own.fingerprint not in generations.tables:
                yield f"no generations of {trial.name!r} on {own.benchmark!r}"
            elif not generations.answers(own).keys() <= generations.prompts.get(own.prompts, {}).keys():
                yield f"answers of {trial.name!r} on {own.benchmark!r} without their prompts"


def _refuse(problems: Iterator[str], what: str) -> None:
    first = next(problems, None)
    if first is not None:
        raise _damaged(what, f"{FACTS}: {first}")


def _damaged(what: str, reason: str) -> ArtifactError:
    return ArtifactError(f"{what}: its records are damaged ({reason}); fetch it again, or {_AGAIN}")
