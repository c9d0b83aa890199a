"""The ledger of configs/paper: for every setting the published value, its source, and how ours deviates from it.

Published scores are here too, but not Table 1's for GPT-2 and TinyLlama, which were not readable as text.

`python -m pipeline.reporting.paper [FILE]`, in the folder that holds configs/, prints docs/paper.md or writes it to FILE.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_text_atomically
from pipeline.config import Experiment, load_experiment

FOLDER = Path("configs/paper")
CONFIGS = ("gpt2-120m", "gpt2-340m", "tinyllama-1.1b", "qwen2.5-1.5b")
EVERY = "every"
"""Config of a setting that all four have alike."""


@dataclass(frozen=True)
class Setting:
    """One published setting. Ours is not written here: it is read from the experiment, see `ours`.

    Attributes:
        config: file in configs/paper without its suffix, or EVERY.
        path: dotted path in the experiment; `*` stands for every key, which must then have the same value.
        theirs: the published value in our unit, or words where there is none that compares.
        source: where it was read.
        deviation: how ours differs and why; empty where it is the same.
    """

    config: str
    path: str
    theirs: Any
    source: str
    deviation: str = ""


@dataclass(frozen=True)
class Score:
    """One published ROUGE-L score.

    Attributes:
        student, teacher: the models.
        method, benchmark: by our names.
        mean, std: over the five decoding seeds of one checkpoint (hazard 10), 0–100; std with n − 1.
        source: where it was read.
    """

    student: str
    teacher: str
    method: str
    benchmark: str
    mean: float
    std: float
    source: str


# Commits of manishdhakal/DistillLens: the release, and the one that adds Qwen2.5. Others (579eea9, 15be472, c9bb604, 585d087)
# hold another experiment, a tuned lens with three pairs (--active-lens); their scripts are not the paper's.
_RELEASE, _QWEN = "9fe8a6f", "3336a20"

_ALL = "all training scripts"
_RUN = "distill_lens/train_all.sh and run_eval.sh: types rkl"
_CODE = "finetune.py"
_ARGUMENTS = "arguments.py"
_LORA = "utils.py: LoraConfig without target_modules, peft's default for qwen2"
_EVAL = "eval_main_*.sh"
_EVAL_CODE = "evaluate_main.py: max_length less max_prompt_length"
_MINILLM = "Gu et al. 2024 (MiniLLM), where the benchmark comes from"
_README = "README, Checkpoints"
_FILES = "LMOps, minillm/README and eval_main_*.sh: data directory"
_GENERATE = "LMOps, minillm/generate.py and tools/generate_data_seqkd.sh"
_ELEVEN = "eval_main_*.sh: SPLIT 11_; measured: the first reference of every row seen has at least 11 GPT-2 tokens"
_NO_MSE = "no script sets mse-coeff and no score is published"
_ONE_LAYER = "finetune.py, get_distil_loss: one linear layer without bias for all pairs, on the teacher's states"

COMMON = (
    Setting(EVERY, "data.train.repo", "MiniLLM/dolly", "README, Data Setup, which refers to LMOps, minillm/README"),
    Setting(EVERY, "data.train.skip", 1000, "LMOps, minillm/tools/process_data_dolly.py: dev-num 1000, the first raw rows"),
    Setting(EVERY, "data.dev.first", 1000, "LMOps, minillm/tools/process_data_dolly.py: dev-num 1000; scripts: dev-num"),
    Setting(
        EVERY, "data.template", "alpaca", "LMOps, minillm/tools/process_data_dolly.py",
        "Qwen2.5 only: the published tool puts the text between im_start and im_end tokens, the test files do not; ours has "
        "the plain text in both",
    ),
    Setting(EVERY, "data.max_prompt_tokens", 256, f"{_ALL}: max-prompt-length"),
    Setting(EVERY, "data.max_tokens", 512, f"{_ALL}: max-length"),
    Setting(
        EVERY, "data.overlong", "drop", "LMOps, minillm/tools/process_data_dolly.py",
        "test prompts only: theirs are cut to their first 256 tokens; no row that was seen of the test files is longer",
    ),
    Setting(EVERY, "train.seeds", [10], f"{_ALL}: SEED"),
    Setting(EVERY, "train.schedule", "cosine", f"{_ALL}: lr-decay-style; {_CODE}: CosineAnnealingLR over all steps"),
    Setting(
        EVERY, "train.warmup_steps", 0,
        f"{_ALL}: warmup-iters 0, but Qwen2.5's kd script 0.05, which {_CODE} leaves unused for cosine",
    ),
    Setting(EVERY, "train.min_learning_rate", 1e-7, f"GPT-2's distill_lens and kd base scripts: LR_MIN; others: {_ARGUMENTS}"),
    Setting(
        EVERY, "train.weight_decay", 0.01, f"{_ALL}: weight-decay",
        "TinyLlama only: theirs exempts norms by GPT-2's names, so that Llama's are decayed; here no norm is",
    ),
    Setting(EVERY, "train.betas", [0.9, 0.999], f"{_CODE}: AdamW with its defaults"),
    Setting(EVERY, "train.max_grad_norm", 1.0, f"{_ALL}: clip-grad"),
    Setting(
        EVERY, "train.precision", "bf16", f"{_ALL}: ds_config_zero1_bf16 or zero2",
        "autocast around fp32 parameters on one device; theirs are DeepSpeed's bf16 parameters with fp32 masters on four",
    ),
    Setting(EVERY, "validation.every_steps", None, f"{_ALL}: eval-interval -1, the end of each epoch"),
    Setting(EVERY, "validation.select", "rouge_l", f"{_CODE}: the best directory"),
    Setting(EVERY, "validation.seed", 10, f"{_ALL}: SEED"),
    Setting(EVERY, "validation.decoding.max_new_tokens", 256, f"{_CODE}, evaluate: max_length less the padded prompt"),
    Setting(
        EVERY, "validation.decoding.do_sample", True, f"{_ALL} but one: do-sample",
        "gpt2-340m's distilllens only: gpt2/distill_lens/train_medium.sh does not pass it, so theirs is greedy; ours samples",
    ),
    Setting(EVERY, "validation.decoding.temperature", 1.0, f"{_ALL}: temperature"),
    Setting(EVERY, "validation.decoding.top_p", 1.0, f"{_ALL}: top-p; top-k 0 is off, and ours has no top-k"),
    Setting(EVERY, "validation.decoding.no_repeat_ngram_size", 0, f"{_CODE}, evaluate: not given (hazard 11)"),
    Setting(EVERY, "alpha", 0.5, f"kd scripts: kd-ratio r; {_CODE}: (1 − r)·CE + r·D"),
    Setting(EVERY, "methods.seqkd.generation.seed", 10, _GENERATE),
    Setting(EVERY, "methods.seqkd.generation.decoding.max_new_tokens", 256, _GENERATE),
    Setting(EVERY, "methods.seqkd.generation.decoding.do_sample", True, _GENERATE),
    Setting(EVERY, "methods.seqkd.generation.decoding.temperature", 1.0, _GENERATE),
    Setting(EVERY, "methods.seqkd.generation.decoding.top_p", 1.0, f"{_GENERATE}; top-k 0 is off"),
    Setting(EVERY, "methods.seqkd.generation.decoding.no_repeat_ngram_size", 0, _GENERATE),
    Setting(
        EVERY, "methods.seqkd.kind", "½ cross-entropy + ½ forward KL on the references",
        "seqkd scripts: kd-ratio 0.5, TYPE fkl; LMOps, minillm/tools/process_data_dolly.py",
        "cross-entropy on the teacher's responses (Kim & Rush 2016); the published tools write them as gen_answer and then "
        "encode output, so their SeqKD trains on the references",
    ),
    Setting(EVERY, "methods.distilllens.alpha", 1.0, "distill_lens scripts: kd-ratio"),
    Setting(EVERY, "methods.distilllens.task", "reverse_kl", _RUN),
    Setting(EVERY, "methods.distilllens.lens.weight", 1.0, "distill_lens scripts: lens-coeff"),
    Setting(
        EVERY, "methods.distilllens.lens.divergence", "jensen_shannon", f"{_CODE}, get_distil_loss: get_jsd, beta 0.5",
        "without the 1e-8 that losses.py adds inside the logarithm (hazard 5)",
    ),
    Setting(EVERY, "methods.distilllens.lens.final_norm", False, f"{_CODE}, get_distil_loss: no final norm (hazard 2)"),
    Setting(EVERY, "methods.distilllens.lens.mask_layout", "official", f"{_CODE}, get_distil_loss: mask.repeat (hazard 1)"),
    Setting(
        EVERY, "cache.enabled", "the teacher runs beside the student", _CODE,
        "states are captured once for the methods that read final states at response positions alone; others run it online",
    ),
    Setting(
        EVERY, "cache.dtype", "bf16 forward pass", f"{_CODE}, get_teacher_model",
        "cached states are rounded to the precision of that forward pass",
    ),
    Setting(EVERY, "benchmarks.*.template", "alpaca", "the field prompt of the test files, and data_utils/prompt_datasets.py"),
    Setting(EVERY, "benchmarks.*.max_prompt_tokens", 256, f"{_EVAL}: max-prompt-length"),
    Setting(EVERY, "benchmarks.*.seeds", [10, 20, 30, 40, 50], "run_eval.sh: five seeds decode one checkpoint (hazard 10)"),
    Setting(EVERY, "benchmarks.*.decoding.max_new_tokens", 256, _EVAL_CODE),
    Setting(EVERY, "benchmarks.*.decoding.do_sample", True, f"{_EVAL}: do-sample"),
    Setting(EVERY, "benchmarks.*.decoding.temperature", 1.0, f"{_EVAL}: temperature"),
    Setting(EVERY, "benchmarks.*.decoding.top_p", 1.0, f"{_EVAL}: top-p; top-k 0 is off"),
    Setting(EVERY, "benchmarks.*.decoding.no_repeat_ngram_size", 6, f"{_ARGUMENTS}: default, read by evaluate_main.py"),
    Setting(EVERY, "benchmarks.dolly.source.repo", "MiniLLM/dolly", _FILES),
    Setting(EVERY, "benchmarks.self_inst.source.repo", "MiniLLM/self-inst", _FILES),
    Setting(EVERY, "benchmarks.vicuna.source.repo", "MiniLLM/Vicuna", _FILES),
    Setting(EVERY, "benchmarks.s_ni.source.repo", "MiniLLM/sinst", _FILES),
    Setting(EVERY, "benchmarks.unni.source.repo", "MiniLLM/uinst", _FILES),
    Setting(EVERY, "benchmarks.s_ni.source.file", "11_/valid.jsonl", _ELEVEN),
    Setting(EVERY, "benchmarks.unni.source.file", "11_/valid.jsonl", _ELEVEN),
    Setting(
        EVERY, "benchmarks.unni.sample.rows", "all rows of the file", f"{_EVAL}: dev-num -1 (LMOps: 10000, the first ones)",
        f"at most 10,000 drawn by a seed, the number of {_MINILLM}",
    ),
    Setting(EVERY, "benchmarks.unni.sample.seed", "none", _EVAL, "a seeded sample by example id, where the file has more rows"),
)  # fmt: skip

GPT2_120M = (
    Setting("gpt2-120m", "teacher.repo", "MiniLLM/teacher-gpt2-1.5B", f"{_README}; tuned on Dolly by MiniLLM"),
    Setting(
        "gpt2-120m", "student.model.repo", "gpt2",
        f"{_README}; gpt2/seqkd/seqkd_base.sh alone names MiniLLM/init-gpt2-120M",
    ),
    Setting("gpt2-120m", "train.epochs", 20, "gpt2 scripts: epochs"),
    Setting("gpt2-120m", "train.batch_size", 16, "gpt2/kd/train_base.sh: BATCH_SIZE 4 × GRAD_ACC 1 × 4 GPUs"),
    Setting(
        "gpt2-120m", "train.micro_batch_size", 4, "gpt2/distill_lens/train_base.sh: BATCH_SIZE",
        "sft's is 2; it matters to the official mask layout alone, whose rows are those of one forward pass",
    ),
    Setting("gpt2-120m", "train.learning_rate", 2e-4, "gpt2/kd/train_base.sh: LR"),
    Setting(
        "gpt2-120m", "methods.sft.train.batch_size", 8,
        "gpt2/sft/sft_base.sh: BATCH_SIZE 2 × GRAD_ACC 1 × 4 GPUs; as published it stops, since it gives no kd-ratio",
    ),
    Setting("gpt2-120m", "methods.sft.train.learning_rate", 5e-4, "gpt2/sft/sft_base.sh: LR"),
    Setting(
        "gpt2-120m", "methods.seqkd.train.learning_rate", 5e-4,
        f"gpt2/seqkd/seqkd_base.sh: LR; as published it stops, since {_CODE} knows no TYPE kd",
    ),
    Setting("gpt2-120m", "methods.mse.task", "not published", _NO_MSE, "of our choice, beside the published feature term"),
    Setting("gpt2-120m", "methods.mse.features.weight", "not published", _NO_MSE, "of our choice"),
    Setting("gpt2-120m", "methods.mse.features.pairs.pairs", "not published", _NO_MSE, "those of distilllens"),
    Setting("gpt2-120m", "methods.mse.features.projection", "teacher", _ONE_LAYER),
    Setting("gpt2-120m", "methods.mse.features.positions", "all", f"{_CODE}, get_distil_loss: no mask (hazard 3)"),
    Setting(
        "gpt2-120m", "methods.distilllens.train", None,
        "gpt2/distill_lens/train_base.sh: BATCH_SIZE 4 × GRAD_ACC 1 × 4 GPUs, LR 2e-4, 20 epochs, as in the kd script",
    ),
    Setting(
        "gpt2-120m", "methods.distilllens.lens.pairs.pairs", [[2, 8], [4, 16], [6, 24], [8, 32], [10, 40]],
        "gpt2/distill_lens/train_base.sh: student 2 4 6 8 10, teacher 8 16 24 32 40",
    ),
)  # fmt: skip

GPT2_340M = (
    Setting("gpt2-340m", "teacher.repo", "MiniLLM/teacher-gpt2-1.5B", f"{_README}; tuned on Dolly by MiniLLM"),
    Setting("gpt2-340m", "student.model.repo", "gpt2-medium", _README),
    Setting("gpt2-340m", "train.epochs", 20, "gpt2 scripts: epochs"),
    Setting("gpt2-340m", "train.batch_size", 32, "gpt2/kd/train_medium.sh: BATCH_SIZE 2 × GRAD_ACC 4 × 4 GPUs"),
    Setting(
        "gpt2-340m", "train.micro_batch_size", 4, "gpt2/distill_lens/train_medium.sh: BATCH_SIZE",
        "2 in the other scripts; it matters to the official mask layout alone, whose rows are those of one forward pass",
    ),
    Setting("gpt2-340m", "train.learning_rate", 1e-4, "gpt2/kd/train_medium.sh: LR"),
    Setting(
        "gpt2-340m", "methods.sft.train", None,
        "gpt2/sft/sft_medium.sh: BATCH_SIZE 2 × GRAD_ACC 4 × 4 GPUs, LR 1e-4, 20 epochs, as in the kd script",
    ),
    Setting(
        "gpt2-340m", "methods.seqkd.train", None,
        "gpt2/seqkd/seqkd_medium.sh: BATCH_SIZE 2 × GRAD_ACC 4 × 4 GPUs, LR 1e-4, 20 epochs, as in the kd script",
    ),
    Setting("gpt2-340m", "methods.mse.task", "not published", _NO_MSE, "of our choice, beside the published feature term"),
    Setting("gpt2-340m", "methods.mse.features.weight", "not published", _NO_MSE, "of our choice"),
    Setting("gpt2-340m", "methods.mse.features.pairs.pairs", "not published", _NO_MSE, "those of distilllens"),
    Setting("gpt2-340m", "methods.mse.features.projection", "teacher", _ONE_LAYER),
    Setting("gpt2-340m", "methods.mse.features.positions", "all", f"{_CODE}, get_distil_loss: no mask (hazard 3)"),
    Setting(
        "gpt2-340m", "methods.distilllens.train.batch_size", 16,
        "gpt2/distill_lens/train_medium.sh: BATCH_SIZE 4 × GRAD_ACC 1 × 4 GPUs",
    ),
    Setting("gpt2-340m", "methods.distilllens.train.learning_rate", 5e-5, "gpt2/distill_lens/train_medium.sh: LR"),
    Setting(
        "gpt2-340m", "methods.distilllens.lens.pairs.pairs", [[4, 8], [8, 16], [12, 24], [16, 32], [20, 40]],
        "gpt2/distill_lens/train_medium.sh: student 4 8 12 16 20, teacher 8 16 24 32 40",
    ),
)  # fmt: skip

TINYLLAMA = (
    Setting("tinyllama-1.1b", "teacher.repo", "MiniLLM/SFT-Llama-7B", f"{_README}; tuned on Dolly by MiniLLM"),
    Setting("tinyllama-1.1b", "student.model.repo", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", _README),
    Setting("tinyllama-1.1b", "train.epochs", 10, "llama scripts: epochs"),
    Setting("tinyllama-1.1b", "train.batch_size", 4, "llama/kd/kd_1B_7B.sh: BATCH_SIZE 1 × GRAD_ACC 1 × 4 GPUs"),
    Setting("tinyllama-1.1b", "train.micro_batch_size", 1, "llama scripts: BATCH_SIZE"),
    Setting("tinyllama-1.1b", "train.learning_rate", 1e-5, "llama/kd/kd_1B_7B.sh: LR"),
    Setting("tinyllama-1.1b", "train.lora", None, "llama scripts that a train_all.sh calls: no peft"),
    Setting(
        "tinyllama-1.1b", "methods.sft.train", None,
        "llama/sft/sft_1B.sh: BATCH_SIZE 1 × GRAD_ACC 1 × 4 GPUs, LR 1e-5, 10 epochs, as in the kd script",
    ),
    Setting(
        "tinyllama-1.1b", "methods.seqkd.train", None,
        "llama/seqkd/seqkd_1B_7B.sh: BATCH_SIZE 1 × GRAD_ACC 1 × 4 GPUs, LR 1e-5, 10 epochs, as in the kd script",
    ),
    Setting("tinyllama-1.1b", "methods.distilllens.train.learning_rate", 5e-6, "llama/distill_lens/train_1B_7B.sh: LR"),
    Setting(
        "tinyllama-1.1b", "methods.distilllens.lens.pairs.pairs", [[4, 5], [7, 10], [11, 16], [15, 21], [18, 26]],
        "llama/distill_lens/train_1B_7B.sh: student 4 7 11 15 18, teacher 5 10 16 21 26",
    ),
)  # fmt: skip

_TEACHER = "qwen2.5/sft/sft_3B.sh"
QWEN = (
    Setting("qwen2.5-1.5b", "teacher.repo", "Qwen/Qwen2.5-3B", f"{_TEACHER}: checkpoints/Qwen2.5-3B"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.seeds", [10], f"{_TEACHER}: SEED"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.epochs", 10, f"{_TEACHER}: epochs"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.batch_size", 16, f"{_TEACHER}: BATCH_SIZE 4 × GRAD_ACC 1 × 4 GPUs"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.micro_batch_size", 4, f"{_TEACHER}: BATCH_SIZE"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.learning_rate", 2e-4, f"{_TEACHER}: LR"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.min_learning_rate", 1e-7, f"{_ARGUMENTS}: lr-min"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.schedule", "cosine", f"{_TEACHER}: lr-decay-style"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.warmup_steps", 0, f"{_TEACHER}: warmup-iters"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.weight_decay", 0.01, f"{_TEACHER}: weight-decay"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.betas", [0.9, 0.999], f"{_CODE}: AdamW with its defaults"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.max_grad_norm", 1.0, f"{_TEACHER}: clip-grad"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.lora.rank", 8, f"{_TEACHER}: peft-lora-r"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.lora.alpha", 32.0, f"{_ARGUMENTS}: peft-lora-alpha"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.lora.dropout", 0.1, f"{_ARGUMENTS}: peft-lora-dropout"),
    Setting("qwen2.5-1.5b", "teacher_finetune.train.lora.target_modules", ["q_proj", "v_proj"], _LORA),
    Setting(
        "qwen2.5-1.5b", "teacher_finetune.train.precision", "bf16", f"{_TEACHER}: ds_config_zero1_bf16",
        "autocast, as for train.precision",
    ),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.every_steps", None, f"{_TEACHER}: eval-interval -1"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.rows", 960, f"{_TEACHER}: dev-num"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.select", "rouge_l", "distill_lens and kd scripts: sft/lm/best"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.seed", 10, f"{_TEACHER}: SEED"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.decoding.max_new_tokens", 256, f"{_CODE}, evaluate"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.decoding.do_sample", True, f"{_TEACHER}: do-sample"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.decoding.temperature", 1.0, f"{_TEACHER}: temperature"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.decoding.top_p", 1.0, f"{_TEACHER}: top-p; top-k 0 is off"),
    Setting("qwen2.5-1.5b", "teacher_finetune.validation.decoding.no_repeat_ngram_size", 0, f"{_CODE}, evaluate"),
    Setting("qwen2.5-1.5b", "student.model.repo", "Qwen/Qwen2.5-1.5B", "qwen2.5 scripts: checkpoints/Qwen2.5-1.5B"),
    Setting("qwen2.5-1.5b", "train.epochs", 10, "qwen2.5 scripts: epochs"),
    Setting("qwen2.5-1.5b", "train.batch_size", 16, "qwen2.5/kd/kd_1.5B_3.5B.sh: BATCH_SIZE 2 × GRAD_ACC 2 × 4 GPUs"),
    Setting(
        "qwen2.5-1.5b", "train.micro_batch_size", 1, "qwen2.5/distill_lens/train_1.5B_3B.sh: BATCH_SIZE",
        "kd's is 2 and sft's 4; it matters to the official mask layout alone, whose rows are those of one forward pass",
    ),
    Setting("qwen2.5-1.5b", "train.learning_rate", 2e-4, "qwen2.5/kd/kd_1.5B_3.5B.sh: LR"),
    Setting(
        "qwen2.5-1.5b", "train.lora.rank", 8, "qwen2.5 sft and distill_lens scripts: peft-lora-r",
        "qwen2.5/kd/kd_1.5B_3.5B.sh has 16, but one rank serves every method: kd, rkl, fkl_rkl, jsd and akl have half theirs",
    ),
    Setting("qwen2.5-1.5b", "train.lora.alpha", 32.0, f"{_ARGUMENTS}: peft-lora-alpha"),
    Setting("qwen2.5-1.5b", "train.lora.dropout", 0.1, f"{_ARGUMENTS}: peft-lora-dropout"),
    Setting("qwen2.5-1.5b", "train.lora.target_modules", ["q_proj", "v_proj"], _LORA),
    Setting("qwen2.5-1.5b", "validation.rows", 960, "qwen2.5 scripts: dev-num"),
    Setting(
        "qwen2.5-1.5b", "methods.sft.train", None,
        "qwen2.5/sft/sft_1.5B.sh: BATCH_SIZE 4 × GRAD_ACC 1 × 4 GPUs, LR 2e-4, 10 epochs, as in the kd script",
    ),
    Setting(
        "qwen2.5-1.5b", "methods.seqkd.train", "not published", "qwen2.5/seqkd/train_all.sh calls TinyLlama's script",
        "the budget of kd",
    ),
    Setting(
        "qwen2.5-1.5b", "methods.distilllens.train.batch_size", 4,
        "qwen2.5/distill_lens/train_1.5B_3B.sh: BATCH_SIZE 1 × GRAD_ACC 1 × 4 GPUs",
    ),
    Setting("qwen2.5-1.5b", "methods.distilllens.train.learning_rate", 1e-4, "qwen2.5/distill_lens/train_1.5B_3B.sh: LR"),
    Setting(
        "qwen2.5-1.5b", "methods.distilllens.lens.pairs.pairs", [[6, 7], [11, 14], [17, 22], [22, 29]],
        "qwen2.5/distill_lens/train_1.5B_3B.sh: student 6 11 17 22, teacher 7 14 22 29; four pairs, the other models have five",
    ),
)  # fmt: skip

LEDGER: tuple[Setting, ...] = (*COMMON, *GPT2_120M, *GPT2_340M, *TINYLLAMA, *QWEN)

QWEN_ROUGE_L: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "sft": {
        "dolly": (24.362, 24.227, 24.285, 24.280, 24.935),
        "self_inst": (19.125, 19.802, 18.885, 20.432, 17.946),
        "vicuna": (17.978, 18.232, 18.125, 17.532, 18.180),
        "s_ni": (38.349, 37.534, 38.326, 38.254, 38.024),
        "unni": (33.183, 33.256, 33.284, 33.171, 33.245),
    },
    "kd": {
        "dolly": (24.010, 24.210, 24.484, 25.389, 24.520),
        "self_inst": (19.216, 20.290, 20.537, 22.511, 20.699),
        "vicuna": (17.403, 18.602, 17.589, 17.869, 17.485),
        "s_ni": (38.407, 38.011, 38.575, 39.058, 38.643),
        "unni": (33.007, 32.985, 32.900, 32.731, 32.890),
    },
    "rkl": {
        "dolly": (25.950, 26.137, 26.258, 26.468, 25.145),
        "self_inst": (20.114, 20.343, 20.232, 22.026, 22.198),
        "vicuna": (19.292, 18.723, 19.326, 20.226, 19.962),
        "s_ni": (40.005, 40.373, 39.802, 40.417, 40.078),
        "unni": (35.504, 35.500, 35.719, 35.483, 35.507),
    },
    "fkl_rkl": {
        "dolly": (26.724, 25.726, 25.446, 25.294, 25.864),
        "self_inst": (21.343, 20.473, 20.909, 21.233, 22.062),
        "vicuna": (18.958, 18.404, 19.165, 19.191, 19.004),
        "s_ni": (39.275, 40.115, 40.300, 40.227, 40.170),
        "unni": (35.133, 35.161, 35.226, 35.145, 35.323),
    },
    "jsd": {
        "dolly": (24.353, 24.006, 23.616, 24.222, 24.338),
        "self_inst": (18.895, 18.523, 17.108, 18.770, 20.072),
        "vicuna": (17.822, 18.020, 17.937, 18.206, 18.243),
        "s_ni": (37.374, 37.050, 36.949, 36.956, 36.743),
        "unni": (32.731, 32.424, 32.892, 32.498, 32.534),
    },
    "akl": {
        "dolly": (25.123, 24.726, 25.456, 24.883, 24.743),
        "self_inst": (20.555, 21.403, 20.645, 19.869, 19.394),
        "vicuna": (19.567, 19.622, 19.667, 19.465, 19.680),
        "s_ni": (38.592, 38.942, 39.230, 38.774, 38.276),
        "unni": (34.493, 34.606, 34.678, 34.628, 34.401),
    },
    "distilllens": {
        "dolly": (27.195, 26.425, 26.553, 27.293, 26.639),
        "self_inst": (22.131, 22.015, 21.080, 21.282, 21.909),
        "vicuna": (20.417, 19.929, 21.018, 20.425, 20.992),
        "s_ni": (42.582, 43.101, 42.817, 42.122, 42.642),
        "unni": (38.600, 38.468, 38.746, 38.657, 38.772),
    },
}
"""Method → benchmark → ROUGE-L under the decoding seeds 10, 20, 30, 40 and 50 of one checkpoint, as evaluate.ipynb has them."""

SCORES = tuple(
    Score(
        "Qwen2.5-1.5B", "Qwen2.5-3B", method, benchmark, statistics.mean(scores), statistics.stdev(scores),
        f"evaluate.ipynb @ {_QWEN}",
    )
    for method, benchmarks in QWEN_ROUGE_L.items()
    for benchmark, scores in benchmarks.items()
)  # fmt: skip
"""Published scores, as far as they are published as text: Table 1's GPT-2 and TinyLlama rows were not readable."""

