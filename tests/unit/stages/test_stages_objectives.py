"""Method settings become objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stages
from pydantic import TypeAdapter

from pipeline.config.methods import MethodConfig
from pipeline.errors import ConfigError
from pipeline.stages.objectives import Method, build_objective, layers_to_cache, planned_objective, reads_all_positions


def method(config: dict[str, Any], alpha: float = 1.0, pruned: bool = False) -> Method:
    parsed: Any = TypeAdapter(MethodConfig).validate_python(config)
    return Method("mine", parsed, alpha, 12, 48, pruned)


def lens(**settings: Any) -> dict[str, Any]:
    return {"kind": "distilllens", "lens": settings}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({"kind": "uniform", "count": 3}, ((3, 12), (6, 24), (9, 36))),
        ({"kind": "first", "count": 2}, ((1, 4), (2, 8))),
        ({"kind": "last", "count": 2}, ((10, 40), (11, 44))),
        ({"kind": "explicit", "pairs": [[2, 3]]}, ((2, 3),)),
    ],
)
def test_every_choice_of_pairs_reaches_both_terms(pairs: dict[str, Any], expected: tuple[tuple[int, int], ...]) -> None:
    for config in (lens(pairs=pairs), {"kind": "mse", "features": {"pairs": pairs}}):
        objective = planned_objective(method(config))
        assert objective is not None and objective.pairs == expected
        assert layers_to_cache(method(config)) == {48, *(teacher for _, teacher in expected)}


def test_every_lens_setting_reaches_the_term() -> None:
    config = lens(
        weight=0.5, divergence="jeffreys", pairs={"kind": "first", "count": 2}, final_norm=True, token_fraction=0.5,
        layer_weights=[1, 3],
    )  # fmt: skip
    objective = planned_objective(method({**config, "task": "forward_kl"}, alpha=0.7))
    assert objective is not None and objective.lens is not None
    assert (objective.alpha, objective.task) == (0.7, "forward_kl")
    term = objective.lens
    assert (term.weight, term.divergence, term.final_norm, term.mask_layout) == (0.5, "jeffreys", True, "aligned")
    assert (term.token_fraction, term.layer_weights) == (0.5, (1.0, 3.0))


@pytest.mark.parametrize(
    ("kind", "task"),
    [("kd", "forward_kl"), ("rkl", "reverse_kl"), ("fkl_rkl", "fkl_rkl"), ("jsd", "jensen_shannon"), ("akl", "adaptive_kl")],
)
def test_the_task_divergence_of_each_baseline(kind: str, task: str) -> None:
    objective = planned_objective(method({"kind": kind}))
    assert objective is not None and (objective.task, objective.lens, objective.features) == (task, None, None)


def test_provenance_waits_for_the_student() -> None:
    config = lens(pairs={"kind": "provenance", "count": 1})
    assert planned_objective(method(config, pruned=True)) is None
    origin = [0, 1, 2, 3, 4, 5, 42, 43, 44, 45, 46, 47, 48]
    assert build_objective(method(config, pruned=True), origin).pairs == ((6, 42),)
    assert layers_to_cache(method(config, pruned=True)) == {6, 42, 48}
    with pytest.raises(ConfigError, match="methods.mine: provenance pairs need a pruned student"):
        planned_objective(method(config))


def test_what_no_cache_holds() -> None:
    assert reads_all_positions(method(lens(mask_layout="official")).config)
    assert reads_all_positions(method({"kind": "mse", "features": {"positions": "all"}}).config)
    assert not reads_all_positions(method(lens()).config) and not reads_all_positions(method({"kind": "kd"}).config)


def test_rows_of_a_pass_are_part_of_a_run_only_where_they_change_its_result(tmp_path: Path) -> None:
    def fingerprint(layout: str, rows: int) -> str:
        overrides = (f"methods.distilllens.lens.mask_layout={layout}", f"train.micro_batch_size={rows}")
        return stages.training(stages.planned(tmp_path, *overrides), "distilllens").place.fingerprint

    assert fingerprint("aligned", 1) == fingerprint("aligned", 2)
    assert fingerprint("official", 1) != fingerprint("official", 2)
