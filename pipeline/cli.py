"""The command line. Thin: it parses, calls, prints; exit codes 0 done, 2 bad input (one message), 1 anything else."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import __version__
from pipeline.errors import ConfigError, PipelineError
from pipeline.processes import exit_on_sigterm
from pipeline.terminal import log_to_terminal, plain

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.stages.compare import ComparePlan

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Reproduce DistillLens and compare distillation methods.",
)  # fmt: skip
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file (YAML).")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Override a setting by its dotted path; repeatable.")
]
RunDirOption = Annotated[
    Path, typer.Option("--run-dir", metavar="DIR", help="Where artifacts, tracking store and comparison go.")
]
RUNS = Path("runs")
# Typer brings its own copy of click and exports of its errors only this one and Abort.
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point: turns expected failures into one message and an exit code."""
    _use_utf8()
    # Threads that spin for long are many times slower beside other processes; threads that never spin take four times as long
    # over short operations. A short spin loses little either way (measured: 20 % alone, 25 % beside a busy process).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    exit_on_sigterm()
    log_to_terminal("%(message)s")
    for name in ("pipeline", "flows"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)
    except PipelineError as error:
        print(plain(f"error: {error}"), file=sys.stderr)
        code = error.exit_code
    except _UsageError as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has another encoding: texts and the names of files are UTF-8 here."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def reproduce(config: ConfigArgument, overrides: SetOption = [], run_dir: RunDirOption = RUNS) -> None:  # noqa: B006
    """Run a whole experiment and print its comparison; what is already done is reused."""
    from pipeline.plan import check_inputs
    from pipeline.tracked import is_tracked

    plan = _plan(config, overrides, run_dir)
    if not is_tracked(plan.comparison, run_dir):
        check_inputs(plan)
        _run_flow(config, overrides, run_dir, "compare")
    _print_comparison(plan.comparison, run_dir)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Sweep file (YAML).")],
    overrides: SetOption = [],  # noqa: B006
    run_dir: RunDirOption = RUNS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the expanded plan, and do nothing.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Accept scores below the last accepted ones.")] = False,
) -> None:
    """Run every trial of a sweep in a process of its own and compare; --set changes its base experiment."""
    from rich.console import Console

    from pipeline.config.loading import load_sweep
    from pipeline.sweeps.plan import check_points, plan_known
    from pipeline.sweeps.table import sweep_table
    from pipeline.tracked import is_tracked

    settings = load_sweep(config)
    _check_run_dir(run_dir)
    known = plan_known(settings, overrides, run_dir)
    Console(stderr=True, markup=False).print(sweep_table(settings, known.plan))
    if dry_run:
        return
    comparison = known.comparison
    if accept or not (known.whole and is_tracked(comparison, run_dir)):
        check_points(known.plan)
        with _engine(run_dir):
            from flows.outage import carry_out
            from flows.sweep import sweep as flow

            parameters = {"config": str(config), "overrides": overrides, "run_dir": str(run_dir), "accept": accept}
            comparison = carry_out(flow, parameters).comparison
    _print_comparison(comparison, run_dir)


@app.command()
def prepare(config: ConfigArgument, overrides: SetOption = [], run_dir: RunDirOption = RUNS) -> None:  # noqa: B006
    """Tokenise training rows and benchmarks."""
    _run_until("prepare", config, overrides, run_dir)


@app.command()
def cache(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006
    run_dir: RunDirOption = RUNS,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print bytes and time, and do nothing.")] = False,
) -> None:
    """Capture the teacher's states, as far as the experiment needs them."""
    if estimate:
        from pipeline.estimate import cache_estimate

        print(cache_estimate(_plan(config, overrides, run_dir)))
        return
    _run_until("cache", config, overrides, run_dir)


@app.command()
def train(config: ConfigArgument, overrides: SetOption = [], run_dir: RunDirOption = RUNS) -> None:  # noqa: B006
    """Train every student of the experiment."""
    _run_until("train", config, overrides, run_dir)


