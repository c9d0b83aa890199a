"""Stage 0: a model reference becomes a transformers folder. Only GGUF files need work; other models are used where they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from pipeline.config.models import HubModel, LocalModel, ModelRef, PackageFolder
from pipeline.errors import ModelError
from pipeline.hub import resolve_revision
from pipeline.models import load
from pipeline.stages.place import MODEL, Place, build, place

VERSION = 1


@dataclass(frozen=True)
class ModelPlan:
    """A model that stages use.

    Attributes:
        what: dotted path of the setting, for messages.
        location: where its files are and their digest.
        place: the artifact of its conversion, None where none is needed.
        tuned: the artifact of its fine-tuning, whose weights then stand for the model; None takes it as it is.
    """

    what: str
    location: load.ModelLocation
    place: Place | None
    tuned: Place | None = None

    @property
    def digest(self) -> str:
        """What identifies the model in fingerprints."""
        made = self.tuned or self.place
        return made.fingerprint if made else self.location.digest

    def folder(self) -> Path:
        """The transformers folder; the stages that make it must have run.

        Raises:
            ModelError: the hub cannot be reached.
        """
        if self.tuned is not None:
            return self.tuned.path / MODEL
        return self.place.path if self.place else load.fetch(self.location, self.what)

    def config(self) -> PretrainedConfig:
        """The model's configuration, read from wherever it is cheapest, before or after the stage has run."""
        if self.tuned is not None:
            return replace(self, tuned=None).config()  # fine-tuning changes no size
        if self.place is not None and self.place.existing() is None:
            assert self.location.folder is not None  # a GGUF file is always on disk
            return load.load_config(self.location.folder, self.location.gguf_file)
        return load.load_config(self.folder())


def plan_model(ref: ModelRef, root: Path, what: str) -> ModelPlan:
    """Locate a model and say what must be done to use it.

    Raises:
        ModelError: it is not where the configuration says.
    """
    if isinstance(ref, HubModel):
        return ModelPlan(what, load.locate_hub(ref.repo, resolve_revision(ref.repo, ref.revision, "model", what)), None)
    if isinstance(ref, LocalModel):
        return ModelPlan(what, load.locate_local(ref.path, what), None)
    location = load.locate_package(ref.package, ref.gguf_file, what)
    recipe = {"gguf_sha256": location.digest, "dtype": "float32"}
    return ModelPlan(what, location, place(root, "model", VERSION, f"import {location.label}", recipe, {}))


def plan_encoder(ref: HubModel | LocalModel | PackageFolder, root: Path, what: str) -> ModelPlan:
    """Locate a sentence encoder; it is used where it is.

    Raises:
        ModelError: it is not where the configuration says.
    """
    if not isinstance(ref, PackageFolder):
        return plan_model(ref, root, what)
    try:
        spec = importlib.util.find_spec(ref.package)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(f"{what}.package: {ref.package!r} is not an installed package; install it with pip")
    return ModelPlan(what, load.locate_local(Path(folders[0]) / ref.folder, what), None)


def run(plan: ModelPlan) -> Path:
    """The transformers folder of the model, converted or downloaded if need be."""
    if plan.place is None:
        return plan.folder()

    def work(folder: Path) -> Mapping[str, Any]:
        assert plan.location.folder is not None and plan.location.gguf_file is not None
        load.import_gguf(plan.location.folder, plan.location.gguf_file, folder)
        return {}

    return build(plan.place, work).path
