"""What two models would say at every layer: the logit lens on one prompt, side by side."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import write_text_atomically
from pipeline.data.collate import collate
from pipeline.data.examples import EncodedExample, Example
from pipeline.data.tokenize import encode_prompts
from pipeline.errors import ConfigError, ModelError
from pipeline.losses.divergences import at_least_float32, log_probs
from pipeline.losses.elementwise import row_chunks
from pipeline.losses.fused import default_chunk_tokens
from pipeline.models.lens import LogitLens, check_same_tokens, check_vocabulary_sizes, logit_lens
from pipeline.models.load import load_config, load_model, load_tokenizer
from pipeline.teacher.online import layer_states
from pipeline.training.device import choose_device

_SHOWN = {" ": "␣", "\n": "↵", "\t": "⇥"}
_MOST_POSITIONS = 64
_TERMINAL_TOKEN = 14
_TERMINAL_POSITION = 2 * (_TERMINAL_TOKEN + 7)
_TERMINAL_FRAME = 34
_SUFFIXES = (".png", ".svg", ".json")
_TRAINED = "model"


@dataclass(frozen=True)
class LensCell:
    """A layer's most probable next token at one position.

    Attributes:
        token_id: its id.
        token: its text; see `visible` for people.
        probability: 0–1.
        entropy: of the whole distribution, nats.
    """

    token_id: int
    token: str
    probability: float
    entropy: float


@dataclass(frozen=True)
class LensTable:
    """A model's logit lens on a prompt.

    Attributes:
        positions: positions in the prompt, from 0, ascending.
        inputs: the prompt's token at each of them; the lens says what comes after it.
        cells: cells[l][i] is layer l at positions[i], l = 0 (embeddings) … L (final).
        vocab_size: entries of the distributions.
        final_norm: whether intermediate states were normed first.
    """

    positions: tuple[int, ...]
    inputs: tuple[str, ...]
    cells: tuple[tuple[LensCell, ...], ...]
    vocab_size: int
    final_norm: bool

    @property
    def num_layers(self) -> int:
        """L; the table has L + 1 rows."""
        return len(self.cells) - 1


@torch.no_grad()
def top_tokens(
    model: PreTrainedModel,
    lens: LogitLens,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    final_norm: bool,
    positions: int | None = None,
) -> LensTable:
    """The most probable next token after every layer.

    Args:
        model: a causal language model in evaluation mode.
        lens: its lens.
        tokenizer: its tokenizer.
        prompt_ids: at least one token.
        final_norm: apply the final norm to intermediate states first; never to final ones (hazard 2).
        positions: how many of the last positions; None takes all, and so does a number beyond them.
    """
    shown = min(positions or len(prompt_ids), len(prompt_ids))
    # A row needs a response: the shown positions become its response positions, and its last token is a label only.
    row = EncodedExample("prompt", (*prompt_ids, prompt_ids[-1]), len(prompt_ids) - shown + 1)
    batch = collate([row], pad_token_id=0).to(model.device)
    states = layer_states(model, batch, range(lens.num_layers + 1), batch.response_positions)
    cells = [_cells(lens, layer, states[layer], tokenizer, final_norm) for layer in range(lens.num_layers + 1)]
    where = tuple(range(len(prompt_ids) - shown, len(prompt_ids)))
    inputs = tuple(token_text(tokenizer, prompt_ids[position]) for position in where)
    return LensTable(where, inputs, tuple(cells), lens.head.size, final_norm)


def _cells(
    lens: LogitLens, layer: int, states: Tensor, tokenizer: PreTrainedTokenizerBase, final_norm: bool
) -> tuple[LensCell, ...]:
    cells: list[LensCell] = []
    for rows in row_chunks(0, states.shape[0], default_chunk_tokens(lens.head.size)):
        log_p = log_probs(at_least_float32(lens.logits(states[rows], layer, final_norm)))
        p = log_p.exp()
        top, entropies = p.max(-1), -(p * log_p).sum(-1)
        cells.extend(
            LensCell(token, token_text(tokenizer, token), probability, entropy)
            for token, probability, entropy in zip(top.indices.tolist(), top.values.tolist(), entropies.tolist(), strict=True)
        )
    return tuple(cells)


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token's text with its leading space, `<5>` for an entry of a padded head that is no token."""
    if token_id >= len(tokenizer):
        return f"<{token_id}>"
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    # SentencePiece tokenizers strip the space in front of a text's first word.
    starts_word = str(tokenizer.convert_ids_to_tokens(token_id)).startswith("▁")
    return f" {text}" if starts_word and not text.startswith(" ") else text