@app.command()
def evaluate(config: ConfigArgument, overrides: SetOption = [], run_dir: RunDirOption = RUNS) -> None:  # noqa: B006
    """Score teacher, untrained student and every trained student on every benchmark."""
    _run_until("evaluate", config, overrides, run_dir)


@app.command()
def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|RUN",
            help="An experiment file (YAML), or finished comparisons: each a folder (RUN_DIR/NAME, its comparison, or a "
            "RUN_DIR with one experiment) or mlflow:EXPERIMENT[@STORE], STORE being a tracking URI or another RUN_DIR.",
        ),
    ],
    overrides: SetOption = [],  # noqa: B006
    run_dir: RunDirOption = RUNS,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes (default: RUN_DIR/NAME/comparison).")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Title of the report (default: compare-A-B).")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="ROW", help="Row or method that the others are compared with.")
    ] = None,
    mix_protocols: Annotated[
        bool, typer.Option("--mix-protocols", help="Put scores by different protocols side by side, without tests across.")
    ] = False,
) -> None:
    """Write the comparison of a finished experiment again (CONFIG), or one of several experiments and stores (RUN...)."""
    if len(sources) == 1 and (sources[0].endswith((".yaml", ".yml")) or Path(sources[0]).is_file()):
        if out or name or baseline or mix_protocols:
            raise ConfigError("compare: --out, --name, --baseline and --mix-protocols go with RUN..., not CONFIG; remove them")
        _compare_again(Path(sources[0]), overrides, run_dir)
        return
    if overrides:
        raise ConfigError("compare: --set goes with CONFIG, not with RUN...; remove it")
    from pipeline.reporting.sources import open_source
    from pipeline.stages import merge as stage

    records = [open_source(source, run_dir) for source in sources]
    chosen = stage.check_name(name or stage.default_name(records))
    artifact = stage.run(records, out or run_dir / chosen / "comparison", chosen, baseline, mix_protocols)
    _print_report(artifact.path, chosen)


def _compare_again(config: Path, overrides: list[str], run_dir: Path) -> None:
    from pipeline.stages import compare as stage
    from pipeline.stages.place import obtain

    plan = _plan(config, overrides, run_dir)
    places = [place for trial in plan.trials for place in trial.places]
    missing = [place.label for place in places if obtain(place) is None]
    if missing:
        raise ConfigError(
            f"compare: {len(missing)} artifacts are missing, the first is {missing[0]!r}; run `distilllens reproduce` first"
        )
    stage.run(plan.comparison)
    _print_comparison(plan.comparison, run_dir)


@app.command()
def validate(config: ConfigArgument, overrides: SetOption = [], run_dir: RunDirOption = RUNS) -> None:  # noqa: B006
    """Check an experiment file with its data and show the plan: stage, fingerprint, cached or to do, estimated tokens."""
    from rich.console import Console

    from pipeline.estimate import plan_table
    from pipeline.plan import check_inputs

    plan = _plan(config, overrides, run_dir)
    check_inputs(plan)
    Console(markup=False).print(plan_table(plan))


@app.command()
def lens(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The student: a transformers folder or a training artifact.")
    ],
    teacher: Annotated[Path, typer.Option("--teacher", metavar="T", help="The teacher: a transformers folder.")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What both models read.")],
    final_norm: Annotated[
        bool, typer.Option("--final-norm", help="Norm intermediate states first (the classic lens; the paper does not).")
    ] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where FILE.png, .svg and .json go.")] = Path("lens"),
    positions: Annotated[int, typer.Option("--positions", help="How many of the prompt's last tokens to show.")] = 8,
    template: Annotated[
        str | None, typer.Option("--template", help="Wrap the prompt: alpaca or chat (default: the text as it is).")
    ] = None,
) -> None:
    """Print the top token per layer of both models side by side and write a heat map."""
    from pipeline.evaluation.lens_view import run_lens
    from pipeline.training.device import flush_denormals

    flush_denormals()
    run_lens(checkpoint, teacher, prompt, out, final_norm, positions, template)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A training artifact, or the model folder in it.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the plain transformers folder goes.")],
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Where its scores are (default: where it lies).")
    ] = None,
) -> None:
    """Leave a trained student as a plain transformers folder with a model card."""
    from pipeline.stages.export import export_checkpoint

    folder = export_checkpoint(checkpoint, to, run_dir)
    print(f"exported to {folder}; its README.md is the model card")


