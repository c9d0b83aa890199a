"""What the code never does: unpickle, run code from elsewhere, read YAML unsafely; what every message must have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("pipeline", "tasks", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "torch.hub.load", "numpy.load", "np.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load",
    "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "compile", "os.system", "os.popen", "tempfile.mktemp", "__import__",
}  # fmt: skip
# Calls into a library that would otherwise ask for, or take, code from a model's repository.
LOADERS = re.compile(r"^(Auto\w+|library)\.(from_pretrained|SentenceTransformer)$")
CONSTRUCTORS = re.compile(r"^(vllm\.)?LLM$")


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def test_the_walk_sees_the_code() -> None:
    assert len(TREES) > 80
    assert sum(1 for tree in TREES.values() for name, _ in calls(tree) if LOADERS.match(name)) >= 5


@pytest.mark.parametrize("file", TREES)
def test_nothing_is_unpickled_and_no_text_is_run(file: str) -> None:
    for node in ast.walk(TREES[file]):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES, f"{file}:{getattr(node, 'lineno', 0)}"
    for name, call in calls(TREES[file]):
        assert name not in FORBIDDEN_CALLS, f"{file}:{call.lineno}: {name}"
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        shell = given.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), f"{file}:{call.lineno}: shell"


@pytest.mark.parametrize("file", TREES)
def test_code_from_a_models_repository_is_refused_wherever_a_model_is_read(file: str) -> None:
    for name, call in calls(TREES[file]):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        trust = given.get("trust_remote_code")
        refused = isinstance(trust, ast.Constant) and trust.value is False
        assert trust is None or refused, f"{file}:{call.lineno}: trust_remote_code"
        if LOADERS.match(name) or CONSTRUCTORS.match(name):
            assert refused, f"{file}:{call.lineno}: {name} without trust_remote_code=False"


def test_no_configuration_can_allow_code_from_a_repository() -> None:
    for path in (ROOT / "pipeline" / "config").glob("*.py"):
        assert "trust_remote_code" not in path.read_text(encoding="utf-8")


# Messages: every expected failure says what to do.

ERRORS = {
    "PipelineError", "ConfigError", "DataError", "ModelError", "ArtifactError", "CacheMismatchError", "TrainingError",
}  # fmt: skip
# In the validators of the configuration a ValueError is a user's message too.
CONFIGURATION = "pipeline/config/"
FIX = re.compile(
    r"\b(use|set|give|run|remove|raise|lower|choose|check|install|add|write|wait|convert|fetch|keep|quote|train|evaluate|capture"
    r"|merge|make|free|unset|name|rename|mend|shorten|include|change|load|export|look|download|must|needs?|expected|allowed"
    r"|there are|at most|did you mean)\b",
    re.IGNORECASE,
)
# Messages without such a word: (file, beginning of the raised expression).
WITHOUT: set[tuple[str, str]] = {
    # Lists of problems; the words of each are built beside, and tested there.
    ("pipeline/config/loading.py", "shown"),
    ("pipeline/evaluation/vllm_backend.py", "problems"),
    ("pipeline/models/layers.py", "problems"),
    ("pipeline/sweeps/plan.py", "list(dict.fromkeys(problems))"),
    # A part of the message, which says what to do, is made by a function.
    ("pipeline/teacher/cache/schema.py", "f'{path}: the shard"),
    ("pipeline/teacher/cache/schema.py", 'f"{path}: the shard'),
    # What is wrong is all that there is to say.
    ("pipeline/artifacts.py", "f'{path}: no such artifact'"),
    ("pipeline/artifacts.py", "f'{file}: cannot be read"),
    ("pipeline/data/tokenize.py", "f'the tokenizer {tokenizer.name_or_path} has no end-of-sequence token"),
    ("pipeline/evaluation/judge.py", "f'{cache}: cannot be read or written"),
    ("pipeline/evaluation/similarity.py", "f'{folder}: cannot be loaded as a sentence encoder"),
    ("pipeline/evaluation/vllm_backend.py", "f'vLLM ended the response"),
    ("pipeline/leaderboard.py", 'f"--experiment: {name!r} is not in this store'),
    ("pipeline/models/layers.py", "f'{what}: {count} pairs"),
    ("pipeline/models/lora.py", "f'{folder}/{_CONFIG}: peft_type"),
    ("pipeline/models/lora.py", "f\"{folder}/{_CONFIG}: not an adapter's configuration"),
    ("pipeline/models/lora.py", "f'{folder}/{_WEIGHTS}: cannot be read"),
    ("pipeline/reporting/compare.py", "f'{method} on {benchmark}: no generations to compare'"),
    ("pipeline/stages/fit.py", 'f"{job.label}: training failed at every learning rate'),
    ("pipeline/stages/measure.py", "f'{plan.place.label}: every reference"),
    ("pipeline/sweeps/accepted.py", "f'{row}: its evaluations"),
    ("pipeline/teacher/cache/reader.py", "f'{self._folder}: layers: cache has"),
    ("pipeline/training/sharded.py", 'f"{what}: {path} cannot be read'),
    # Nothing that the user could do but take another model.
    ("pipeline/models/lens.py", "f'{folder}: no tensor {name}"),
    ("pipeline/models/lens.py", "f\"{model.config.model_type}: the model's logits"),
    ("pipeline/models/lens.py", 'f"{model.config.model_type}: no {what} found'),
    ("pipeline/models/lens.py", "f'{model.config.model_type}: its output head"),
    ("pipeline/models/lens.py", "f'{model.config.model_type}: its blocks"),
}


def messages() -> list[tuple[str, int, str, str]]:
    """File, line, raised expression and the literal words of every expected failure."""
    found = []
    for file, tree in TREES.items():
        kinds = ERRORS | ({"ValueError"} if file.startswith(CONFIGURATION) else set())
        words = _constants(tree)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args):
                continue
            text = ast.unparse(node.args[0])
            found.append((file, node.lineno, text, _literals(node.args[0], words)))
    return found


def _constants(tree: ast.AST) -> dict[str, str]:
    """Name → the literal text of everything that is assigned to it in the file."""
    words: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    words[target.id] = words.get(target.id, "") + " " + _literals(node.value, {})
    return words


def _literals(node: ast.AST, words: dict[str, str]) -> str:
    parts = []
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            parts.append(child.value)
        elif isinstance(child, ast.Name) and child.id in words:
            parts.append(words[child.id])
    return " ".join(parts)


def test_the_walk_sees_the_messages() -> None:
    assert len(messages()) > 150


@pytest.mark.parametrize("file", sorted({message[0] for message in messages()}))
def test_every_message_says_what_to_do(file: str) -> None:
    missing = [
        f"{file}:{line}: {text[:160]}"
        for where, line, text, literal in messages()
        if where == file and not FIX.search(literal) and not any(w == file and text.startswith(t) for w, t in WITHOUT)
    ]
    assert not missing, "\n".join(missing)
