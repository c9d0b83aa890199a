"""The core never loads Prefect; the losses need torch only."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pipeline

MODULES = [module.name for module in pkgutil.walk_packages(pipeline.__path__, "pipeline.")]
ROOT = Path(__file__).resolve().parents[3]


def loaded(names: list[str]) -> set[str]:
    code = f"import sys\nfor name in {names!r}: __import__(name)\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


def test_the_core_loads_neither_prefect_nor_mlflow() -> None:
    assert len(MODULES) > 30
    found = loaded(MODULES)
    assert "torch" in found and not {"prefect", "mlflow"} & found


def test_the_losses_need_torch_only() -> None:
    found = loaded([name for name in MODULES if name.startswith("pipeline.losses")])
    assert "torch" in found and not {"transformers", "pyarrow", "pydantic", "pandas"} & found


def test_no_pickle() -> None:
    sources = [path.read_text() for folder in ("pipeline", "tasks", "flows") for path in (ROOT / folder).rglob("*.py")]
    for word in ("torch.load(", "import pickle", "trust_remote_code=True", "yaml.load(", "eval("):
        assert not any(word in source.replace(".eval()", "") for source in sources), word