@app.command()
def register(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT_OR_CONFIG", help="Its name, or its file (YAML).")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Name of the registered model.")],
    by: Annotated[
        str | None, typer.Option("--by", metavar="METRIC", help="Best by this (default: what checkpoints are selected by).")
    ] = None,
    run_dir: RunDirOption = RUNS,
) -> None:
    """Register the best trained student of an experiment in MLflow, with the alias best."""
    from pipeline.registering import experiment_name, register_best
    from pipeline.tracking import configure_mlflow

    found = experiment_name(experiment)
    own = "MLFLOW_TRACKING_URI" in os.environ
    _check_tracked(run_dir)
    store = configure_mlflow(run_dir)
    from mlflow import MlflowClient

    print(register_best(MlflowClient(store), run_dir, found, name, by))
    where = "" if own else f" with MLFLOW_TRACKING_URI={store}"
    print(f'load it: mlflow.transformers.load_model("models:/{name}@best"){where}')


@app.command()
def doctor(run_dir: RunDirOption = RUNS) -> None:
    """Tell what this machine can do, and what to do about each miss."""
    from rich.console import Console

    from pipeline.doctor import examine, exit_code, render

    findings = examine(run_dir)
    Console(markup=False).print(render(findings))
    raise typer.Exit(exit_code(findings))


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="File of deployments (YAML).")] = Path("configs/serve.yaml"),
    run_dir: RunDirOption = RUNS,
    work_pool: Annotated[
        str | None, typer.Option("--work-pool", metavar="NAME", help="Leave the runs to this pool's workers.")
    ] = None,
    pause: Annotated[str | None, typer.Option("--pause", metavar="DEPLOYMENT", help="Pause its schedule, and end.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="DEPLOYMENT", help="Resume its schedule, and end.")] = None,
) -> None:
    """Run experiments and sweeps on schedules, with forms in the Prefect UI, until interrupted."""
    from flows.engine import configure_prefect

    _check_run_dir(run_dir)
    configure_prefect(run_dir)
    from flows import serve as service

    for name, paused in ((pause, True), (resume, False)):
        if name is not None:
            full = service.set_paused(name, paused, run_dir)
            print(f"{full}: {'paused' if paused else 'resumed'}")
    if pause is None and resume is None:
        service.main(config, run_dir, work_pool)


@app.command()
def deliver(run_dir: RunDirOption = RUNS) -> None:
    """Deliver to MLflow what earlier commands could not, because its server was away or refused it."""
    from pipeline import tracking

    left = tracking.deliver(run_dir)
    for name, records in left.items():
        print(f"{name}: {f'{records} records are left' if records else 'delivered'}")
    if not left:
        print("nothing waits")
    raise typer.Exit(1 if any(left.values()) else 0)


@app.command()
def ui(
    run_dir: RunDirOption = RUNS,
    port: Annotated[int, typer.Option(help="Loopback port.")] = 5000,
    experiment: Annotated[
        str | None, typer.Option("--experiment", metavar="NAME", help="Open on it (default: the last one compared).")
    ] = None,
) -> None:
    """Start the MLflow UI on a run directory's store (loopback only), and print where its leaderboard is."""
    from pipeline.leaderboard import VIEW, address, opening
    from pipeline.remote import without_secrets
    from pipeline.tracking import configure_mlflow

    _check_tracked(run_dir)
    store = configure_mlflow(run_dir)
    from mlflow import MlflowClient

    identity, name, preset = opening(MlflowClient(store), experiment)
    served = store.startswith(("http://", "https://"))  # by a server that is there already
    if not served:
        _check_port(port)
    base = f"{without_secrets(store).rstrip('/')}/" if served else f"http://127.0.0.1:{port}/"
    end = "" if served else " (Ctrl-C ends it)"
    print(f"MLflow UI, {name}: {address(base, identity, **({'viewStateShareKey': VIEW} if preset else {}))}{end}", flush=True)
    if served:
        return
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    arguments = ["--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])


def _check_tracked(run_dir: Path) -> None:
    if not (run_dir / "mlflow.db").is_file() and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError(
            f"--run-dir: {run_dir} has no mlflow.db; run `distilllens reproduce CONFIG --run-dir {run_dir}` first"
        )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"--port: {port} cannot be used ({error.strerror}); choose another") from None


def _plan(config: Path, overrides: list[str], run_dir: Path) -> Plan:
    from pipeline.config import load_experiment
    from pipeline.plan import plan_experiment

    experiment = load_experiment(config, overrides)
    _check_run_dir(run_dir)
    return plan_experiment(experiment, run_dir)


def _check_run_dir(run_dir: Path) -> None:
    from pipeline.store import check_store

    check_store()
    existing = run_dir
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--run-dir: {run_dir} cannot be written (no write permission in {existing}); choose another with --run-dir"
        )


