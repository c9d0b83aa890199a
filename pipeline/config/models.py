"""References to models and the choice of the student's initial weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import LocalPath, Repo, Revision, Strict


class HubModel(Strict):
    """A model repository on the hub."""

    kind: Literal["hub"]
    repo: Repo
    """owner/name."""
    revision: Revision
    """Commit hash, tag or branch; resolved to a commit before anything runs."""


class LocalModel(Strict):
    """A transformers folder on disk: config.json, *.safetensors, tokenizer files."""

    kind: Literal["local"]
    path: LocalPath


class PackageModel(Strict):
    """A GGUF file that an installed Python package carries."""

    kind: Literal["package"]
    package: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """Import name of a package, without dots: it is located, never imported, and to locate a part would import the whole."""
    gguf_file: str = Field(pattern=r"^[^/\\]+\.gguf$")
    """File name inside the package folder."""


ModelRef = Annotated[HubModel | LocalModel | PackageModel, Field(discriminator="kind")]


class PackageFolder(Strict):
    """A model folder that an installed Python package carries."""

    kind: Literal["package"]
    package: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """Import name of a package, without dots: it is located, never imported, and to locate a part would import the whole."""
    folder: str = Field(pattern=r"^\w[\w-]*(\.[\w-]+)*(/\w[\w-]*(\.[\w-]+)*)*$")
    """Folder inside the package."""


EncoderRef = Annotated[HubModel | LocalModel | PackageFolder, Field(discriminator="kind")]
"""A sentence encoder: a folder of sentence-transformers."""


class PrunedStudent(Strict):
    """The teacher without one contiguous block of layers (Gromov et al. 2024, arXiv 2403.17887)."""

    kind: Literal["pruned"]
    keep_layers: int = Field(ge=1)
    """Layers that remain."""
    drop_from: int | None = Field(default=None, ge=1)
    """First dropped layer, counted from 1; null chooses the block with the smallest angular distance."""
    calibration_rows: int = Field(default=64, ge=1)
    """Training rows on which the angular distance is measured."""


class PretrainedStudent(Strict):
    """A model of its own."""

    kind: Literal["pretrained"]
    model: ModelRef


class ScratchStudent(Strict):
    """The teacher's architecture with fewer layers and random weights."""

    kind: Literal["scratch"]
    layers: int = Field(ge=1, le=1000)
    hidden_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Width; null keeps the teacher's."""
    intermediate_size: int | None = Field(default=None, ge=1, le=10_000_000)
    """MLP width; null keeps the teacher's."""
    heads: int | None = Field(default=None, ge=1, le=10_000)
    """Attention heads; null keeps the teacher's."""
    key_value_heads: int | None = Field(default=None, ge=1, le=10_000)
    """Key/value heads where the architecture has them; null keeps the teacher's."""
    init_seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ScratchStudent:
        if self.hidden_size is not None and self.heads is not None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}; change one")
        return self


StudentConfig = Annotated[PrunedStudent | PretrainedStudent | ScratchStudent, Field(discriminator="kind")]
