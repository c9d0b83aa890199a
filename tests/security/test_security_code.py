"""What the code never does: unpickle, run code from elsewhere, read YAML unsafely. Messages: tests/messages."""

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
