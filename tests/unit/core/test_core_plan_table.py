from __future__ import annotations

from pathlib import Path

import stages

from pipeline.estimate import plan_table


def test_estimated_generations_are_those_of_the_sampled_prompts(tmp_path: Path) -> None:
    names = list(stages.planned(tmp_path).experiment.benchmarks)
    few = [f"benchmarks.{name}.sample.rows=1" for name in names]
    for plan, rows in ((stages.planned(tmp_path), None), (stages.planned(tmp_path, *few), 1)):
        table = plan_table(plan)
        cells = {column.header: list(column.cells) for column in table.columns}
        tokens = next(values for header, values in cells.items() if "token" in str(header))
        evaluation = plan.trials[0].evaluations[0]
        prompts = rows or evaluation.benchmark.rows.count()
        expected = prompts * len(evaluation.seeds) * evaluation.decoding.max_new_tokens
        assert f"≤ {expected}" in {str(cell).replace(",", "") for cell in tokens}