HAZARDS = (
    "Mask tiling (hazard 1): `mask_layout: official` gives most lens rows another row's mask wherever a forward pass has more "
    "than one row, as the published code does; `train.micro_batch_size` is therefore the scripts' rows per GPU. TinyLlama and "
    "Qwen2.5 have one row per pass, where both layouts are the same.",
    "Final norm (hazard 2): intermediate states reach the head without the final norm; the last one is normed already.",
    "Feature matching (hazard 3): `mse` is no row of Table 1. Both GPT-2 files have it with the published code's positions "
    "(prompt and padding too), side and sharing of the projection, beside the kd script's budget.",
    "α (hazard 9): the baselines mix one half of cross-entropy on the references, DistillLens none; budgets differ too. "
    "That is what was published and no fair comparison: for one, keep `fair: true` and give every method the same.",
    "Five seeds (hazard 10): they decode one checkpoint, so the published spread says nothing about training. More training "
    "seeds: `--set train.seeds=[10,20,30]`.",
    "`no_repeat_ngram_size` (hazard 11): 6 for the benchmarks, off for validation and for the teacher's responses.",
)
DEVIATIONS = (
    "Layer pairs are the scripts', given explicitly. `uniform` gives others: for TinyLlama it maps student layer 4 to teacher "
    "layer 6, the script to 5.",
    "Batches hold rows of similar length in a seeded order; theirs come from a data-parallel sampler on four GPUs.",
    "The loss is a mean over the response tokens of a whole optimiser step; data-parallel processes that average their "
    "own means weigh each process alike, however many tokens it has.",
    "Gradient checkpointing, which the TinyLlama and Qwen2.5 scripts turn on, saves memory and changes no value; there is no "
    "such setting.",
    "The test decodes in fp16 there (ds_config_zero1_fp16) and in fp32 here.",
    "Llama's test prompts start with the beginning-of-text token there, its training prompts do not; ours never have it.",
    "Dropout and sampling have other random streams; the order of rows depends on the training seed here and on none there.",
    "Exposure bias in the published code: KL(teacher, student) at each position, on text of the student (R) and of the "
    "teacher (ε), the means over 500 Dolly prompts cumulated over positions, and (R − ε) / ε in per cent at the 16th token.",
    "Hub references name `main`, which a run resolves to a commit and writes into its manifests.",
)