def visible(text: str) -> str:
    """A token's text for people: spaces and line ends as signs, control characters as codes, so that a terminal is safe."""
    return "".join(_SHOWN.get(sign) or (repr(sign)[1:-1] if unicodedata.category(sign)[0] == "C" else sign) for sign in text)


def aligned_layers(teacher_layers: int, student_layers: int) -> list[tuple[int | None, int | None]]:
    """(teacher layer, student layer) of each line of a table of both, by relative depth as in §3 of the paper.

    The deeper model has a layer on every line; the other's layer l is on line round(l · deeper / shallower).
    """
    deeper = max(teacher_layers, student_layers)
    lines = [
        {int(layer * deeper / layers + 0.5): layer for layer in range(layers + 1)}
        for layers in (teacher_layers, student_layers)
    ]
    return [(lines[0].get(line), lines[1].get(line)) for line in range(deeper + 1)]


def terminal_table(teacher: LensTable, student: LensTable, positions: int) -> Table:
    """Both models' layers side by side at the last positions: token and probability, and at the last one the entropy.

    A student's cell with the same token as the teacher's beside it begins with "=".
    """
    shown = range(max(0, len(teacher.positions) - positions), len(teacher.positions))
    grid = Table(title="most probable next token by layer; = where the student has the teacher's", title_justify="left")
    for name in ("teacher", "student"):
        grid.add_column(name, justify="right")
        for column in shown:
            grid.add_column(Text("after ").append_text(_clipped(teacher.inputs[column])), no_wrap=True)
        grid.add_column("nats", justify="right")
    for teacher_layer, student_layer in aligned_layers(teacher.num_layers, student.num_layers):
        beside = None if teacher_layer is None else teacher.cells[teacher_layer]
        grid.add_row(*_line(teacher, teacher_layer, None, shown), *_line(student, student_layer, beside, shown))
    return grid


def _line(table: LensTable, layer: int | None, beside: Sequence[LensCell] | None, shown: range) -> list[Text | str]:
    if layer is None:
        return [""] * (len(shown) + 2)
    cells = table.cells[layer]
    texts: list[Text | str] = []
    for column in shown:
        same = beside is not None and beside[column].token_id == cells[column].token_id
        text = Text("=" if same else " ", style="bold" if same else "").append_text(_clipped(cells[column].token))
        texts.append(text.append(f" {cells[column].probability:.2f}"))
    return [layer_name(layer, table.num_layers), *texts, f"{cells[shown[-1]].entropy:.2f}"]


def _clipped(token: str) -> Text:
    text = Text(visible(token))
    text.truncate(_TERMINAL_TOKEN, overflow="ellipsis")
    return text


def layer_name(layer: int, last: int) -> str:
    """`embed`, 1, 2, …, `final`: which states they are, not only which number they have."""
    return "embed" if layer == 0 else "final" if layer == last else str(layer)


