"""Top tokens by layer against transformers' own states, and the `lens` command's work from folders to files."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation import lens_view
from pipeline.evaluation.lens_view import (
    LensCell,
    LensTable,
    aligned_layers,
    encode_prompt,
    run_lens,
    terminal_table,
    token_text,
    top_tokens,
    visible,
)
from pipeline.models.lens import logit_lens
from pipeline.models.load import load_model, load_tokenizer
from pipeline.models.student import prune

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2}
IDS = (5, 9, 17, 30, 2)


def unusual_norm(model: PreTrainedModel) -> torch.nn.Module:
    """A final norm that visibly changes its input, even what is normed already."""
    norm: torch.nn.Module = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_cells_are_the_top_of_the_head_on_each_state(family: str, final_norm: bool) -> None:
    model, tokenizer = FAMILIES[family](), tiny.tokenizer()
    norm = unusual_norm(model)
    table = top_tokens(model, logit_lens(model), tokenizer, IDS, final_norm)
    with torch.no_grad():
        output = model(torch.tensor([IDS]), output_hidden_states=True)
        expected = [
            model.get_output_embeddings()(norm(state) if final_norm else state)[0] for state in output.hidden_states[:-1]
        ] + [output.logits[0]]
    assert table.num_layers == 4 and table.positions == (0, 1, 2, 3, 4) and table.vocab_size == 300
    assert table.inputs == tuple(tokenizer.decode([token]) for token in IDS)
    for logits, row in zip(expected, table.cells, strict=True):
        p = logits.double().softmax(-1)
        for position, cell in enumerate(row):
            assert cell.token_id == int(p[position].argmax()) and cell.token == tokenizer.decode([cell.token_id])
            assert cell.probability == pytest.approx(float(p[position].max()), rel=1e-4)
            assert cell.entropy == pytest.approx(float(-(p[position] * p[position].log()).sum()), rel=1e-4)


@pytest.mark.parametrize("shown", [1, 3, 5, 50])
def test_the_last_positions_are_rows_of_the_whole(shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.gpt2(), tiny.tokenizer()
    whole = top_tokens(model, logit_lens(model), tokenizer, IDS, True)
    monkeypatch.setattr(lens_view, "default_chunk_tokens", lambda vocab_size: 2)  # chunks change nothing
    part = top_tokens(model, logit_lens(model), tokenizer, IDS, True, positions=shown)
    kept = min(shown, 5)
    assert part.positions == whole.positions[-kept:] and part.inputs == whole.inputs[-kept:]
    for row, full in zip(part.cells, whole.cells, strict=True):
        assert [cell.token_id for cell in row] == [cell.token_id for cell in full[-kept:]]
        assert [cell.entropy for cell in row] == pytest.approx([cell.entropy for cell in full[-kept:]], rel=1e-5)


def test_layers_stand_side_by_side_by_depth() -> None:
    assert aligned_layers(4, 2) == [(0, 0), (1, None), (2, 1), (3, None), (4, 2)]
    assert aligned_layers(2, 4) == [(0, 0), (None, 1), (1, 2), (None, 3), (2, 4)]
    assert aligned_layers(3, 3) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    lines = aligned_layers(30, 20)
    assert [(student, teacher) for teacher, student in lines if student in (3, 7, 10, 13, 17)] == [
        (3, 5), (7, 11), (10, 15), (13, 20), (17, 26),
    ]  # fmt: skip  # as the paper's map has it


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("a\n\tb", "a↵⇥b"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202e", "\\u202e"),
        ("é猫", "é猫"),
        ("\ufffd", "\ufffd"),
    ],
)
def test_tokens_for_people(text: str, shown: str) -> None:
    assert visible(text) == shown


class _Pieces(SimpleNamespace):
    """As a SentencePiece tokenizer: its pieces mark spaces, and a text on its own loses the first."""

    pieces = ("▁the", "ing", "▁")

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.pieces[token_id]

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(self.pieces[token] for token in ids).replace("▁", " ").removeprefix(" ")


def test_the_space_in_front_of_a_piece_is_kept() -> None:
    tokenizer: Any = _Pieces()
    assert [token_text(tokenizer, token) for token in range(4)] == [" the", "ing", " ", "<3>"]


def table(tokens: list[list[tuple[int, str]]], inputs: tuple[str, ...] = ("a", " b")) -> LensTable:
    cells = tuple(tuple(LensCell(number, text, 0.25, 1.5) for number, text in row) for row in tokens)
    return LensTable((3, 4), inputs, cells, 300, False)


def shown(teacher: LensTable, student: LensTable, positions: int) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(terminal_table(teacher, student, positions))
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if line[0] in "│┃"]


def test_the_terminal_shows_both_models_line_by_line() -> None:
    teacher = table([[(1, "x"), (2, " is")], [(1, "x"), (3, "[red]\x1b[0m")], [(1, "x"), (4, "an extremely long token")]])
    student = table([[(9, "z"), (2, " is")], [(1, "x"), (5, "\n")]])
    assert shown(teacher, student, 1) == [
        ["teacher", "after ␣b", "nats", "student", "after ␣b", "nats"],
        ["embed", "␣is 0.25", "1.50", "embed", "=␣is 0.25", "1.50"],
        ["1", "[red]\\x1b[0m 0.25", "1.50", "", "", ""],
        ["final", "an␣extremely␣… 0.25", "1.50", "final", "↵ 0.25", "1.50"],
    ]
    both = shown(teacher, student, 2)
    assert both[0] == ["teacher", "after a", "after ␣b", "nats", "student", "after a", "after ␣b", "nats"]
    assert both[1][-3:] == ["z 0.25", "=␣is 0.25", "1.50"] and both[3][-3:] == ["=x 0.25", "↵ 0.25", "1.50"]
    assert shown(teacher, student, 7) == both


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher of six layers and a student of three of them."""
    root = tmp_path_factory.mktemp("lens")
    teacher = tiny.llama(layers=6)
    tiny.save(teacher, root / "teacher")
    tiny.save(prune(teacher, 2, 3)[0], root / "student")
    return root / "teacher", root / "student"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("final_norm", [False, True])