def load_configs(folder: Path) -> dict[str, Experiment]:
    """Every paper experiment of a folder, by name.

    Raises:
        ConfigError: a file is missing or is no experiment.
    """
    return {name: load_experiment(folder / f"{name}.yaml") for name in CONFIGS}


def ours(setting: Setting, experiments: Mapping[str, Experiment]) -> Any:
    """The value of a setting, as plain data.

    Raises:
        KeyError: the experiment has no such path.
        ValueError: the path or EVERY stands for several values that differ.
    """
    names = CONFIGS if setting.config == EVERY else (setting.config,)
    found = [value for name in names for value in _at(experiments[name].model_dump(mode="json"), setting.path.split("."))]
    if any(value != found[0] for value in found):
        raise ValueError(f"{setting.config}: {setting.path} stands for {found}, which are not the same")
    return found[0]


def markdown(experiments: Mapping[str, Experiment]) -> str:
    """docs/paper.md: a table for what all files have alike, one for each file, and what is not in them."""
    parts = [_HEAD, "## All four", _table(EVERY, experiments)]
    for name in CONFIGS:
        parts += [f"## {name}", f"`configs/paper/{name}.yaml`: {experiments[name].description}", _table(name, experiments)]
    parts += ["## Hazards", _bullets(HAZARDS), "## Deviations that belong to no setting", _bullets(DEVIATIONS)]
    parts += ["## Published scores", _SCORES_HEAD, *(_score_table(pair) for pair in dict.fromkeys(map(_pair, SCORES)))]
    return "\n\n".join(parts) + "\n"