def run_lens(
    checkpoint: Path, teacher: Path, prompt: str, out: Path, final_norm: bool, positions: int, template: str | None = None
) -> None:
    """Print the top token per layer of both models, and write OUT.png, OUT.svg and OUT.json.

    Args:
        checkpoint: the student, a transformers folder or a training artifact.
        teacher: the teacher, likewise.
        prompt: the prompt; with `template` an instruction.
        out: path of the files; a suffix .png, .svg or .json is replaced.
        final_norm: the classic lens (true) or the paper's (false), see `LogitLens`.
        positions: how many of the prompt's last positions the files show; the terminal shows as many as it has room for.
        template: name of a prompt template, None for the text as it is.

    Raises:
        ModelError: a folder holds no model, or the models do not share a vocabulary.
        ConfigError: the prompt is empty or too long, `positions` is not 1 to 64, there is no such template, or OUT cannot be
            written.
    """
    # Matplotlib takes long to load, and nothing else here needs it.
    from pipeline.reporting import lens_figure

    if not 1 <= positions <= _MOST_POSITIONS:
        raise ConfigError(f"--positions: {positions}; give 1 to {_MOST_POSITIONS}")
    folders = {"teacher": _model_folder(teacher, "--teacher"), "student": _model_folder(checkpoint, "CHECKPOINT")}
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    vocab_size = _shared_vocabulary(folders, tokenizers)
    ids = encode_prompt(tokenizers["student"], prompt, template, min(_longest(folder) for folder in folders.values()))
    stem = _output_stem(out)
    # One after the other, so that only one model is in memory at a time.
    tables = {
        name: _table_of(folder, tokenizers[name], ids, vocab_size, final_norm, positions) for name, folder in folders.items()
    }
    console = Console()
    room = (console.width - _TERMINAL_FRAME) // _TERMINAL_POSITION
    console.print(terminal_table(tables["teacher"], tables["student"], max(1, min(positions, room))))
    names = {"teacher": teacher.resolve().name, "student": checkpoint.resolve().name}
    figure = lens_figure.heat_map(tables["teacher"], tables["student"], names)
    for path in (*lens_figure.save(figure, stem), _write_json(stem, prompt, template, folders, tables)):
        console.print(str(path), highlight=False, soft_wrap=True, markup=False)


def _table_of(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    vocab_size: int,
    final_norm: bool,
    positions: int,
) -> LensTable:
    model = load_model(folder, device=choose_device())
    return top_tokens(model, logit_lens(model, vocab_size), tokenizer, ids, final_norm, positions)


def _write_json(
    stem: Path, prompt: str, template: str | None, folders: Mapping[str, Path], tables: Mapping[str, LensTable]
) -> Path:
    models = {name: {"path": str(folder), **asdict(tables[name])} for name, folder in folders.items()}
    path = stem.with_name(f"{stem.name}.json")
    content = {"prompt": prompt, "template": template, **models}
    write_text_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str | None, limit: int) -> tuple[int, ...]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts in front and none that it puts behind.

    Raises:
        ConfigError: there is no text, there are more than `limit` tokens, or there is no such template.
        ModelError: the template is `chat`, and the tokenizer has no chat template.
    """
    if template is None:
        ids = _as_it_is(tokenizer, prompt)
    else:
        example = Example("prompt", prompt, "", ())
        encoded, _ = encode_prompts([example], tokenizer, template, max_prompt_tokens=sys.maxsize)
        ids = encoded[0].input_ids
    if not ids or not prompt.strip():
        raise ConfigError("--prompt: there is nothing in it; give some text")
    if len(ids) > limit:
        raise ConfigError(f"--prompt: {len(ids)} tokens, and the models take {limit}; shorten it")
    return ids


def _as_it_is(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    batch = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    ids, added = tuple(batch["input_ids"]), list(batch["special_tokens_mask"])
    while added and added.pop():
        ids = ids[:-1]
    return ids


def _longest(folder: Path) -> int:
    """Tokens that a model takes; models without learned or scaled positions name no limit."""
    return int(getattr(load_config(folder), "max_position_embeddings", None) or sys.maxsize)


def _shared_vocabulary(folders: Mapping[str, Path], tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> int:
    """The number of vocabulary entries that both heads share (hazard 7)."""
    check_same_tokens(tokenizers["teacher"].get_vocab(), tokenizers["student"].get_vocab())
    sizes = {name: int(load_config(folder).vocab_size) for name, folder in folders.items()}
    return check_vocabulary_sizes(sizes["teacher"], sizes["student"], len(tokenizers["student"]))


def _model_folder(path: Path, what: str) -> Path:
    """A transformers folder, or the one inside a training artifact."""
    for folder in (path, path / _TRAINED):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    if not path.is_dir():
        raise ModelError(f"{what}: {path} is not a folder; give a transformers folder with config.json and *.safetensors")
    raise ModelError(f"{what}: {path} has no config.json with *.safetensors beside it; give a transformers folder")


def _output_stem(out: Path) -> Path:
    stem = out.with_suffix("") if out.suffix in _SUFFIXES else out
    if out.is_dir() or not stem.name:
        raise ConfigError(f"--out: {out} is a folder; give a file name in it")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {stem.parent} cannot be made ({error.strerror}); choose another place") from None
    if not os.access(stem.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: {stem.parent} cannot be written; choose another place")
    return stem
