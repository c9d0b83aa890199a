"""The tables of docs/scale.md: `python -m pipeline.scale [FILE]` prints them, or writes them anew into FILE."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.artifacts import write_text_atomically
from pipeline.losses.fused import default_chunk_tokens
from pipeline.scale.cases import A100, CASES, H100, HERE
from pipeline.scale.costs import (
    capture_seconds,
    costs,
    objective_seconds,
    objective_traffic,
    read_bandwidth,
    step_seconds,
    student_seconds,
    teacher_seconds,
)
from pipeline.scale.limits import Strategy, choice, first_limit, limits, memory, recommended
from pipeline.scale.shapes import (
    DISTILLLENS,
    KD,
    SFT,
    Case,
    Machine,
    cache_bytes,
    forward_flops,
    full_logits_bytes,
    objective_flops,
    parameters,
    training_flops,
)

_HOUR = 3600.0
_WALL = 24 * _HOUR
_EXPERIMENTS = ((1, 2), (3, 2), (9, 2), (3, 10))
"""(runs with a teacher, epochs) of the decision table."""


def tables(cases: Sequence[Case] = CASES, machines: Sequence[Machine] = (A100, H100)) -> dict[str, str]:
    """The tables of docs/scale.md in Markdown, by the names of their markers."""
    return {
        "rates": _rates((HERE, *machines)),
        "sizes": _sizes(cases),
        "hours": _hours(cases, machines),
        "objective": _objective(cases, machines),
        "memory": _memory(cases),
        "limits": _limits(cases, machines),
        "decision": _decision(cases, machines),
    }


def filled(text: str, contents: Mapping[str, str]) -> str:
    """A document with its tables written anew, each between `<!-- table:NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: a table has no markers, or markers have no table.
    """
    marked = re.findall(r"<!-- table:(\w+) -->", text)
    if sorted(marked) != sorted(contents):
        raise ValueError(f"the document has markers for {sorted(marked)}, the tables are {sorted(contents)}")
    return re.sub(
        r"<!-- table:(\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- table:{found[1]} -->\n{contents[found[1]]}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def _rates(machines: Sequence[Machine]) -> str:
    lines: list[tuple[str, Iterable[str]]] = [
        ("products in blocks", (_si(each.body_flops, "FLOP/s") for each in machines)),
        ("the same in a capture (float32)", (_si(each.float32_flops, "FLOP/s") for each in machines)),
        ("products with a head", (_si(each.lens_flops, "FLOP/s") for each in machines)),
        ("divergence without products", (_si(each.entries, "entries/s") for each in machines)),
        ("elementwise, activations", (_si(each.activation_bandwidth, "B/s") for each in machines)),
        ("elementwise, beyond caches", (_si(each.memory_bandwidth, "B/s") for each in machines)),
        ("disk, read", (_si(each.disk_read, "B/s") for each in machines)),
        ("disk, write", (_si(each.disk_write, "B/s") for each in machines)),
    ]
    return _table(["", *(each.name for each in machines)], [[name, *cells] for name, cells in lines])


def _sizes(cases: Sequence[Case]) -> str:
    def column(case: Case) -> list[str]:
        work = case.workload
        tokens, response = work.rows * work.tokens, work.rows * work.response_tokens
        body = training_flops(case.student, tokens, work.tokens)
        objective = response * objective_flops(case.student, case.teacher, DISTILLLENS)
        int8 = replace(case, workload=replace(work, dtype="int8"))
        flops = (forward_flops(case.teacher, tokens, work.tokens), body, objective)
        held = (cache_bytes(case), cache_bytes(int8), full_logits_bytes(case))
        return [
            *(f"{parameters(shape):,}" for shape in (case.teacher, case.student)),
            *(_si(count, "FLOP") for count in flops),
            *(_si(count, "B") for count in held),
        ]

    names = [
        "teacher, parameters", "student, parameters", "teacher, forward, an epoch", "student's blocks, an epoch",
        "DistillLens objective, an epoch", "cache, bfloat16, six layers", "cache, int8, six layers",
        "the final logits instead, two bytes each",
    ]  # fmt: skip
    columns = [column(case) for case in cases]
    return _table(["", *(case.name for case in cases)], [list(row) for row in zip(names, *columns, strict=True)])


def _hours(cases: Sequence[Case], machines: Sequence[Machine]) -> str:
    rows = []
    for case in cases:
        for machine in machines:
            found = costs(case, machine)
            runs = [student_seconds(case, method, machine, online=False) for method in (SFT, KD, DISTILLLENS)]
            everything = (found.online, found.capture + found.cached)
            spent = (found.capture, teacher_seconds(case, machine), *runs, *everything)
            rows.append([case.name, machine.name, *map(_in_hours, spent)])
    head = ["", "device", "capture", "teacher online, an epoch", "a run: sft", "kd", "distilllens", "all online", "all cached"]
    return _table(head, rows)


def _in_hours(seconds: float) -> str:
    hours = seconds / _HOUR
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def _objective(cases: Sequence[Case], machines: Sequence[Machine]) -> str:
    rows = []
    for case in cases:
        student, teacher, work = case.student, case.teacher, case.workload
        for machine in machines:
            products = objective_flops(student, teacher, DISTILLLENS) / machine.lens_flops
            moved = objective_traffic(student, teacher, DISTILLLENS, machine, 1.0) / machine.memory_bandwidth
            entries = DISTILLLENS.divergences * student.vocab / machine.entries
            response = work.batch * work.response_tokens
            whole = objective_seconds(student, teacher, DISTILLLENS, machine, response, work.micro_batches)
            share = whole / step_seconds(case, DISTILLLENS, machine, online=False)
            times = (f"{1e6 * part:.1f}" for part in (products, moved, entries))
            rows.append([case.name, machine.name, str(default_chunk_tokens(student.vocab)), *times, f"{share:.0%}"])
    head = ["µs per response token", "device", "rows of a chunk", "products", "heads moved", "entries", "share of a step"]
    return _table(head, rows)


def _memory(cases: Sequence[Case]) -> str:
    def cell(case: Case, strategy: Strategy, processes: int, *, online: bool) -> str:
        held = memory(case, DISTILLLENS, half=True, strategy=strategy, processes=processes, online=online)
        return f"{held.total / 1e9:.0f}"

    rows = []
    for case in cases:
        whole = memory(case, DISTILLLENS, half=True, online=False)
        parts = (whole.state, whole.gathered, whole.activations, whole.objective, whole.teacher)
        layouts: tuple[tuple[Strategy, int, bool], ...] = (
            ("ddp", 1, False), ("ddp", 1, True), ("fsdp", 8, False), ("fsdp", 8, True),
        )  # fmt: skip
        capture, of_parts = f"{4 * parameters(case.teacher) / 1e9:.0f}", (f"{part / 1e9:.1f}" for part in parts)
        totals = (cell(case, strategy, count, online=online) for strategy, count, online in layouts)
        rows.append([case.name, capture, *of_parts, *totals])
    head = ["GB per device", "capture", "state", "copies", "activations", "objective", "teacher's head"]
    sums = ("ddp, cached", "ddp, online", "fsdp × 8, cached", "fsdp × 8, online")
    return _table([*head, *(f"**{name}**" for name in sums)], rows)


def _limits(cases: Sequence[Case], machines: Sequence[Machine]) -> str:
    rows = []
    for case in cases:
        for machine in machines:
            for cached in (False, True):
                strategy, processes, workers = recommended(case, machine, _WALL, cached=cached)
                demand = limits(
                    case, machine, workers=workers or case.workload.students * processes, wall=_WALL, strategy=strategy,
                    processes=processes, cached=cached,
                )  # fmt: skip
                how = ("cache" if cached else "online", f"{strategy} × {processes}", str(workers or "none"))
                shares = (f"{each:.2f}" for each in demand.values())
                rows.append([case.name, machine.name, *how, *shares, first_limit(demand)])
    head = ["", "device", "teacher", "a run on", "devices", *demand, "first"]
    return _table(head, rows)


def _decision(cases: Sequence[Case], machines: Sequence[Machine]) -> str:
    rows = []
    for case in cases:
        once = replace(case, workload=replace(case.workload, epochs=1))
        for machine in machines:
            ratio = capture_seconds(case, machine) / teacher_seconds(case, machine)
            read = read_bandwidth(case, DISTILLLENS, machine)
            fed = (f"{supply / read:.0f}" for supply in (machine.disk_read, machine.network))
            chosen = (choice(case, machine, runs=runs, epochs=epochs) for runs, epochs in _EXPERIMENTS)
            pays = str(costs(once, machine).break_even)
            rows.append([case.name, machine.name, *chosen, pays, f"{ratio:.1f}", _si(read, "B/s"), *fed])
    experiments = (f"{runs} × {epochs}" for runs, epochs in _EXPERIMENTS)
    head = [
        "runs × epochs",
        "device",
        *experiments,
        "cache pays from",
        "capture / pass",
        "a run reads",
        "per disk",
        "per network",
    ]
    return _table(head, rows)


def _si(value: float, unit: str) -> str:
    """Three significant digits with an SI prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} Z{unit}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def main(arguments: list[str]) -> None:
    """Print the tables, or write them anew into the document that is given."""
    if arguments:
        path = Path(arguments[0])
        write_text_atomically(path, filled(path.read_text(encoding="utf-8"), tables()))
    else:
        print("\n\n".join(f"<!-- table:{name} -->\n{table}\n<!-- end -->" for name, table in tables().items()))


if __name__ == "__main__":
    main(sys.argv[1:])