_HEAD = f"""\
# The paper's settings

*DistillLens: Symmetric Knowledge Distillation Through Logit Lens* (arXiv 2602.13567), Table 1. `configs/paper/*.yaml` copies
the settings of its published scripts (manishdhakal/DistillLens, commit {_RELEASE}, for Qwen2.5 {_QWEN}). Written by
`python -m pipeline.reporting.paper docs/paper.md`; *ours* is read from the files.

Table 1's scores for GPT-2 and TinyLlama were not readable as text, so none is quoted; those for Qwen2.5 are in the repository
and stand at the end.

`train` and `alpha` are those of the kd script, which kd, rkl, fkl_rkl, jsd and akl share (its TYPE fkl, rkl, fkl+rkl with
coefficients 1 and 1, jsd and akl); `methods.NAME.train` replaces single values. Batch sizes count the rows of one optimiser
step on all GPUs. An empty deviation means that the two values are equal."""


_SCORES_HEAD = """\
ROUGE-L, mean and standard deviation (n − 1) over the decoding seeds 10 to 50 of one checkpoint. The notebook has no SeqKD and
no feature matching for this pair; `distilllens` is its `distill_lens/rkl`, `kd` its `kd/fkl`."""


def _table(config: str, experiments: Mapping[str, Experiment]) -> str:
    rows = [
        (f"`{entry.path}`", _text(entry.theirs), _text(ours(entry, experiments)), entry.source, entry.deviation)
        for entry in LEDGER
        if entry.config == config
    ]
    head = ("path", "theirs", "ours", "source", "deviation")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def _pair(score: Score) -> tuple[str, str, str]:
    return score.student, score.teacher, score.source


def _score_table(pair: tuple[str, str, str]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for score in SCORES:
        if _pair(score) == pair:
            cells.setdefault(score.method, {})[score.benchmark] = f"{score.mean:.2f} ± {score.std:.2f}"
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    lines = [["method", *names], ["---", *("---:" for _ in names)]]
    lines += [[method, *(row.get(name, "–") for name in names)] for method, row in cells.items()]
    student, teacher, source = pair
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{student} from {teacher} ({source}):\n\n{table}"


def _bullets(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _at(value: Any, keys: list[str]) -> list[Any]:
    """Every value at a path; `*` branches."""
    if not keys:
        return [value]
    head, *rest = keys
    return [found for child in (value.values() if head == "*" else (value[head],)) for found in _at(child, rest)]


def main(arguments: list[str]) -> None:
    """Print the document, or write it to the file that is given."""
    text = markdown(load_configs(FOLDER))
    if arguments:
        write_text_atomically(Path(arguments[0]), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
