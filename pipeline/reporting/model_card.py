"""The card of an exported model: Markdown with the front matter of the Hugging Face hub, written from the facts of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

TITLE, ARXIV = "DistillLens: Symmetric Knowledge Distillation Through Logit Lens", "2602.13567"
_HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-sa-3.0")
"""Identifiers below that the hub knows; it takes any other as `other` with a name."""


@dataclass(frozen=True)
class Licence:
    """Under which terms an input may be used.

    Attributes:
        text: for people.
        identifier: as the hub names it, None where it is not known.
    """

    text: str
    identifier: str | None = None


APACHE, MIT, CC0 = Licence("Apache 2.0", "apache-2.0"), Licence("MIT", "mit"), Licence("CC0 1.0", "cc0-1.0")
UNKNOWN = Licence("not known: look it up before you publish")
UNKNOWN_LOCAL = Licence("not known: a local file; check it")
_BY_SA = Licence("CC BY-SA 3.0", "cc-by-sa-3.0")
_DOLLY = Licence(
    "CC BY-SA 3.0, that of databricks-dolly-15k, where its rows come from (its own card says Apache 2.0)", "cc-by-sa-3.0"
)
_BY_CARD = Licence("Apache 2.0 by its card", "apache-2.0")
LICENCES: Mapping[str, Licence] = {
    "HuggingFaceTB/SmolLM2-135M": APACHE,
    "HuggingFaceTB/SmolLM2-135M-Instruct": APACHE,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": APACHE,
    "gpt2": MIT,
    "gpt2-medium": MIT,
    "openai-community/gpt2": MIT,
    "openai-community/gpt2-medium": MIT,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": APACHE,
    "Qwen/Qwen2.5-1.5B": APACHE,
    "Qwen/Qwen2.5-3B": Licence("Qwen Research License (not for commercial use)", "qwen-research"),
    "MiniLLM/teacher-gpt2-1.5B": Licence("Apache 2.0 by its card; made from GPT-2 XL (MIT) and Dolly rows", "apache-2.0"),
    "databricks/databricks-dolly-15k": _BY_SA,
    "MiniLLM/dolly": _DOLLY,
    "MiniLLM/dolly-processed": _DOLLY,
    "MiniLLM/self-inst": _BY_CARD,
    "MiniLLM/Vicuna": _BY_CARD,
    "MiniLLM/uinst": _BY_CARD,
}
"""Hub repository → its licence, as far as it was looked up."""

OBJECTIVES = {
    "sft": "Cross-entropy on the reference responses; no teacher.",
    "kd": "Forward KL divergence, KL(teacher ‖ student), on the final logits.",
    "rkl": "Reverse KL divergence, KL(student ‖ teacher), on the final logits.",
    "fkl_rkl": "The sum of forward and reverse KL divergence on the final logits.",
    "jsd": "Jensen–Shannon divergence on the final logits.",
    "akl": "Adaptive KL divergence on the final logits.",
    "seqkd": "Sequence-level distillation: cross-entropy on responses that the teacher wrote to the training prompts.",
    "mse": "A divergence on the final logits, and the mean squared error of hidden states through a learned projection.",
    "distilllens": (
        "A divergence on the final logits, and a divergence between what teacher and student would say at mapped intermediate "
        f"layers, each read through the model's own output head (logit lens; DistillLens, arXiv {ARXIV})."
    ),
}
"""Kind of method → what it adds to cross-entropy, or does instead."""


@dataclass(frozen=True)
class Input:
    """Something that the model or its scores were made from.

    Attributes:
        role: what it served as.
        name: short name.
        origin: where it comes from.
        kind: model or dataset.
        licence: its terms.
        repo: hub repository, None for anything that is not on the hub.
        in_weights: whether the weights depend on it; test rows are not part of them.
    """

    role: str
    name: str
    origin: str
    kind: Literal["model", "dataset"]
    licence: Licence
    repo: str | None = None
    in_weights: bool = True

    @property
    def described(self) -> str:
        """Name and origin."""
        return f"{self.name} ({self.origin})"


@dataclass(frozen=True)
class Score:
    """The exported model on one benchmark under one protocol.

    Attributes:
        benchmark: its name.
        source: what its rows are.
        rows: prompts.
        rouge_l, exact_match: means over prompts and decoding seeds, 0–100.
        deviation: standard deviation of ROUGE-L over decoding seeds, None for a single one.
        interval: 95 % bootstrap interval of ROUGE-L over prompts.
        protocol: what the scores depend on besides the model.
        protocol_hash: 16 hex digits of it.
        others: ROUGE-L of other models under the same protocol.
    """

    benchmark: str
    source: Input
    rows: int
    rouge_l: float
    exact_match: float
    deviation: float | None
    interval: tuple[float, float]
    protocol: Mapping[str, Any]
    protocol_hash: str
    others: Mapping[str, float]


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        fingerprint: of the training.
        method: kind of the method.
        seed: training seed.
        settings: every setting of the training, by dotted path.
        counts: what the training counted, see `pipeline.training.loop.Summary`.
        student: how the untrained student was made, a sentence.
        parameters: of the model.
        inputs: models and rows that went into the weights.
        rows: role of an input → counts of its rows.
        encoding: how rows became prompts.
        example: a prompt as the model was trained on it.
        scores: of this checkpoint.
        provenance: fingerprints and versions.
    """

    fingerprint: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    counts: Mapping[str, Any]
    student: str
    parameters: int
    inputs: tuple[Input, ...]
    rows: Mapping[str, Mapping[str, Any]]
    encoding: Mapping[str, Any]
    example: str
    scores: tuple[Score, ...]
    provenance: Mapping[str, str]

    def served(self, role: str) -> Input | None:
        """The input with a role."""
        return next((item for item in self.inputs if item.role == role), None)


