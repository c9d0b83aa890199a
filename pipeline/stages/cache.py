"""Stage 2: the teacher's states at response positions, captured once and read by every student.

With `cache.parts` the capture is n artifacts of their own, which several processes in one run directory, or several
machines with one store, take as they find them free; whoever comes to the end first joins them by links.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.artifacts import PARTIAL_SUFFIX, Artifact, peek
from pipeline.config.methods import CacheConfig
from pipeline.data.prompts import template_id
from pipeline.data.tokenize import read_encoded
from pipeline.models import load
from pipeline.models.lens import load_lens, logit_lens
from pipeline.progress import progress
from pipeline.stages.import_model import ModelPlan
from pipeline.stages.place import Place, Work, build, build_if_free, obtain, place
from pipeline.stages.prepare import TRAIN, TrainingDataPlan
from pipeline.teacher.cache.estimate import check_disk, estimate_bytes
from pipeline.teacher.cache.reader import CachedTeacher
from pipeline.teacher.cache.schema import CacheKey
from pipeline.teacher.cache.writer import capture, merge_parts
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.device import choose_device
from pipeline.training.step import Teacher

log = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True)
class CachePlan:
    """A cache that serves every method of an experiment.

    Attributes:
        place: its artifact; another cache that holds more layers of the same states serves as well, see `plan_cache`.
        key: what it holds and is checked against when it is opened.
        config: shard size, batch size and parts of the capture.
        teacher, data: the inputs.
    """

    place: Place
    key: CacheKey
    config: CacheConfig
    teacher: ModelPlan
    data: TrainingDataPlan

    @property
    def dtype(self) -> str:
        """Storage type of the states."""
        return self.key.dtype


def plan_cache(
    config: CacheConfig, layers: tuple[int, ...], teacher: ModelPlan, data: TrainingDataPlan, root: Path
) -> CachePlan:
    """Plan a cache of these teacher layers, or take a finished one that holds them and more."""
    base = {"dtype": config.dtype, "final_norm": "last layer only"}
    upstream = {"teacher": teacher.digest, "prepare": data.place.fingerprint}
    covering = _covering(root, base, upstream, layers)
    chosen = covering or layers
    where = place(root, "cache", VERSION, "cache teacher states", {**base, "layers": list(chosen)}, upstream)
    key = CacheKey(
        teacher=teacher.digest, tokenizer=data.tokenizer.digest, dataset=data.place.fingerprint,
        template=template_id(data.config.template), layers=chosen, dtype=config.dtype, max_tokens=data.config.max_tokens,
    )  # fmt: skip
    return CachePlan(where, key, config, teacher, data)


def run(plan: CachePlan) -> Artifact:
    """Capture the states; goes on after the last finished shard.

    Raises:
        ArtifactError: too little disk, told before any work.
    """
    teacher = functools.cache(lambda: load.load_model(plan.teacher.folder(), device=choose_device()))
    if plan.config.parts == 1:
        return build(plan.place, _capturing(plan, plan.place.label, (0, 1), teacher))
    parts = [
        (part, _capturing(plan, part.label, (index, plan.config.parts), teacher)) for index, part in enumerate(plan_parts(plan))
    ]

    def join(folder: Path) -> Mapping[str, Any]:
        # Parts that others hold are waited for here; those that they gave up are captured here.
        made = [build(part, work) for part, work in parts]
        for left in folder.iterdir():  # by a capture in one part that was interrupted
            left.unlink()
        merge_parts([part.path for part in made], folder)
        return {name: sum(part.manifest.counts[name] for part in made) for name in made[0].manifest.counts}

    if obtain(plan.place) is None:
        for part, work in parts:
            build_if_free(part, work)
    return build(plan.place, join)


def plan_parts(plan: CachePlan) -> list[Place]:
    """The artifacts of the cache's parts, in order."""
    root, count = plan.place.path.parents[1], plan.config.parts
    return [
        place(
            root, "cache_part", VERSION, f"{plan.place.label} {index + 1}/{count}",
            {**plan.place.recipe, "part": [index, count]}, plan.place.upstream,
        )
        for index in range(count)
    ]  # fmt: skip


def _capturing(plan: CachePlan, label: str, part: tuple[int, int], teacher: Callable[[], PreTrainedModel]) -> Work:
    """The work of one part, or of the whole."""

    def work(folder: Path) -> Mapping[str, Any]:
        rows = read_encoded(plan.data.place.open().path / TRAIN)
        needed = planned_bytes(plan, len(rows), sum(rows.response_counts))
        # What an interrupted capture and the other parts left is part of what is needed.
        check_disk(folder, needed - _captured_bytes(plan, folder))
        examples = [rows[i] for i in range(len(rows))]
        with progress(label, len(examples) / part[1], "rows") as advance:
            counts = capture(
                teacher(), examples, plan.key.layers, folder, plan.key, shard_bytes=plan.config.shard_mib << 20,
                batch_size=plan.config.batch_size, pad_token_id=0, device=choose_device(), progress=advance, part=part,
            )  # fmt: skip
        return vars(counts)

    return work


def _captured_bytes(plan: CachePlan, folder: Path) -> int:
    folders = {folder}
    if plan.config.parts > 1:
        paths = [part.path for part in plan_parts(plan)]
        folders |= {*paths, *(path.with_name(path.name + PARTIAL_SUFFIX) for path in paths)}
    return sum(file.stat().st_size for each in folders for file in each.rglob("*") if file.is_file())


def planned_bytes(plan: CachePlan, rows: int, response_tokens: int) -> int:
    """Bytes that the cache will take."""
    width = plan.teacher.config().hidden_size
    return estimate_bytes(response_tokens, rows, plan.key.layers, width, plan.key.dtype, batch_size=plan.config.batch_size)


def open_teacher(plan: CachePlan | None, teacher: ModelPlan, device: torch.device) -> Teacher:
    """The teacher as training sees it: from the cache, with only its head and norm in memory, or online."""
    if plan is None:
        model = load.load_model(teacher.folder(), device=device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return Teacher(OnlineTeacher(model), logit_lens(model))
    lens = load_lens(teacher.folder(), device)
    return Teacher(CachedTeacher(plan.place.path, plan.key, num_layers=lens.num_layers, device=device), lens)


def _covering(
    root: Path, base: Mapping[str, Any], upstream: Mapping[str, str], layers: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Layers of the smallest finished cache of the same states that holds all of `layers`."""
    found = []
    for folder in sorted((root / "cache").glob("*/")):
        manifest = peek(folder)
        if manifest is None or manifest.upstream != dict(upstream):
            continue
        recipe = dict(manifest.recipe)
        held = tuple(recipe.pop("layers"))
        if recipe == base and set(layers) <= set(held):
            found.append(held)
    return min(found, key=len, default=None)
