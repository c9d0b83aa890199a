"""The methods: which terms of the objective each one uses, with its source.

L = (1 − α)·CE + α·[ D_task + λ·mean_pairs D_lens + w·MSE_features ]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError, model_validator

from pipeline.config.base import Seeds, Strict
from pipeline.config.models import EncoderRef

TaskDivergence = Literal["forward_kl", "reverse_kl", "fkl_rkl", "jensen_shannon", "adaptive_kl", "jeffreys"]
Schedule = Literal["cosine", "linear", "constant"]
Alpha = Annotated[float, Field(ge=0, le=1)]
_POSITIVE: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])


def _learning_rates(value: Any) -> float | list[float]:
    """One positive number or several; a list of one is that one, so that both have the same fingerprint."""
    found = value if isinstance(value, list) else [value]
    try:
        rates = [_POSITIVE.validate_python(item) for item in found]
    except ValidationError:
        raise ValueError("must be a number above 0, or a list of them") from None
    if not rates or len(set(rates)) != len(rates):
        raise ValueError("give at least one learning rate, each once")
    return rates if len(rates) > 1 else rates[0]


LearningRate = Annotated[float | list[float], PlainValidator(_learning_rates)]


class Decoding(Strict):
    """A decoding protocol; stored with every score."""

    max_new_tokens: int = Field(default=256, ge=1)
    do_sample: bool = True
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    no_repeat_ngram_size: int = Field(default=0, ge=0)


class UniformPairs(Strict):
    """Evenly spaced student layers, teacher layer by l' = round(l·L_T/L_S)."""

    kind: Literal["uniform"] = "uniform"
    count: int = Field(default=5, ge=1)


class ExplicitPairs(Strict):
    """Pairs [student layer, teacher layer], counted from 0 (the embeddings)."""

    kind: Literal["explicit"]
    pairs: list[tuple[int, int]] = Field(min_length=1)


class ProvenancePairs(Strict):
    """A pruned student's layer with the teacher layer that it was copied from, evenly spaced."""

    kind: Literal["provenance"]
    count: int = Field(default=5, ge=1)


class FirstPairs(Strict):
    """The student's first layers, 1 … count, teacher by l' = round(l·L_T/L_S)."""

    kind: Literal["first"]
    count: int = Field(default=5, ge=1)


class LastPairs(Strict):
    """The intermediate student layers next to the output, L_S − count … L_S − 1, teacher by l' = round(l·L_T/L_S)."""

    kind: Literal["last"]
    count: int = Field(default=5, ge=1)


Pairs = Annotated[UniformPairs | ExplicitPairs | ProvenancePairs | FirstPairs | LastPairs, Field(discriminator="kind")]


class Lens(Strict):
    """The lens term."""

    weight: float = Field(default=1.0, ge=0)
    """λ; the paper's is 1."""
    divergence: TaskDivergence = "jensen_shannon"
    pairs: Pairs = UniformPairs()
    final_norm: bool = False
    """Apply each model's final norm to intermediate states before the head (hazard 2); the paper does not."""
    mask_layout: Literal["aligned", "official"] = "aligned"
    """`official` reproduces the published code's mask tiling at batch > 1 (hazard 1)."""
    token_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the response positions that each pair compares, drawn anew every step; below 1 the lens term and its gradient
    are unbiased estimates at a fraction of the cost, with a variance that the README's table shows."""
    layer_weights: list[Annotated[float, Field(ge=0)]] | None = None
    """Relative weight of each pair, in the pairs' order; scaled to mean 1, so that λ keeps its meaning. null: all alike."""

    @model_validator(mode="after")
    def _official_compares_all(self) -> Lens:
        if self.token_fraction < 1 and self.mask_layout == "official":
            raise ValueError(
                f"token_fraction {self.token_fraction} goes with mask_layout aligned only: the published code compares every "
                "position; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_weight_per_pair(self) -> Lens:
        if self.layer_weights is None:
            return self
        count = len(self.pairs.pairs) if isinstance(self.pairs, ExplicitPairs) else self.pairs.count
        if len(self.layer_weights) != count:
            raise ValueError(f"layer_weights has {len(self.layer_weights)} values for {count} pairs; give one for each")
        if not any(self.layer_weights):
            raise ValueError("layer_weights are all 0, so nothing would be compared; give at least one a positive weight")
        return self


class Features(Strict):
    """The feature-matching term: mean squared error of hidden states through a learned projection."""

    weight: float = Field(default=1.0, ge=0)
    pairs: Pairs = UniformPairs()
    projection: Literal["teacher", "student"] = "teacher"
    """Which side goes through the projection; the published code projects the teacher's states."""
    positions: Literal["response", "all"] = "response"
    """`all` reproduces the published code: prompt and padding count too (hazard 3)."""


class TrainOverride(Strict):
    """A method's own budget, with `fair: false` only; what is null is that of `train`."""

    epochs: float | None = Field(default=None, gt=0, le=1e6)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    learning_rate: LearningRate | None = None
    min_learning_rate: float | None = Field(default=None, ge=0)
    schedule: Schedule | None = None
    warmup_steps: int | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)


