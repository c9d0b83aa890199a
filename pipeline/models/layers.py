"""Which student layer is compared with which teacher layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.errors import ConfigError

LayerPair = tuple[int, int]


def uniform_pairs(count: int, student_layers: int, teacher_layers: int, what: str) -> tuple[LayerPair, ...]:
    """Evenly spaced intermediate student layers l = round(k·L_S/(count+1)), each with l' = round(l·L_T/L_S) (§3 of the paper).

    Raises:
        ConfigError: there are not that many intermediate layers.
    """
    return _proportional(_evenly_spaced(count, student_layers, what), student_layers, teacher_layers)


def first_pairs(count: int, student_layers: int, teacher_layers: int, what: str) -> tuple[LayerPair, ...]:
    """The student's first `count` layers, 1 … count, each with l' = round(l·L_T/L_S).

    Raises:
        ConfigError: there are not that many intermediate layers.
    """
    _check_count(count, student_layers, what)
    return _proportional(range(1, count + 1), student_layers, teacher_layers)


def last_pairs(count: int, student_layers: int, teacher_layers: int, what: str) -> tuple[LayerPair, ...]:
    """The `count` intermediate layers next to the output, L_S − count … L_S − 1, each with l' = round(l·L_T/L_S).

    The final layer is not among them: the task divergence compares it already.

    Raises:
        ConfigError: there are not that many intermediate layers.
    """
    _check_count(count, student_layers, what)
    return _proportional(range(student_layers - count, student_layers), student_layers, teacher_layers)


def provenance_pairs(count: int, origin: Sequence[int], what: str) -> tuple[LayerPair, ...]:
    """Evenly spaced intermediate student layers, each with the teacher layer whose output it inherited.

    Args:
        count: number of pairs.
        origin: origin[l] is the teacher layer that student layer l was copied from, l = 0 (embeddings) … L_S.
        what: the setting's dotted path, for messages.

    Raises:
        ConfigError: there are not that many intermediate layers.
    """
    return tuple((layer, origin[layer]) for layer in _evenly_spaced(count, len(origin) - 1, what))


def check_pairs(pairs: Sequence[LayerPair], student_layers: int, teacher_layers: int, what: str) -> tuple[LayerPair, ...]:
    """Pairs given explicitly.

    Raises:
        ConfigError: a layer does not exist.
    """
    problems = [
        f"{what}[{index}]: {side} layer {layer} does not exist, the {side} has 0 (embeddings) to {last}; give one of them"
        for index, pair in enumerate(pairs)
        for side, layer, last in (("student", pair[0], student_layers), ("teacher", pair[1], teacher_layers))
        if not 0 <= layer <= last
    ]
    if problems:
        raise ConfigError(problems)
    return tuple((student, teacher) for student, teacher in pairs)


def _proportional(chosen: Iterable[int], student_layers: int, teacher_layers: int) -> tuple[LayerPair, ...]:
    return tuple((layer, _round(layer * teacher_layers / student_layers)) for layer in chosen)


def _check_count(count: int, layers: int, what: str) -> None:
    if count > layers - 1:
        raise ConfigError(
            f"{what}: {count} pairs, but a student of {layers} layers has {layers - 1} intermediate ones; lower it"
        )


def _evenly_spaced(count: int, layers: int, what: str) -> list[int]:
    _check_count(count, layers, what)
    return [_round(k * layers / (count + 1)) for k in range(1, count + 1)]


def _round(value: float) -> int:
    """Half up: Python's own rounding would send 2.5 and 3.5 in different directions."""
    return int(value + 0.5)