def _run_until(stage: str, config: Path, overrides: list[str], run_dir: Path) -> None:
    from pipeline.plan import check_inputs
    from pipeline.tracked import is_tracked

    plan = _plan(config, overrides, run_dir)
    if is_tracked(plan.comparison, run_dir):
        print("nothing to do: this experiment is finished")
        return
    check_inputs(plan)
    _run_flow(config, overrides, run_dir, stage)


def _run_flow(config: Path, overrides: list[str], run_dir: Path, until: str) -> None:
    with _engine(run_dir):
        from flows.outage import carry_out
        from flows.reproduce import reproduce as flow

        carry_out(flow, {"config": str(config), "overrides": overrides, "run_dir": str(run_dir), "until": until})


@contextlib.contextmanager
def _engine(run_dir: Path) -> Iterator[None]:
    """The engine; prefect is imported inside of it only."""
    from flows.engine import engine

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run-dir: {run_dir} cannot be written ({error.strerror}); choose another with --run-dir") from None
    with engine(run_dir):
        yield


def _print_comparison(comparison: ComparePlan, run_dir: Path) -> None:
    _print_report(comparison.place.path, comparison.experiment.name)
    print(f"MLflow:  distilllens ui --run-dir {run_dir}")


def _print_report(folder: Path, name: str) -> None:
    from rich.console import Console

    from pipeline.reporting.aggregate import result_rows, table
    from pipeline.reporting.notes import mixing_warning, reading_notes
    from pipeline.reporting.record import run_scores
    from pipeline.reporting.record_files import read_facts
    from pipeline.reporting.render import terminal_table
    from pipeline.reporting.report import HEADLINE

    facts, console = read_facts(folder), Console(markup=False)
    console.print(terminal_table(table(result_rows(run_scores(facts))), f"{name}: ROUGE-L"))
    for text in ((folder / HEADLINE).read_text(encoding="utf-8").strip(), mixing_warning(facts)):
        if text:
            console.print(f"\n{text}", highlight=False)
    console.print()
    for note in reading_notes(facts):
        console.print(f"  {note}", style="dim", highlight=False)
    console.print(f"\nreport:  {folder / 'report.html'}\ntable:   {folder / 'results.csv'}", highlight=False)


if __name__ == "__main__":
    main()