class OnPolicy(Strict):
    """Steps on the student's own samples instead of the references (GKD, Agarwal et al. 2024); needs the teacher online."""

    fraction: float = Field(gt=0, le=1)
    """Probability of a step to be one of them."""
    decoding: Decoding = Decoding()
    """How the student is sampled; prompt and response together have at most data.max_tokens."""


class Sft(Strict):
    """Supervised fine-tuning on the reference responses: cross-entropy, no teacher."""

    kind: Literal["sft"]
    train: TrainOverride | None = None


class Kd(Strict):
    """Word-level KD, forward KL on the final logits (Hinton et al. 2015)."""

    kind: Literal["kd"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None


class Rkl(Strict):
    """Reverse KL on the final logits (Gu et al. 2024, MiniLLM's divergence on fixed data)."""

    kind: Literal["rkl"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None


class FklRkl(Strict):
    """Forward plus reverse KL."""

    kind: Literal["fkl_rkl"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None


class Jsd(Strict):
    """Jensen–Shannon divergence on the final logits (Agarwal et al. 2024)."""

    kind: Literal["jsd"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None


class Akl(Strict):
    """Adaptive KL (Wu et al. 2024)."""

    kind: Literal["akl"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None


class SeqGeneration(Strict):
    """How the teacher writes the responses of sequence-level KD."""

    decoding: Decoding = Decoding()
    seed: int = Field(default=10, ge=0)
    batch_size: int = Field(default=32, ge=1)
    """Prompts decoded together. Changes memory and speed, not the responses."""


class SeqKd(Strict):
    """Sequence-level KD: cross-entropy on responses that the teacher wrote to the training prompts (Kim & Rush 2016, §3.2)."""

    kind: Literal["seqkd"]
    train: TrainOverride | None = None
    generation: SeqGeneration = SeqGeneration()


class Mse(Strict):
    """Feature matching beside a divergence on the final logits."""

    kind: Literal["mse"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None
    task: TaskDivergence = "forward_kl"
    features: Features = Features()


class DistillLens(Strict):
    """Reverse KL on the final logits and JSD between lens distributions (arXiv 2602.13567)."""

    kind: Literal["distilllens"]
    alpha: Alpha | None = None
    train: TrainOverride | None = None
    on_policy: OnPolicy | None = None
    task: TaskDivergence = "reverse_kl"
    lens: Lens = Lens()


MethodConfig = Annotated[Sft | Kd | Rkl | FklRkl | Jsd | Akl | SeqKd | Mse | DistillLens, Field(discriminator="kind")]
METHOD_KINDS = ("sft", "kd", "rkl", "fkl_rkl", "jsd", "akl", "seqkd", "mse", "distilllens")
TASK_OF_KIND: dict[str, str] = {
    "kd": "forward_kl",
    "rkl": "reverse_kl",
    "fkl_rkl": "fkl_rkl",
    "jsd": "jensen_shannon",
    "akl": "adaptive_kl",
}


class Lora(Strict):
    """Train low-rank adapters of the blocks' linear layers, everything else frozen (Hu et al. 2022)."""

    rank: int = Field(default=16, ge=1, le=65_536)
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the adapter's scale alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of linear layers in the blocks, or all of them; never embeddings, final norm or head."""
    save_merged: bool = False
    """Save a whole checkpoint beside the adapter, with the adapter added to its weights."""


class Launch(Strict):
    """How many processes of this machine train together, and how they share the model. Changes speed and memory only."""

    processes: int = Field(default=1, ge=1, le=1024)
    """One for each device, or several on the CPU; every optimiser step's rows are divided among them."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp: each has the whole model. fsdp (FSDP2): parameters, gradients and optimiser state are divided among them.
    deepspeed: ZeRO-2 or ZeRO-3, as its configuration says; needs the package."""
    config: Path | None = None
    """fsdp: the file that `accelerate config` writes, for its options. deepspeed: DeepSpeed's JSON file."""

    @model_validator(mode="after")
    def _config_is_read(self) -> Launch:
        if self.config is not None and self.strategy == "ddp":
            raise ValueError(
                f"config {self.config} is for fsdp or deepspeed, but strategy is ddp; remove it, or set the strategy"
            )
        return self


class Training(Strict):
    """One budget for every method."""

    seeds: Seeds = [10]
    """Training seeds: data order, dropout and projection initialisation."""
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; exactly one of epochs and max_steps is given."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of one optimiser step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward pass; null takes the whole batch. Changes memory, not mathematics, `mask_layout: official` apart."""
    learning_rate: LearningRate = 5e-5
    """The peak. A list is a search: every method is trained with each, and validation keeps its best."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    lora: Lora | None = None
    """null trains every parameter."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Optimiser steps between resumable checkpoints."""
    elementwise: Literal["eager", "compiled"] = "eager"
    """How the losses' elementwise work runs. `compiled` needs a C++ compiler (Triton on CUDA), takes seconds once, and falls
    back to eager without; the values are the same."""
    gradient_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them: less memory, a third more time."""
    halve_micro_batch_on_oom: bool = False
    """Out of memory in a forward or backward pass, do that step again, and the rest of the run, with half the rows a pass:
    the same mathematics. Once in a run, in one process, and not where a result depends on which rows share a pass
    (`mask_layout: official`, `features.positions: all`); otherwise training ends with the step and its rows."""
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _one_budget(self) -> Training:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs and max_steps")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}; lower it")
        if self.min_learning_rate > min(self.learning_rates):
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {min(self.learning_rates)}; lower it"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeats a seed; give each once")
        return self

    @model_validator(mode="after")
    def _processes_share_a_step(self) -> Training:
        launch = self.launch
        if launch.processes > self.batch_size:
            raise ValueError(
                f"launch.processes {launch.processes} is larger than batch_size {self.batch_size}, so some would have no rows; "
                "lower it"
            )
        if launch.processes > 1 and self.halve_micro_batch_on_oom:
            raise ValueError(
                f"halve_micro_batch_on_oom is for one process, not launch.processes {launch.processes}: the others would wait "
                "in vain; lower micro_batch_size instead"
            )
        if launch.processes > 1 and launch.strategy != "ddp" and self.lora is not None:
            raise ValueError(
                f"launch.strategy {launch.strategy} trains every parameter, not adapters; set it to ddp, or remove lora"
            )
        return self

    @property
    def learning_rates(self) -> list[float]:
        """Every learning rate that is tried."""
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]

    def overridden(self, own: TrainOverride | None) -> Training:
        """This budget with a method's own settings; epochs and max_steps replace each other.

        Raises:
            ValidationError: the settings do not fit together.
        """
        if own is None:
            return self
        changes = own.model_dump(exclude_none=True)
        budget = {"epochs", "max_steps"} if {"epochs", "max_steps"} & changes.keys() else set()
        if self.micro_batch_size is not None and own.batch_size is not None:
            changes["micro_batch_size"] = min(self.micro_batch_size, own.batch_size)
        return Training.model_validate({**self.model_dump(exclude=budget), **changes})


class Validation(Strict):
    """Choosing the best checkpoint on the dev rows."""

    every_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between validations; null validates at the end of each epoch, and always after the last step."""
    rows: int | None = Field(default=None, ge=1)
    """Dev rows used; null takes all."""
    select: Literal["rouge_l", "loss", "last"] = "rouge_l"
    """Keep the checkpoint with the highest dev ROUGE-L, the lowest dev loss, or simply the last."""
    decoding: Decoding = Decoding(max_new_tokens=256)
    seed: int = Field(default=10, ge=0)
    batch_size: int = Field(default=32, ge=1)


class LensProfile(Strict):
    """Every student against the teacher at the mapped layers of the first method with a lens (else five evenly spaced)."""

    rows: int | None = Field(default=64, ge=1)
    """Dev rows; null takes all."""
    batch_size: int = Field(default=8, ge=1)


def _switch(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class JudgeMetric(Strict):
    """Mean rating, 1–10, by a language model behind an OpenAI-compatible endpoint; its cost is limited by both budgets."""

    base_url: str = Field(pattern=r"^https?://[^@?\s]+$")
    """Up to, not including, /chat/completions."""
    model: str = Field(min_length=1)
    max_requests: int = Field(ge=1)
    """Most requests of the run directory's judgements together, retries included; also those of earlier runs count."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens by the endpoint's own count; null sets no limit."""
    api_key_variable: str | None = None
    """Environment variable that holds the key; null for endpoints without one."""
    decoding_seeds: int = Field(default=1, ge=1)
    """How many decoding seeds' answers are judged, the first ones."""
    workers: int = Field(default=4, ge=1, le=256)
    max_retries: int = Field(default=6, ge=0, le=100)
    timeout_seconds: float = Field(default=120.0, gt=0, le=86_400)
    max_reply_tokens: int = Field(default=512, ge=1)


class SimilarityMetric(Strict):
    """100 · cosine of sentence embeddings of a prediction and the closest of its references (Reimers & Gurevych 2019)."""

    model: EncoderRef
    batch_size: int = Field(default=64, ge=1)


class ExposureMetric(Strict):
    """Excess accumulated error of the student on its own responses over the teacher's (Arora et al. 2022), per cent."""

    lengths: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 2, 4, 8, 16], min_length=1)
    """Generated tokens, ascending; results.csv has the value of the last (the lineage's is 16), metric.json all of them."""
    rows: int | None = Field(default=64, ge=1)
    """Prompts of each benchmark; null takes all."""
    seed: int = Field(default=10, ge=0)
    """Both models are sampled with it, at temperature 1 from the whole distribution."""

    @model_validator(mode="after")
    def _ascending(self) -> ExposureMetric:
        if self.lengths != sorted(set(self.lengths)):
            raise ValueError(f"lengths {self.lengths} must ascend, each once")
        return self


class Metrics(Strict):
    """Metrics beside ROUGE-L and exact match."""

    similarity: SimilarityMetric | None = None

    calibration: bool = False
    """Expected calibration error of the next-token predictions on the references, per cent (`ece`)."""
    exposure_bias: Annotated[ExposureMetric | None, BeforeValidator(_switch)] = None
    """true, or its settings (`ex_acc_err`)."""
    judge: JudgeMetric | None = None


class Evaluation(Strict):
    """Test-set decoding (the paper: temperature 1, top-p 1, no_repeat_ngram_size 6, seeds 10–50)."""

    decoding: Decoding = Decoding(no_repeat_ngram_size=6)
    seeds: Seeds = [10, 20, 30, 40, 50]
    """Decoding seeds; a greedy protocol uses the first alone."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates. The engines sample other responses from the same distribution, so a comparison has one of them; vllm
    needs a CUDA device and an environment of its own, see README.md."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences decoded together; vllm makes its own batches."""
    metrics: Metrics = Metrics()
    lens_profile: Annotated[LensProfile | None, BeforeValidator(_switch)] = None
    """true, or its settings: profile every student through the logit lens, before and after training."""

    @model_validator(mode="after")
    def _distinct(self) -> Evaluation:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeats a seed; give each once")
        return self


class CacheConfig(Strict):
    """The teacher's states, captured once and read by every student."""

    enabled: bool = True
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16"
    shard_mib: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Rows of one teacher forward pass during capture."""
    parts: int = Field(default=1, ge=1, le=999)
    """Capture in so many parts, which several processes or machines take one after another; the cache is the same."""
    extra_layers: list[int] = []
    """Teacher layers to keep beside those that the methods need, for students to come."""
