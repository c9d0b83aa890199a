"""A teacher, a student, the work and a machine, as the cost model sees them; parameters, FLOPs and bytes follow from shapes.

Every unit is SI: bytes, floating-point operations (a multiply-add is two), seconds, bytes/s, FLOP/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.teacher.cache.estimate import estimate_bytes


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer.

    Attributes:
        layers: L, number of blocks.
        width: d, hidden size.
        ffn: f, inner width of the MLP.
        vocab: V, rows of the embedding.
        heads: attention heads.
        kv_heads: heads of keys and values.
        tied: the output head is the embedding.
        gated_mlp: three MLP matrices and RMSNorm as Llama has them; else two and LayerNorm as in GPT-2.
        biases: linear layers and norms have biases.
        positions: rows of a learned position embedding; 0 for rotary embeddings.
    """

    layers: int
    width: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    tied: bool
    gated_mlp: bool
    biases: bool = False
    positions: int = 0

    @property
    def kv_width(self) -> int:
        """Width of keys and of values."""
        return self.width * self.kv_heads // self.heads

    @property
    def head_weights(self) -> int:
        """V·d, entries of the output head."""
        return self.vocab * self.width


@dataclass(frozen=True)
class Method:
    """What a method evaluates at every response token; see `pipeline.losses.objective`.

    Attributes:
        name: as in the configuration.
        task: a divergence on the final distributions.
        pairs: lens pairs.
        cross_entropy: α < 1, or no teacher.
        head_gradient: the head is trained; not so with adapters.
    """

    name: str
    task: bool
    pairs: int
    cross_entropy: bool
    head_gradient: bool = True

    @property
    def divergences(self) -> int:
        """Pairs of distributions compared per response token."""
        return int(self.task) + self.pairs

    @property
    def calls(self) -> int:
        """Calls of the fused objective per micro-batch: all pairs are one."""
        return int(self.task) + int(self.pairs > 0) + int(self.cross_entropy)


SFT = Method("sft", task=False, pairs=0, cross_entropy=True)
KD = Method("kd", task=True, pairs=0, cross_entropy=True)
RKL = Method("rkl", task=True, pairs=0, cross_entropy=True)
DISTILLLENS = Method("distilllens", task=True, pairs=5, cross_entropy=False)


@dataclass(frozen=True)
class Workload:
    """What is trained on what.

    Attributes:
        rows: training rows.
        tokens: mean input tokens of a row, padding included.
        response_tokens: mean response tokens of a row.
        epochs: of every student.
        batch: rows of an optimiser step.
        micro_batch: rows of a forward pass.
        methods: each is trained `seeds` times.
        seeds: training seeds.
        dtype: of cached states.
    """

    rows: int
    tokens: float
    response_tokens: float
    epochs: float
    batch: int
    micro_batch: int
    methods: tuple[Method, ...]
    seeds: int = 1
    dtype: str = "bfloat16"

    @property
    def students(self) -> int:
        """Training runs: methods × training seeds."""
        return len(self.methods) * self.seeds

    @property
    def micro_batches(self) -> int:
        """Forward passes of an optimiser step."""
        return math.ceil(self.batch / self.micro_batch)

    @property
    def cached_layers(self) -> int:
        """Teacher layers that some method reads; methods share their pairs."""
        return max((method.divergences for method in self.methods), default=0)


@dataclass(frozen=True)
class Case:
    """A teacher, a student and the work."""

    name: str
    teacher: Shape
    student: Shape
    workload: Workload


@dataclass(frozen=True)
class Machine:
    """Rates of one device, and what the machine around it has.

    Attributes:
        name: for tables.
        body_flops: FLOP/s of matrix products in transformer blocks, in training's precision.
        float32_flops: FLOP/s of the same products in float32, in which a capture runs.
        lens_flops: FLOP/s of products with an output head.
        entries: vocabulary entries/s of a divergence and its gradient, without the products.
        activation_bandwidth: bytes/s of elementwise work on activations.
        memory_bandwidth: bytes/s of elementwise work on arrays far larger than any cache.
        memory: bytes of the device.
        devices: devices of one machine.
        link: bytes/s between them, one direction.
        disk: bytes of the machine's local disk.
        disk_read: bytes/s.
        disk_write: bytes/s.
        network: bytes/s of the machine to shared storage.
        half: bfloat16 autocast around float32 parameters; else all in float32.
    """

    name: str
    body_flops: float
    float32_flops: float
    lens_flops: float
    entries: float
    activation_bandwidth: float
    memory_bandwidth: float
    memory: float
    devices: int
    link: float
    disk: float
    disk_read: float
    disk_write: float
    network: float
    half: bool


def block_weights(shape: Shape) -> int:
    """Entries of the blocks' matrices; every token takes a multiply-add with each."""
    attention = 2 * shape.width * (shape.width + shape.kv_width)
    return shape.layers * (attention + (3 if shape.gated_mlp else 2) * shape.width * shape.ffn)


def parameters(shape: Shape) -> int:
    """Parameters of the model, a tied head counted once."""
    d = shape.width
    biases = shape.layers * ((2 * d + 2 * shape.kv_width) + shape.ffn + d) if shape.biases else 0
    norms = (2 * shape.layers + 1) * d * (2 if shape.biases else 1)
    embeddings = (shape.vocab + shape.positions) * d + (0 if shape.tied else shape.head_weights)
    return block_weights(shape) + biases + norms + embeddings


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """FLOPs of the blocks' forward pass over `tokens` tokens in rows of `context`; no head, attention's square in full."""
    return 2.0 * tokens * block_weights(shape) + 4.0 * tokens * context * shape.width * shape.layers


def training_flops(shape: Shape, tokens: float, context: float) -> float:
    """FLOPs of the blocks' forward and backward pass: each product has two in the backward pass."""
    return 3.0 * forward_flops(shape, tokens, context)


def objective_flops(student: Shape, teacher: Shape, method: Method) -> float:
    """FLOPs per response token: per divergence both logits and the student's two gradients (8·d·V at equal widths)."""
    own = (2.0 + 2.0 + (2.0 if method.head_gradient else 0.0)) * student.head_weights
    return method.divergences * (own + 2.0 * teacher.width * student.vocab) + (own if method.cross_entropy else 0.0)


def cache_bytes(case: Case) -> int:
    """Bytes of the teacher cache on disk."""
    work = case.workload
    return estimate_bytes(
        round(work.rows * work.response_tokens), work.rows, range(work.cached_layers), case.teacher.width, work.dtype
    )


def full_logits_bytes(case: Case) -> float:
    """Bytes of the teacher's final logits in two bytes each: what a cache of states is an alternative to."""
    return 2.0 * case.workload.rows * case.workload.response_tokens * case.teacher.vocab