def model_card(facts: CardFacts) -> str:
    """The whole card, front matter included."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {_title(facts)}\n\n{_introduction(facts)}",
        f"## Use\n\n{_use(facts)}",
        f"## Scores\n\n{_scores(facts.scores)}",
        f"## Method and settings\n\n{_method(facts)}",
        f"## Data\n\n{_data(facts)}",
        f"## Limits\n\n{_bullets(_limits(facts))}",
        f"## Licences\n\n{_licences(facts)}",
        f"## Citation\n\n{_CITATION}",
        f"## Provenance\n\n{_table(('what', 'value'), facts.provenance.items())}",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The metadata that the hub reads: a licence of its own only where all inputs have the same."""
    found = {item.licence.identifier for item in facts.inputs if item.in_weights}
    licence = found.pop() if len(found) == 1 else None
    if licence in _HUB_LICENCES:
        terms = {"license": licence}
    else:
        terms = {"license": "other", "license_name": licence or "not-decided"}
    bases = [item.repo for item in facts.inputs if item.role == STUDENT and item.repo]
    datasets = [item.repo for item in facts.inputs if item.kind == "dataset" and item.in_weights and item.repo]
    lists = {"base_model": bases, "datasets": datasets, "metrics": ["rouge", "exact_match"] if facts.scores else []}
    return {
        **terms,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **{name: list(dict.fromkeys(values)) for name, values in lists.items() if values},
        "tags": ["knowledge-distillation", facts.method],
        **({"model-index": [_index(facts)]} if facts.scores else {}),
    }


STUDENT, TEACHER = "student before training", "teacher"
TRAINING_ROWS, DEV_ROWS = "training rows", "dev rows"
"""Roles of inputs."""

_CITATION = f"""The method, if this checkpoint was trained by it or compared with it:

```bibtex
@misc{{distilllens,
  title         = {{{TITLE}}},
  year          = {{2026}},
  eprint        = {{{ARXIV}}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/{ARXIV}}}
}}
```"""


def _index(facts: CardFacts) -> dict[str, Any]:
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": score.benchmark, "type": score.source.repo or score.benchmark},
            "metrics": [
                {"type": "rouge", "name": "ROUGE-L", "value": round(score.rouge_l, 2)},
                {"type": "exact_match", "name": "exact match", "value": round(score.exact_match, 2)},
            ],
        }
        for score in facts.scores
    ]
    return {"name": _title(facts), "results": results}


def _title(facts: CardFacts) -> str:
    start = facts.served(STUDENT)
    return " · ".join([*([start.name] if start else []), facts.method, f"seed {facts.seed}"])


def _introduction(facts: CardFacts) -> str:
    teacher = facts.served(TEACHER)
    taught = f"with {teacher.name} as its teacher" if teacher else "without a teacher"
    return (
        f"A causal language model of {facts.parameters:,} parameters, trained by `{facts.method}` {taught}, for instructions "
        f"in the form below. {facts.student} This card was generated from the records of its runs."
    )


def _use(facts: CardFacts) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
prompt = {facts.example!r}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens={not str(facts.encoding["template"]).startswith("chat")})
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The prompt's form (`{facts.encoding["template"]}`) is the one of training; others were not measured."""


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return "No evaluation of this checkpoint was found; run `distilllens reproduce` and export again."
    others = list(dict.fromkeys(name for score in scores for name in score.others))
    head = ("benchmark", "prompts", "ROUGE-L", "95 % interval", "± decoding seeds", "exact match", *others)
    rows = [
        (
            _benchmark(score, scores),
            score.rows,
            f"{score.rouge_l:.2f}",
            f"{score.interval[0]:.2f} to {score.interval[1]:.2f}",
            "one seed" if score.deviation is None else f"{score.deviation:.2f}",
            f"{score.exact_match:.2f}",
            *(f"{score.others[name]:.2f}" if name in score.others else "–" for name in others),
        )
        for score in scores
    ]
    protocols: dict[str, list[str]] = {}
    for score in scores:
        protocols.setdefault(_protocol(score.protocol), []).append(f"{score.benchmark} (`{score.protocol_hash}`)")
    notes = [
        "ROUGE-L F and exact match, 0–100, means over prompts and decoding seeds.",
        "The interval is a 95 % percentile bootstrap over prompts of the means over decoding seeds: it covers other prompts of "
        "the same kind, not another training seed, and with few prompts it is somewhat too narrow.",
        *([f"Columns {' and '.join(others)}: ROUGE-L of those models under the same protocol."] if others else []),
        *(f"Protocol of {', '.join(names)}: {text}." for text, names in protocols.items()),
    ]
    return f"{_table(head, rows)}\n\n{_bullets(notes)}"