def test_a_run_prints_and_writes_what_the_tables_hold(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    final_norm: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    teacher, student = folders
    run_lens(student, teacher, "the cat sat", tmp_path / "new" / "view.png", final_norm, positions=2)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"view.png", "view.svg", "view.json"}
    content = read(tmp_path / "new" / "view.json")
    assert (content["prompt"], content["template"]) == ("the cat sat", None)
    tokenizer = load_tokenizer(student)
    ids = tokenizer("the cat sat")["input_ids"]
    for name, folder in (("teacher", teacher), ("student", student)):
        model = load_model(folder)
        expected = top_tokens(model, logit_lens(model), tokenizer, ids, final_norm, 2)
        assert content[name] == {"path": str(folder), **json.loads(json.dumps(asdict(expected)))}
    printed = capsys.readouterr().out
    top = content["student"]["cells"][-1][-1]
    assert f"{visible(top['token'])} {top['probability']:.2f}" in printed
    assert "after ␣cat" in printed and "after ␣sat" in printed
    for name in ("view.png", "view.svg", "view.json"):
        assert str(tmp_path / "new" / name) in printed
    # The student has the teacher's embeddings: the same token at both positions, marked.
    assert next(line for line in printed.splitlines() if "embed" in line).count("=") == 2


def test_a_narrow_terminal_shows_fewer_positions(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_lens(folders[1], folders[0], "the cat sat", tmp_path / "view", False, positions=3)
    printed = capsys.readouterr().out
    assert "after ␣sat" in printed and "after ␣cat" not in printed
    assert max(len(line) for line in printed.splitlines() if line[0] in "│┃") <= 80
    assert len(read(tmp_path / "view.json")["student"]["positions"]) == 3


def test_a_training_artifact_stands_for_its_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    tiny.save(load_model(folders[1]), artifact / "model")
    run_lens(artifact, folders[0], "the cat", tmp_path / "v.1", False, positions=1)
    assert read(tmp_path / "v.1.json")["student"]["path"] == str(artifact / "model")


def test_padded_heads_share_the_smaller_vocabulary(tmp_path: Path) -> None:
    teacher = tiny.llama(vocab=320, tie=False)
    teacher.lm_head.weight.data[300:] *= 100  # the padding of a head must not be its top token
    tiny.save(teacher, tmp_path / "t")
    tiny.save(tiny.llama(vocab=300), tmp_path / "s")
    run_lens(tmp_path / "s", tmp_path / "t", "the cat", tmp_path / "view", False, positions=2)
    content = read(tmp_path / "view.json")["teacher"]
    assert content["vocab_size"] == 300 and max(cell["token_id"] for row in content["cells"] for cell in row) < 300


def test_a_template_wraps_the_prompt(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run_lens(folders[1], folders[0], "the cat", tmp_path / "view", False, positions=3, template="alpaca")
    content = read(tmp_path / "view.json")
    tokenizer = load_tokenizer(folders[1])
    ids = encode_prompt(tokenizer, "the cat", "alpaca", 1024)
    text = tokenizer.decode(ids)
    assert "### Instruction:\nthe cat\n" in text and text.endswith("### Response:\n")
    assert content["template"] == "alpaca" and text.endswith("".join(content["student"]["inputs"]))
    assert content["student"]["positions"] == [len(ids) - 3, len(ids) - 2, len(ids) - 1]


def test_special_tokens_stay_in_front_and_not_behind() -> None:
    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "cat": 2}, unk_token="<s>"))
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert encode_prompt(tokenizer, "cat", None, 8) == (0, 2)
    # What the user spells out is part of the prompt.
    assert encode_prompt(tokenizer, "cat</s>", None, 8) == (0, 2, 1)
    with pytest.raises(ConfigError, match="--prompt: there is nothing in it"):
        encode_prompt(tokenizer, "", None, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoint": Path("absent")}, ModelError, "CHECKPOINT: absent is not a folder"),
        ({"teacher": Path("absent")}, ModelError, "--teacher: absent is not a folder"),
        ({"prompt": " \n"}, ConfigError, "--prompt: there is nothing in it"),
        ({"prompt": " \n", "template": "alpaca"}, ConfigError, "--prompt: there is nothing in it"),
        ({"prompt": "cat " * 1100}, ConfigError, r"--prompt: 1\d\d\d tokens, and the models take 1024"),
        ({"prompt": "cat " * 1100, "template": "alpaca"}, ConfigError, r"--prompt: 1\d\d\d tokens, and the models take 1024"),
        ({"template": "alpacca"}, ConfigError, "template: 'alpacca' is not known"),
        ({"template": "chat"}, ModelError, "has no chat template"),
        ({"positions": 0}, ConfigError, "--positions: 0; give 1 to 64"),
        ({"positions": 65}, ConfigError, "--positions: 65; give 1 to 64"),
    ],
)
def test_bad_input_is_one_message(
    folders: tuple[Path, Path], tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    teacher, student = folders
    good: dict[str, Any] = {"checkpoint": student, "teacher": teacher, "prompt": "cat", "positions": 1}
    with pytest.raises(error, match=message):
        run_lens(**{**good, **arguments}, out=tmp_path / "made" / "view", final_norm=False)
    assert not (tmp_path / "made").exists()


def test_a_folder_without_safetensors_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="CHECKPOINT: .* has no config.json with"):
        run_lens(tmp_path, folders[0], "cat", tmp_path / "view", False, 1)


def test_output_that_cannot_be_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out: .*file cannot be made"):
        run_lens(folders[1], folders[0], "cat", tmp_path / "file" / "view", False, 1)
    with pytest.raises(ConfigError, match="--out: .* is a folder"):
        run_lens(folders[1], folders[0], "cat", tmp_path, False, 1)


def test_models_of_two_vocabularies_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny.save(tiny.llama(), tmp_path / "other")
    content = read(other / "tokenizer.json")
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="different tokenizers: .* is token 41 of the teacher.s and token 40 of the student.s"):
        run_lens(other, folders[0], "cat", tmp_path / "view", False, 1)
    small = tiny.save(tiny.llama(vocab=200), tmp_path / "small")
    with pytest.raises(ModelError, match="the heads have 300 and 200 entries, the tokenizer has"):
        run_lens(small, folders[0], "cat", tmp_path / "view", False, 1)


def test_entropy_is_bounded_by_the_vocabulary() -> None:
    model = tiny.llama()
    model.lm_head.weight.data.zero_()
    cell = top_tokens(model, logit_lens(model), tiny.tokenizer(), IDS, False).cells[2][0]
    assert (cell.probability, cell.entropy) == (pytest.approx(1 / 300), pytest.approx(math.log(300)))
