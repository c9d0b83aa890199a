"""Every error that a user can meet. Each carries one complete message; the CLI prints it and exits with `exit_code`."""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all expected failures: one clear message, no traceback."""

    exit_code = 2


class ConfigError(PipelineError):
    """An experiment file or a --set override is wrong. `problems` holds one line per problem, all found at once."""

    def __init__(self, problems: list[str] | str, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = f"{source}: " if source else ""
        count = len(self.problems)
        title = f"{head}{count} problem{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n".join([title, *(f"  - {problem}" for problem in self.problems)]))


class DataError(PipelineError):
    """A data file is missing, empty or malformed; the message names the file and the line."""


class ModelError(PipelineError):
    """A model or tokenizer cannot be loaded, or teacher and student do not fit together."""


class ArtifactError(PipelineError):
    """An artifact folder is incomplete, corrupt or not the one that was asked for."""


class CacheMismatchError(ArtifactError):
    """A teacher cache was made under other conditions than those it is opened with; the message lists each difference."""


class TrainingError(PipelineError):
    """Training cannot go on (for example a loss that is not finite)."""

    exit_code = 1