def _benchmark(score: Score, scores: Sequence[Score]) -> str:
    """Its name, with the protocol where the same benchmark was scored under several."""
    several = [other.benchmark for other in scores].count(score.benchmark) > 1
    return f"{score.benchmark} `{score.protocol_hash}`" if several else score.benchmark


def _protocol(protocol: Mapping[str, Any]) -> str:
    decoding = protocol["decoding"]
    sampled = f"sampled at temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    blocked = decoding["no_repeat_ngram_size"]
    parts = [
        sampled if decoding["do_sample"] else "decoded greedily",
        *([f"no repeated {blocked}-grams"] if blocked else []),
        f"at most {decoding['max_new_tokens']} new tokens",
        f"decoding seeds {', '.join(map(str, protocol['seeds']))}",
        f"template {protocol['template']}",
        f"prompts over {protocol['max_prompt_tokens']} tokens: {str(protocol['overlong']).replace('_', ' ')}",
        *(f"{key}: {_plain(protocol[key])}" for key in ("filter", "sample") if protocol.get(key) is not None),
        f"engine {protocol['engine']}",
    ]
    return ", ".join(parts)


def _method(facts: CardFacts) -> str:
    counts, settings = facts.counts, facts.settings
    best = f", selected on dev rows ({settings['validation.select']})" if counts.get("best_value") is not None else ""
    rate = counts.get("learning_rate", settings["training.learning_rate"])  # a search says which one it kept
    result = (
        f"{counts['steps']} optimiser steps over {counts['tokens']:,} input tokens at a peak learning rate of {_plain(rate)}; "
        f"the weights kept are those of step {counts['best_step']}{best}."
    )
    alpha = settings["alpha"]
    mixed = f" Mixed as (1 − α) · cross-entropy on the references + α · that, α = {alpha:g}." if alpha else ""
    table = _table(("setting", "value"), [(f"`{name}`", _plain(value)) for name, value in settings.items()])
    return f"{OBJECTIVES[facts.method]}{mixed}\n\n{result}\n\n{table}"


def _data(facts: CardFacts) -> str:
    lines = [
        f"{item.role}: {item.described}; {counts['kept']} of {counts['rows']} rows kept, {counts['tokens']:,} tokens, "
        f"{counts['response_tokens']:,} of them in responses"
        for item in facts.inputs
        if (counts := facts.rows.get(item.role)) is not None
    ]
    encoding = _table(("encoding", "value"), [(name, _plain(value)) for name, value in facts.encoding.items()])
    return f"{_bullets(lines or ['not known: the prepared rows are not in the run directory'])}\n\n{encoding}"


def _limits(facts: CardFacts) -> Iterator[str]:
    yield f"One training run (seed {facts.seed}): how much another seed would change it is not part of these figures."
    if facts.scores:
        fewest = min(facts.scores, key=lambda score: score.rows)
        yield f"The smallest test set ({fewest.benchmark}) has {fewest.rows} prompts; read the intervals, not the means alone."
    yield (
        "ROUGE-L measures overlap of words with references. Whether answers are true, safe, unbiased or good in other "
        "languages or tasks was not measured."
    )
    yield "It imitates its training responses, and its teacher where it had one, faults included."
    yield (
        f"Trained on prompts of at most {facts.encoding['max_prompt_tokens']} tokens and rows of at most "
        f"{facts.encoding['max_tokens']}; longer ones are untested."
    )


def _licences(facts: CardFacts) -> str:
    inputs = [*facts.inputs, *dict.fromkeys(score.source for score in facts.scores)]
    table = _table(("input", "what", "licence"), [(item.role, item.described, item.licence.text) for item in inputs])
    terms = front_matter(facts)
    decided = (
        f"All inputs of the weights have the licence `{terms['license']}`, which this card therefore names."
        if terms["license"] != "other"
        else "The inputs of the weights differ in their licences, or some are not known: choose terms that all of them allow, "
        "and set `license` above, before you publish this model."
    )
    return f"{table}\n\n{decided} The test rows are not part of the weights."


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value == "None":  # a type of autocast is recorded by its name
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bullets(lines: Sequence[str] | Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
