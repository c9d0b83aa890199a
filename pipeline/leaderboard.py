"""What the MLflow UI opens with: a preset table of runs, and a description of the experiment with its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.errors import ConfigError
from pipeline.reporting.aggregate import AVERAGE

VIEW = "leaderboard"
"""Key of the preset view of the runs table."""
FINISHED = "distilllens.compared_at"
"""Experiment tag: when its comparison was made, seconds since the epoch."""
VIEW_TAG, NOTE_TAG, KIND_TAG = f"mlflow.sharedViewState.{VIEW}", "mlflow.note.content", "mlflow.experimentKind"
CURVES = ("dev/rouge_l", "dev/loss", "train/loss")
"""Metrics with a curve that methods have in common."""
IMAGES = "figures"
"""What the names of images begin with; a section of the UI's charts."""
_CURVES_SECTION = "learning curves"
_MODE = "workflowType=machine_learning"  # without it every page is laid out for language model applications
_TAG_LENGTH = 5000  # MLflow's limit for one tag of an experiment


@dataclass(frozen=True)
class Links:
    """Where things are in the UI.

    Attributes:
        experiment: id of the experiment that has the trials.
        stages: id of the one that has the comparison's run.
        run: that run.
    """

    experiment: str
    stages: str
    run: str


def view_state(benchmarks: Sequence[str], images: Sequence[str]) -> str:
    """The preset of the runs table and of the charts as the UI reads it: columns in order, best average first.

    Learning curves are the first charts, then the images, then everything else by name. MLflow 3.17 shares views in this
    form, which is not documented: a wrong value can break the page, and the browser tests watch over it.

    Args:
        benchmarks: their names.
        images: names of the images that runs have, without what all begin with.
    """
    metrics = [
        f"eval/{AVERAGE}/rouge_l",
        *(f"eval/{name}/rouge_l" for name in benchmarks),
        "cost/tokens_per_second",
        "cost/peak_memory_gib",
        "cost/wall_seconds",
    ]
    params = [f"params.`{name}`" for name in ("method", "student", "train_seed")]
    scores = [f"metrics.`{name}`" for name in metrics]
    return json.dumps(
        {
            "selectedColumns": [*params, *scores],
            "columnOrder": ["attributes.`Run Name`", *params, *scores],
            "columnWidths": {
                "attributes.`Run Name`": 190,
                **dict.fromkeys(params, 100),
                params[1]: 200,
                **dict.fromkeys(scores, 160),
            },
            "orderByKey": scores[0],
            "orderByAsc": False,
            "runsHiddenMode": "SHOW_ALL",  # the charts of the compare view have every run, not the first ten
            "compareRunSections": [_section(_CURVES_SECTION, 2, 380), _section(IMAGES, 1, 720)],
            "compareRunCharts": [*map(_line_chart, CURVES), *map(_image_grid, images)],
            "isAccordionReordered": True,
        },
        separators=(",", ":"),
    )


def _section(name: str, columns: int, height: int) -> dict[str, Any]:
    shown = {"display": True, "isReordered": False, "deleted": False, "isGenerated": True}
    return {"uuid": name, "name": name, **shown, "columns": columns, "cardHeight": height}


def _line_chart(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": metric,
        "metricSectionId": _CURVES_SECTION,
        "metricKey": metric,
        "displayName": metric,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": True,
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _image_grid(name: str) -> dict[str, Any]:
    key = f"{IMAGES}/{name}"
    return {
        "type": "IMAGE",
        "uuid": key,
        "metricSectionId": IMAGES,
        "imageKeys": [key],
        "step": 0,
        "showRunParams": False,  # every setting of a run above its image leaves no room for the image
        "deleted": False,
        "isGenerated": True,
    }


def address(base: str, experiment: str, **query: str) -> str:
    """Where an experiment's runs are shown, in the UI's mode for trained models.

    Args:
        base: address of the server; empty for a link within the UI.
        experiment: its id.
        query: what else is asked of the page.
    """
    asked = [_MODE, *(f"{name}={value}" for name, value in query.items())]
    return f"{base}#/experiments/{experiment}/runs?" + "&".join(asked)


def description(experiment: Experiment, headline: str, table: str, notes: Sequence[str], links: Links) -> str:
    """The experiment's page in Markdown: what came out, the table, where to look next.

    Args:
        experiment: its settings.
        headline: the result in one sentence.
        table: scores in Markdown.
        notes: how to read them.
        links: within the UI.
    """
    files = f"#/experiments/{links.stages}/runs/{links.run}/artifacts/comparison"
    tables = [f"[{name}]({files}/generations_{name}.json?{_MODE})" for name in experiment.benchmarks]
    parts = [
        f"**{headline}**" if headline else "",  # first, as the UI folds the rest away
        experiment.description.strip(),
        # The UI's Markdown has no underline, and the marks are explained in the report alone.
        table.replace("<u>", "").replace("</u>", "").strip(),
        f"[Report]({files}/report.html?{_MODE}) (figures, tests, limits, provenance) · "
        f"[leaderboard]({address('', links.experiment, viewStateShareKey=VIEW)}) · "
        f"[learning curves and images]({address('', links.experiment, compareRunsMode='CHART', viewStateShareKey=VIEW)}) · "
        f"generations side by side: {', '.join(tables)}",
        "\n".join(f"- {note}" for note in notes),
    ]
    text = "\n\n".join(part for part in parts if part)
    if len(text) <= _TAG_LENGTH:
        return text
    return "\n\n".join(part for part in (parts[0], parts[3]) if part)[:_TAG_LENGTH]


def opening(client: Any, name: str | None) -> tuple[str, str, bool]:
    """Id and name of the experiment that the UI opens on, and whether it has the preset view.

    Args:
        client: of the store, an MlflowClient.
        name: the experiment; None takes the one that was compared last, or else the newest.

    Raises:
        ConfigError: there is none, or none of that name.
    """
    known = {found.name: found for found in client.search_experiments() if found.name != "Default"}
    if name is not None and name not in known:
        raise ConfigError(
            f"--experiment: {name!r} is not in this store; give one of those that are: {', '.join(known) or 'none yet'}"
        )
    if not known:
        raise ConfigError("the store has no experiment yet; run `distilllens reproduce CONFIG` first")
    chosen = known[name] if name is not None else max(known.values(), key=_finished_last)
    return str(chosen.experiment_id), str(chosen.name), VIEW_TAG in chosen.tags


def _finished_last(experiment: Any) -> tuple[float, int]:
    return float(experiment.tags.get(FINISHED, 0)), int(experiment.creation_time or 0)
