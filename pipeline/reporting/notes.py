"""What a report says in sentences: how to read its tables, and what the numbers cannot say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.reporting.evidence import Evidence
from pipeline.reporting.overlap import Overlap
from pipeline.reporting.record import DataRecord, Facts, TrialRecord

_FEW_SEEDS = 5


def reading_notes(facts: Facts) -> list[str]:
    """How to read the table: what the numbers are, what the deviations are over, what was equal."""
    protocols = list(dict.fromkeys(_decoding_text(own.protocol) for trial in facts.trials for own in trial.evaluations))
    how = protocols[0] if len(protocols) == 1 else "decoded by each benchmark's own protocol, stored with its scores"
    trained = [trial for trial in facts.trials if trial.training is not None]
    metrics = dict.fromkeys(f"{metric.name}: {metric.note}" for own in facts.experiments for metric in own.metrics)
    return [
        f"ROUGE-L F (0–100, higher is better), {how}; {_average_text(facts)}.",
        *([_seed_note(facts), _budget_note(facts)] if trained else []),
        *metrics,
        "teacher and untrained (the student before training) are there for orientation.",
        *_baseline_notes(facts),
        *(_origin_notes(facts) if facts.merged else []),
    ]


def mixing_warning(facts: Facts) -> str:
    """That scores of several protocols stand in one column; empty where none do."""
    parts = []
    for name in facts.mixed:
        rows: dict[str, dict[str, None]] = {}
        for trial in facts.trials:
            if name in trial.by_benchmark:
                rows.setdefault(trial.by_benchmark[name].protocol_hash, {})[trial.row] = None
        parts.append(f"{name} by " + " and ".join(f"{found} ({', '.join(own)})" for found, own in rows.items()))
    if not parts:
        return ""
    return (
        f"Protocols are mixed: {'; '.join(parts)}. Scores by different protocols, and averages over them, do not compare, "
        "although they stand in one column; nothing is tested across protocols."
    )


def limits(facts: Facts, found: Evidence) -> list[str]:
    """What the numbers cannot say: few seeds, references and responses that were cut, contaminated prompts."""
    said = [f"The methods are not compared prompt by prompt: {found.problem}."] if found.problem else []
    said += [text for text in (mixing_warning(facts),) if text]
    if found.left_out:
        reasons = "; ".join(f"{row} ({reason})" for row, reason in found.left_out.items())
        said.append(f"Not tested against {facts.baseline}, so neither bold nor underlined: {reasons}.")
    said += _coverage_limits(facts) if facts.merged else []
    said += _seed_limits(facts)
    said.append(
        f"{_prompts_text(facts)}: differences that are small against the intervals above stay unseen, and other prompts may "
        "order the methods otherwise."
    )
    said += _cut_limits(facts)
    said += _overlap_limits(facts)
    said.append("ROUGE-L counts words shared with references in order; it sees neither truth nor style.")
    return said


def _decoding_text(protocol: Mapping[str, Any]) -> str:
    decoding, count = protocol["decoding"], len(protocol["seeds"])
    how = (
        f"sampled at temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}, "
        f"{count} decoding seed{'s' if count != 1 else ''}"
        if decoding["do_sample"]
        else "decoded greedily"
    )
    engine = " by vLLM" if protocol["engine"] == "vllm" else ""
    return f"{how}, at most {decoding['max_new_tokens']} new tokens{engine}"


def _average_text(facts: Facts) -> str:
    if len(facts.common) == len(facts.protocols):
        return "avg is the mean over benchmarks"
    if not facts.common:
        return "there is no avg, as no benchmark is common to all rows"
    return f"avg is the mean over the benchmarks that every row has, {', '.join(facts.common)}"


def _seed_note(facts: Facts) -> str:
    counts = sorted(set(_seed_counts(facts).values()))
    if counts == [1]:
        return (
            "One training seed: the deviation beside a score is over decoding seeds of one checkpoint, "
            "which says nothing about the variance of training."
        )
    many = (
        f"{counts[0]} training seeds"
        if len(counts) == 1
        else f"a row's training seeds, of which it has {counts[0]} to {counts[-1]}"
    )
    return f"± is the standard deviation over {many}."


def _budget_note(facts: Facts) -> str:
    if not all(own.fair for own in facts.experiments):
        return "Methods have budgets of their own (fair: false); the report lists every setting in which they differ."
    budgets = dict.fromkeys(own.budget for own in facts.experiments)
    if len(budgets) > 1:
        each = "; ".join(f"{own.budget} ({own.label})" for own in facts.experiments)
        return f"Trained rows had the budget of their experiment: {each}; the report lists every setting in which they differ."
    trained = [trial.training for trial in facts.trials if trial.training is not None]
    order = ", on training data that differ" if len({own.data for own in trained}) > 1 else " and the same data order"
    others = dict.fromkeys(trial.row for trial in facts.trials if trial.training is not None and trial.training.own_batches)
    # Batches are made of rows of similar length, so other responses are batched otherwise.
    batched = f" ({', '.join(others)}: in batches by the lengths of the teacher's responses)" if others else ""
    return f"Every trained row had {next(iter(budgets))}{order}{batched}."


def _baseline_notes(facts: Facts) -> list[str]:
    if facts.missing_baseline is None:
        return []
    return [f"The baseline {facts.missing_baseline} has no finished trial; methods are compared with {facts.baseline} instead."]


def _origin_notes(facts: Facts) -> list[str]:
    """Where rows come from that several experiments have."""
    same: dict[str, list[str]] = {}
    notes = []
    for row, trials in facts.rows.items():
        origins = dict.fromkeys(facts.labels(trial.origins) for trial in trials)
        if len(origins) > 1:
            seeds = ", ".join(f"{trial.seed} ({facts.labels(trial.origins)})" for trial in trials)
            notes.append(f"{row} has training seeds of several experiments, with all else equal: {seeds}.")
        elif len(trials[0].origins) > 1:
            same.setdefault(next(iter(origins)), []).append(row)
    shared = [f"{', '.join(rows)} ({found})" for found, rows in same.items()]
    named = ", ".join(own.label for own in facts.experiments)
    return [
        f"From the experiments {named}; a row has their names where rows of one name differ.",
        *([f"The same trials by their fingerprints, shown once: {'; '.join(shared)}."] if shared else []),
        *notes,
    ]


def _coverage_limits(facts: Facts) -> list[str]:
    rows = facts.rows
    said = []
    for name in facts.protocols:
        if name not in facts.common:
            having = [row for row, trials in rows.items() if all(name in trial.by_benchmark for trial in trials)]
            said.append(f"Only {', '.join(having)} {'was' if len(having) == 1 else 'were'} evaluated on {name}")
    return [f"{text}; it is no part of the average, and not tested." for text in said]


def _prompts_text(facts: Facts) -> str:
    counts: dict[str, set[int]] = {}
    for trial in facts.trials:
        for own in trial.evaluations:
            counts.setdefault(own.benchmark, set()).add(0 if own.measured is None else own.measured.rows)
    named = ", ".join(f"{name} {_either(sorted(found))}" for name, found in counts.items())
    total = sum(max(found) for found in counts.values())
    return f"{'up to ' if any(len(found) > 1 for found in counts.values()) else ''}{total} prompts ({named})"


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))


def _seed_counts(facts: Facts) -> dict[str, int]:
    """Trained row → its training seeds."""
    return {row: len(trials) for row, trials in facts.rows.items() if trials[0].training is not None}


def _seed_limits(facts: Facts) -> list[str]:
    seeds = _seed_counts(facts)
    fewest = min(seeds.values(), default=_FEW_SEEDS)
    if fewest == 1:
        alone = [row for row, count in seeds.items() if count == 1]
        who = "every method" if len(alone) == len(seeds) else ", ".join(alone)
        return [
            f"One training seed for {who}: what is said holds for these checkpoints. How much a score changes when the same "
            "method is trained again is not measured."
        ]
    if fewest < _FEW_SEEDS:
        return [f"{fewest} training seeds: the deviation over them is itself uncertain, which widens the intervals."]
    return []


def _cut_limits(facts: Facts) -> list[str]:
    said = []
    for data in _used(facts):
        limit, counts, whose = data.max_tokens, data.counts, _whose(data, facts)
        if counts is None:
            said.append(f"Training responses{whose} are cut at {limit} tokens per row; how many were is not known here.")
        else:
            said.append(
                f"Truncated references{whose}: {counts.cut_response} of {counts.kept} training rows were cut at {limit} "
                f"tokens and have no end token; {counts.overlong_prompt} of {counts.rows} were left out for their long "
                "prompt. References of the benchmarks are scored whole."
            )
    lengths = sorted({own.protocol["decoding"]["max_new_tokens"] for trial in facts.trials for own in trial.evaluations})
    cut = {trial.name: _share_cut(trial) for trial in facts.trials}
    least, most = min(cut, key=lambda name: cut[name]), max(cut, key=lambda name: cut[name])
    shares = [f"{100 * cut[name]:.0f} %" for name in (least, most)]
    range_text = shares[0] if shares[0] == shares[1] else f"{shares[0]} ({least}) to {shares[1]} ({most})"
    said.append(
        f"Responses end at {_either(lengths)} new tokens: {range_text} of a model's responses were cut there and "
        "cannot match a longer reference."
    )
    return said


def _share_cut(trial: TrialRecord) -> float:
    return statistics.fmean(own.measured.share_cut for own in trial.evaluations if own.measured is not None)


def _used(facts: Facts) -> list[DataRecord]:
    """The data that something was trained on, in the order of the table."""
    known = {data.fingerprint: data for data in facts.data}
    used = dict.fromkeys(trial.training.data for trial in facts.trials if trial.training is not None)
    return [known[fingerprint] for fingerprint in used]


def _whose(data: DataRecord, facts: Facts) -> str:
    """The experiments that trained on it, where there are several data sets of several experiments."""
    if not facts.merged or len(_used(facts)) == 1:
        return ""
    users = [trial for trial in facts.trials if trial.training is not None and trial.training.data == data.fingerprint]
    return f" ({facts.labels([origin for trial in users for origin in trial.origins])})"


def _overlap_limits(facts: Facts) -> list[str]:
    found: dict[tuple[Overlap, str], None] = {}
    unknown: dict[str, None] = {}
    for data in _used(facts):
        users = [trial for trial in facts.trials if trial.training is not None and trial.training.data == data.fingerprint]
        asked = {own.prompts: own.benchmark for trial in users for own in trial.evaluations}
        for prompts, benchmark in asked.items():
            overlaps = data.overlaps.get(prompts)
            if overlaps is None:
                unknown[benchmark] = None
            else:
                found |= dict.fromkeys((one, _whose(data, facts)) for one in overlaps)
    said = [_overlap_text(one, whose) for one, whose in found if one.same_instruction]
    contaminated = {one.benchmark for one, _ in found if one.same_instruction}
    clean = [name for name in dict.fromkeys(one.benchmark for one, _ in found) if name not in contaminated]
    if clean:
        said.append(
            f"No prompt of {', '.join(clean)} occurs in the training or dev rows (instructions and whole prompts, case and "
            "white space aside); what the teacher or the student saw before is not known."
        )
    if unknown:
        names = ", ".join(unknown)
        said.append(f"Whether prompts of {names} occur in the training or dev rows was not checked: the rows are not here.")
    return said


def _overlap_text(one: Overlap, whose: str) -> str:
    named = "; ".join(f"“{text if len(text) <= 90 else text[:89] + '…'}”" for text in one.named)
    more = ", among them" if one.same_instruction > len(one.named) else ":"
    return (
        f"Contaminated prompts: of the {one.prompts} prompts of {one.benchmark}, {one.same_instruction} "
        f"{'has' if one.same_instruction == 1 else 'have'} an instruction that occurs in the {one.part} rows{whose} too, "
        f"{one.same_prompt} of them with the same input{more} {named}. They are scored like the others."
    )
