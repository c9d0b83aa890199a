"""Registering the best student of an experiment, so that others load it by a name that stays."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import artifact_path, find
from pipeline.config import load_experiment
from pipeline.errors import ArtifactError, ConfigError
from pipeline.mlflow_model import deliver_model, is_score, logged_model, score
from pipeline.remote import reason
from pipeline.stages.place import MODEL

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

BEST = "best"
"""Alias of the version that `register` chose last."""
VALIDATION = "fingerprint.validation"
"""Tag of a run: what its dev scores depend on besides the student. Only equal ones compare."""
TRAINING = "fingerprint.train"
"""Tag of a run that trained a student: the fingerprint of that training."""
_SELECTED_BY = ("dev/rouge_l", "dev/loss")  # where the first was measured, the checkpoints were selected by it
_VERSIONS = "mlflow.modelVersions"  # tag of a logged model, by which the UI knows where it is registered
_LOWER_IS_BETTER = {"loss", "ece", "ex_acc_err"}


@dataclass(frozen=True)
class Registered:
    """What `register_best` did.

    Attributes:
        name: of the registered model.
        version: its version that has the alias `BEST` now.
        added: whether that version is new.
        run: name of the run that trained it.
        metric: what it is the best by.
        value: the metric's value.
        compared: how many students it is the best of.
        left_out: how many had other dev rows or were selected otherwise, so that their values do not compare.
    """

    name: str
    version: str
    added: bool
    run: str
    metric: str
    value: float
    compared: int
    left_out: int

    def __str__(self) -> str:
        which = "lowest" if _lower(self.metric) else "highest"
        others = f"; {self.left_out} with other validation settings left out" if self.left_out else ""
        what = "" if self.added else ", which it was already"
        text = (
            f"{self.name} version {self.version}{what}: {self.run}, {self.metric} {self.value:.4g}, the {which} of "
            f"{self.compared} finished student{'s' if self.compared != 1 else ''}{others}"
        )
        if not _on_test(self.metric):
            return text
        return f"{text}\nChosen on test scores: {self.metric} of this model is no estimate of how it does on unseen rows."


def experiment_name(given: str) -> str:
    """An experiment's name, which may be given as its file.

    Raises:
        ConfigError: it is a file that holds no experiment.
    """
    return load_experiment(Path(given)).name if given.endswith((".yaml", ".yml")) else given


def register_best(client: MlflowClient, run_dir: Path, experiment: str, name: str, by: str | None = None) -> Registered:
    """Register the best finished student of an experiment under `name` with the alias `BEST`.

    A student whose model was not logged is logged now, if its training is in the run directory. Where the best one is
    registered already, no version is added.

    Args:
        client: of the store.
        run_dir: where the trainings are.
        experiment: its name.
        name: of the registered model; made if need be.
        by: metric; None takes what the experiment selects checkpoints by, on dev rows. Never a test score unless it is named.

    Raises:
        ConfigError: no such experiment or metric, no finished student, its model is not there, or the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    _check_name(name)
    try:
        return _register(client, run_dir, experiment, name, by)
    except MlflowException as error:
        raise ConfigError(f"the tracking store failed: {reason(error)}; look at MLFLOW_TRACKING_URI and its server") from None


def _register(client: MlflowClient, run_dir: Path, experiment: str, name: str, by: str | None) -> Registered:
    finished = _students(client, experiment)
    students = _comparable(finished)
    metric = by or next((metric for metric in _SELECTED_BY if any(metric in run.data.metrics for run in students)), "")
    scores = [(score(client, run, metric), run) for run in students if is_score(metric) and metric in run.data.metrics]
    ranked = [(one.value, run) for one, run in scores if one is not None and math.isfinite(one.value)]
    if not ranked:
        known = sorted({key for run in students for key in run.data.metrics if is_score(key)})
        raise ConfigError(f"--by: no finished student of {experiment} has a metric {metric!r}{_hint(metric, known)}")
    value, best = min(ranked, key=lambda item: (item[0] if _lower(metric) else -item[0], item[1].info.run_name or ""))
    version, added = _version(client, name, _logged(client, run_dir, best), best)
    tags = {"experiment": experiment, "run": str(best.info.run_name), "method": best.data.tags["method"]}
    for key, told in {**tags, "metric": metric, "value": f"{value:g}"}.items():
        client.set_model_version_tag(name, version, key, told)
    client.set_registered_model_alias(name, BEST, version)
    return Registered(
        name, version, added, str(best.info.run_name), metric, value, len(ranked), len(finished) - len(students)
    )  # fmt: skip


def _check_name(name: str) -> None:
    if not name.strip() or name in (".", "..") or any(letter in name for letter in "/:@'\"") or not name.isprintable():
        raise ConfigError(f"--as: {name!r} cannot name a registered model; use letters, digits, spaces and - _ .")


def _students(client: MlflowClient, experiment: str) -> list[Run]:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        # Names with a space are of what an experiment's stages did.
        known = [one.name for one in client.search_experiments() if one.name != "Default" and " " not in one.name]
        raise ConfigError(f"{experiment!r} is no experiment of this store{_hint(experiment, known)}")
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [found.experiment_id], "attributes.status = 'FINISHED' AND tags.stage = 'trial'", page_token=token
        )
        runs += [run for run in page if TRAINING in run.data.tags]
        token = page.token
        if not token:
            break
    if not runs:
        raise ConfigError(f"{experiment} has no finished student yet; run `distilllens reproduce` first")
    return runs


def _comparable(runs: Sequence[Run]) -> list[Run]:
    """Those whose dev scores mean the same as the newest one's."""
    newest = max(runs, key=lambda run: run.info.start_time)
    return [run for run in runs if run.data.tags.get(VALIDATION) == newest.data.tags.get(VALIDATION)]


def _logged(client: MlflowClient, run_dir: Path, run: Run) -> LoggedModel:
    logged = logged_model(client, run)
    if logged is not None:
        return logged
    trained = run.data.tags[TRAINING]
    where = artifact_path(run_dir / "artifacts", "train", trained)
    try:
        artifact = find(where, trained)
        if artifact is not None:
            model = deliver_model(client, run.info.run_id, artifact.path / MODEL, str(run.info.run_name))
            return client.get_logged_model(model)
    except ArtifactError as error:
        raise ConfigError(f"{run.info.run_name} is the best, but its model is not logged, and cannot be: {error}") from None
    raise ConfigError(
        f"{run.info.run_name} is the best, but its model is not logged, and its training is not at {where}; "
        "give the --run-dir that has it"
    )


def _version(client: MlflowClient, name: str, logged: LoggedModel, run: Run) -> tuple[str, bool]:
    """The version that is this logged model, and whether it was added."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{logged.model_id}"
    known = [version for version in client.search_model_versions(f"name = '{name}'") if version.source == source]
    version = known[0] if known else client.create_model_version(name, source, run.info.run_id, model_id=logged.model_id)
    told = json.loads(logged.tags.get(_VERSIONS, "[]"))
    entry = {"name": name, "version": str(version.version)}
    if entry not in told:
        client.set_logged_model_tags(logged.model_id, {_VERSIONS: json.dumps([*told, entry])})
    return str(version.version), not known


def _on_test(metric: str) -> bool:
    return metric.startswith("eval/")


def _lower(metric: str) -> bool:
    return metric.rpartition("/")[2] in _LOWER_IS_BETTER


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (there {'is' if len(known) == 1 else 'are'} {', '.join(sorted(known)) or 'none'})"
