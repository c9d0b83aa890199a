"""What is on disk gets to a store once and in order, wherever a delivery is cut off and whatever the store answers."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tracked_content import content

from pipeline.tracking import DataInput, MLflowTracker, RunFacts, experiment_reference, run_reference
from pipeline.tracking import delivery as module
from pipeline.tracking.delivery import Delivery, DeliveryThread, refused, try_refused_again, waiting
from pipeline.tracking.mlflow_store import MLflowStore
from pipeline.tracking.spool import spool_of


@pytest.fixture(scope="module")
def store(database: Path) -> MLflowStore:
    return MLflowStore(f"sqlite:///{database}", database.parent / "artifacts")


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowTracker]:
    """Tells, and never delivers."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setattr(DeliveryThread, "start", lambda self: None)
    yield MLflowTracker(tmp_path, "e")


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3)).save(stream, format="png")
    return stream.getvalue()


def write_steps(path: Path, steps: range, time: float = 1000.0, more: str = "") -> None:
    with path.open("a") as stream:
        for step in steps:
            stream.write(json.dumps({"step": step, "time": time + step, "metrics": {"train/loss": 1 / step}}) + "\n")
        stream.write(more)


def tell(tracker: MLflowTracker, folder: Path, name: str) -> None:
    """Something of every kind, in two runs; keys and experiments are called after `name`."""
    steps, config = folder / f"{name}.jsonl", folder / "config.yaml"
    config.write_text("a: 1")
    stage = tracker.start(RunFacts(f"prepare/{name}", "rows", f"{name} · stages", {"max": 7}, {"stage": "prepare"}))
    tracker.log_metrics(stage, {"rows": 24})
    tracker.finish(stage, "FINISHED")
    data = DataInput("train", "d" * 64, "train.jsonl", 24, "training")
    tags = {"method": "kd", "stage_run.prepare": run_reference(stage)}
    run = tracker.start(RunFacts(f"kd {name}", "kd s10", name, {"method": "kd", "absent": None}, tags, [data]))
    tracker.follow(run)(steps)
    write_steps(steps, range(1, 4))
    tracker.log_steps(run, steps)
    tracker.log_metrics(run, {"cost/x": 1.23456, "eval/avg/rouge_l": 20})
    tracker.log_table(run, {"id": ["a", "b"], "score": [1.0, float("nan")]}, "generations/general.json")
    tracker.log_files(run, [config], "config")
    (folder / "figures" / "wide").mkdir(parents=True, exist_ok=True)
    (folder / "figures" / "wide" / "a.svg").write_text("<svg/>")
    tracker.log_files(run, [folder / "figures"], "comparison")
    tracker.link(run, stage, "trial.kd weight=2 s10")
    tracker.finish(run, "FINISHED")
    tracker.log_image(run, "figures/scores", png())
    links = f"experiments/{experiment_reference(name)}/runs/{run_reference(run)}"
    tracker.describe(run, name, {"mlflow.note.content": f"see {links}"})


def deliver(folder: Path, store: MLflowStore) -> None:
    for _ in Delivery(folder, store).deliver():
        pass


def spooled(tmp_path: Path) -> Path:
    return tmp_path / "e" / "mlflow_runs"


def of(name: str, store: MLflowStore) -> dict[str, Any]:
    """What the store holds of what was told under a name, which is taken out of it."""
    found = content(store._client, [name, f"{name} · stages"])
    return json.loads(json.dumps(found, default=lambda value: value.decode(errors="replace")).replace(name, "NAME"))  # type: ignore[no-any-return]


def test_everything_that_is_told_arrives(tracker: MLflowTracker, tmp_path: Path, store: MLflowStore) -> None:
    tell(tracker, tmp_path, "whole")
    deliver(spooled(tmp_path), store)
    found = of("whole", store)
    (stage,), (run,) = found["NAME · stages"]["runs"], found["NAME"]["runs"]
    assert found["NAME"]["tags"]["mlflow.note.content"] == "see experiments/NAME/runs/run kd s10"
    assert stage["metrics"] == {"rows": [[0, 24.0]]} and stage["tags"]["trial.kd weight:2 s10"] == "run kd s10"
    assert (run["status"], run["ended"], run["params"]) == ("FINISHED", True, {"method": "kd"})
    assert run["tags"]["stage_run.prepare"] == "run rows" and run["tags"]["mlflow.loggedImages"] == "True"
    assert json.loads(run["tags"]["mlflow.loggedArtifacts"]) == [{"path": "generations/general.json", "type": "table"}]
    assert run["metrics"]["train/loss"] == [[1, 1.0], [2, 0.5], [3, 1 / 3]]
    assert run["metrics"]["cost/x"] == [[0, 1.2346]] and run["inputs"] == [["train", "d" * 36, "training"]]
    assert run["files"]["config/config.yaml"] is None and len(run["files"]) == 5
    assert run["files"]["comparison/figures/wide/a.svg"] == "<svg/>"
    assert json.loads(run["files"]["generations/general.json"]) == {
        "columns": ["id", "score"],
        "data": [["a", 1.0], ["b", None]],
    }
    assert waiting(spooled(tmp_path), store.name) == 0 and not refused(spooled(tmp_path))


class Killed(BaseException):
    """The process ends here."""


def dies_at(monkeypatch: pytest.MonkeyPatch, store: MLflowStore, call: int, answered: bool) -> list[str]:
    """Let the delivery end at a call of the server, before or after it had its effect; returns the calls that were made."""
    real, made = store._client, list[str]()

    class Client:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def called(*args: Any, **named: Any) -> Any:
                made.append(name)
                if len(made) == call and not answered:
                    raise Killed
                result = getattr(real, name)(*args, **named)
                if len(made) == call:
                    raise Killed
                return result

            return called

    monkeypatch.setattr(store, "_client", Client())
    return made


@pytest.mark.parametrize("answered", [True, False], ids=["answer lost", "never sent"])
def test_cut_off_at_any_call_nothing_is_lost_or_doubled(
    tracker: MLflowTracker, tmp_path: Path, store: MLflowStore, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    tell(tracker, tmp_path, f"undisturbed{answered}")
    with monkeypatch.context() as patch:
        made = dies_at(patch, store, -1, answered)
        deliver(spooled(tmp_path), store)
    calls = len(made)
    expected = of(f"undisturbed{answered}", store)
    assert calls > 30
    for call in range(1, calls + 1, 1 if answered else 4):
        name = f"cut{answered}{call:02d}"
        shutil.rmtree(spooled(tmp_path))
        tell(tracker, tmp_path, name)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies_at(patch, store, call, answered)
            deliver(spooled(tmp_path), store)
        deliver(spooled(tmp_path), store)
        assert of(name, store) == expected, f"ended at call {call}"


def test_told_again_after_a_kill_it_is_there_once(tracker: MLflowTracker, tmp_path: Path, store: MLflowStore) -> None:
    """A run that goes on tells what it told before, with other times."""
    tell(tracker, tmp_path, "once")
    deliver(spooled(tmp_path), store)
    expected = of("once", store)
    (tmp_path / "once.jsonl").unlink()  # the training was made again: other times
    tell(tracker, tmp_path, "once")
    deliver(spooled(tmp_path), store)
    assert of("once", store) == expected


def test_a_growing_file_is_shipped_by_whole_lines_and_once(tracker: MLflowTracker, tmp_path: Path, store: MLflowStore) -> None:
    run = tracker.start(RunFacts("grows", "kd", "grows", {}, {}))
    steps, found = tmp_path / "metrics.jsonl", Delivery(spooled(tmp_path), store)

    def history() -> list[int]:
        list(found.deliver())
        run_id = spool_of(spooled(tmp_path), run).progress(store.name).run_id
        return [point.step for point in store._client.get_metric_history(run_id, "train/loss")]

    tracker.follow(run)(steps)
    assert history() == []
    write_steps(steps, range(1, 121), more='{"step": 121, "ti')
    assert history() == [*range(1, 121)]
    with steps.open("a") as stream:
        stream.write('me": 2000, "metrics": {"train/loss": 0.5}}\n')
    assert history() == [*range(1, 122)]
    write_steps(steps, range(122, 125), time=2000.0)
    steps.rename(tmp_path / "final.jsonl")  # what follows comes from where training has left it
    assert history() == [*range(1, 122)]
    tracker.log_steps(run, tmp_path / "final.jsonl")
    assert history() == [*range(1, 125)]


def test_steps_of_an_attempt_that_was_killed_arrive_without_it(
    tracker: MLflowTracker, tmp_path: Path, store: MLflowStore
) -> None:
    run = tracker.start(RunFacts("killed", "kd", "killed", {}, {}))
    tracker.follow(run)(tmp_path / "metrics.jsonl")
    write_steps(tmp_path / "metrics.jsonl", range(1, 4))
    tracker.start(RunFacts("killed", "kd", "killed", {}, {}))
    tracker.finish(run, "FAILED")
    deliver(spooled(tmp_path), store)
    (found,) = of("killed", store)["NAME"]["runs"]
    assert found["metrics"]["train/loss"] == [[1, 1.0], [2, 0.5], [3, 1 / 3]] and found["status"] == "FAILED"


def test_what_is_refused_for_good_is_set_aside_and_the_rest_arrives(
    tracker: MLflowTracker,
    tmp_path: Path,
    store: MLflowStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow.exceptions import MlflowException

    run = tracker.start(RunFacts("refused", "kd", "refused", {"a": 1}, {}))
    tracker.start(RunFacts("refused", "kd", "refused", {"a": 2, "b": 3}, {}))  # a setting may not change
    tracker.finish(run, "FINISHED")
    found = Delivery(spooled(tmp_path), store)
    for _ in range(2):
        with pytest.raises(MlflowException, match="Changing param"):
            list(found.deliver())
    list(found.deliver())
    (held,) = of("refused", store)["NAME"]["runs"]
    assert held["params"]["a"] == "1" and held["status"] == "FINISHED" and waiting(spooled(tmp_path), store.name) == 0
    (file,) = refused(spooled(tmp_path))
    kept = json.loads(file.read_text())
    assert kept["record"]["params"] == {"a": "2", "b": "3"} and "Changing param" in kept["reason"]
    assert caplog.text.count("MLflow does not take the params of run refused: ") == 1
    monkeypatch.setattr(store, "log_params", lambda run_id, params: None)  # the server has come to see it otherwise
    try_refused_again(spooled(tmp_path), store.name)
    deliver(spooled(tmp_path), store)
    assert not refused(spooled(tmp_path))


@pytest.mark.parametrize(
    ("answer", "trials"),
    [
        ("API request to endpoint /x failed with error code 413 != 200. Response body: ''", 3),
        ("API request to endpoint /x failed with error code 503 != 200. Response body: ''", None),
        ("API request to endpoint /x failed with error code 404 != 200. Response body: '<html>'", None),
        ("API request to http://x failed with exception Connection refused", None),
    ],
)
def test_answers_are_told_apart(answer: str, trials: int | None) -> None:
    from mlflow.exceptions import MlflowException

    assert module.trials_of(MlflowException(answer)) == trials


def test_other_failures_are_told_apart() -> None:
    from mlflow.exceptions import MlflowException, RestException
    from requests import ConnectionError as Away
    from requests import HTTPError, Response

    def answered(status: int) -> HTTPError:
        response = Response()
        response.status_code = status
        return HTTPError(response=response)

    assert module.trials_of(RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": ""})) == 3
    assert module.trials_of(RestException({"error_code": "PERMISSION_DENIED", "message": ""})) is None
    assert module.trials_of(RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": ""})) is None
    assert module.trials_of(MlflowException("x")) is None
    assert [module.trials_of(answered(status)) for status in (400, 401, 413, 429, 500)] == [3, None, 3, None, None]
    assert module.trials_of(Away()) is None and module.trials_of(TimeoutError()) is None
    assert module.trials_of(FileNotFoundError(2, "gone")) == 3 and module.trials_of(OSError(28, "disk full")) is None
    assert module.trials_of(RuntimeError("of some library")) == 8


def test_a_run_that_was_deleted_there_is_left_alone(
    tracker: MLflowTracker, tmp_path: Path, store: MLflowStore, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker.start(RunFacts("deleted", "kd", "deleted", {}, {}))
    found = Delivery(spooled(tmp_path), store)
    list(found.deliver())
    store._client.delete_run(str(spool_of(spooled(tmp_path), run).progress(store.name).run_id))
    for number in range(5):
        tracker.log_metrics(run, {"a": number})
    for _ in range(2):
        with pytest.raises(Exception, match="must be in the 'active' state"):
            list(found.deliver())
    list(found.deliver())
    assert of("deleted", store)["NAME"]["runs"] == [] and waiting(spooled(tmp_path), store.name) == 0
    assert caplog.text.count("MLflow does not take anything more of run deleted: the run was deleted there") == 1


def test_a_store_that_was_emptied_gets_everything_again(
    tracker: MLflowTracker, tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied() -> MLflowStore:
        path = tmp_path / f"{len(list(tmp_path.glob('*.db')))}.db"
        shutil.copy(database, path)
        opened = MLflowStore(f"sqlite:///{path}", tmp_path / "artifacts")
        opened.name = "http://one"  # to the spool they are one
        return opened

    tell(tracker, tmp_path, "emptied")
    first = emptied()
    deliver(spooled(tmp_path), first)
    second = emptied()
    found = Delivery(spooled(tmp_path), second)
    found.forget_lost()
    list(found.deliver())
    assert of("emptied", second) == of("emptied", first)
    before = waiting(spooled(tmp_path), "http://one"), [*spooled(tmp_path).glob("*.json")]
    found.forget_lost()
    assert (waiting(spooled(tmp_path), "http://one"), [*spooled(tmp_path).glob("*.json")]) == before == (0, before[1])


def test_a_store_that_is_emptied_meanwhile_gets_everything_again(
    tracker: MLflowTracker, tmp_path: Path, database: Path
) -> None:
    """Its server comes back with another database, and the ids of experiments and runs are those of nothing."""
    stores = []
    for number in range(2):
        path = tmp_path / f"{number}.db"
        shutil.copy(database, path)
        stores.append(MLflowStore(f"sqlite:///{path}", tmp_path / "artifacts"))
        # Experiments have other ids in each.
        stores[-1]._client.create_experiment(f"other {number}") if number else None
    before, after = stores
    tell(tracker, tmp_path, "meanwhile")
    found, (client, before._client) = Delivery(spooled(tmp_path), before), (before._client, before._client)
    list(found.deliver())
    before._client = after._client
    run = tracker.start(RunFacts("kd meanwhile", "kd s10", "meanwhile", {"method": "kd"}, {}))
    tracker.finish(run, "FINISHED")
    for _ in range(9):  # a few trials for the first record that fails
        try:
            list(found.deliver())
        except Exception as error:
            assert "not found" in str(error) or "No Experiment" in str(error), error  # noqa: PT017
    assert waiting(spooled(tmp_path), before.name) == 0 and not refused(spooled(tmp_path))
    assert [run["name"] for run in of("meanwhile", after)["NAME"]["runs"]] == ["kd s10"]
    assert client is not before._client


def test_of_two_runs_with_a_key_one_is_left(tracker: MLflowTracker, tmp_path: Path, store: MLflowStore) -> None:
    """A creation that the client gave up waiting for was carried out after all, after the run was made a second time."""
    run = tracker.start(RunFacts("twice", "kd", "twice", {}, {}))
    deliver(spooled(tmp_path), store)
    store._client.create_run(store.experiment("twice"), run_name="late", tags={"distilllens.key": "twice"})
    tracker.finish(run, "FINISHED")
    deliver(spooled(tmp_path), store)
    assert [(each["name"], each["status"]) for each in of("twice", store)["NAME"]["runs"]] == [("kd", "FINISHED")]


def test_what_refers_to_a_run_that_is_not_there_waits_and_holds_up_nothing_else(
    tracker: MLflowTracker, tmp_path: Path, store: MLflowStore
) -> None:
    """A worker on another disk knows only the key of the stage's run."""
    tracker.start(RunFacts("waits", "kd", "waits", {}, {"stage_run.prepare": run_reference("prepare/elsewhere")}))
    tracker.start(RunFacts("other", "sft", "waits", {}, {}))
    found = Delivery(spooled(tmp_path), store)
    list(found.deliver())
    assert [run["name"] for run in of("waits", store)["NAME"]["runs"]] == ["sft"]
    store._client.create_run(store.experiment("waits"), run_name="rows", tags={"distilllens.key": "prepare/elsewhere"})
    list(found.deliver())
    (kd,) = [run for run in of("waits", store)["NAME"]["runs"] if run["name"] == "kd"]
    assert kd["tags"]["stage_run.prepare"] == "run rows"


def test_a_model_is_delivered_from_its_folder(
    tracker: MLflowTracker, tmp_path: Path, store: MLflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.mlflow_model

    sent: list[tuple[str, Path, str]] = []
    monkeypatch.setattr(
        pipeline.mlflow_model, "deliver_model", lambda client, run_id, model, name: sent.append((run_id, model, name))
    )
    run = tracker.start(RunFacts("model", "kd", "model", {}, {}))
    tracker.log_model(run, tmp_path / "student", "kd s10")
    deliver(spooled(tmp_path), store)
    assert sent == [(spool_of(spooled(tmp_path), run).progress(store.name).run_id, tmp_path / "student", "kd s10")]


class Server:
    """A store that can be away; it delivers nothing else."""

    name = "http://server"

    def __init__(self) -> None:
        self.away, self.created, self.answer = True, list[str](), threading.Event()

    def create(self, start: dict[str, Any], tags: dict[str, str]) -> str:
        if self.away:
            raise ConnectionError("refused")
        self.created.append(start["key"])
        return str(start["key"])

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        self.answer.wait(60)

    def run_ids(self, experiment: str) -> set[str]:
        return set(self.created) | {"a"}

    def forget(self) -> None:
        pass


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens in another thread."""
    for _ in range(600):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not happen")


def thread_of(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> DeliveryThread:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    made = DeliveryThread(folder, lambda: server)  # type: ignore[arg-type, return-value]
    threading.Thread.start(made)
    return made


def test_a_server_that_is_away_costs_one_warning(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.answer.set()
    tracker.start(RunFacts("a", "a", "e", {}, {}))
    tracker.start(RunFacts("b", "b", "e", {}, {}))
    delivers = thread_of(spooled(tmp_path), server, monkeypatch)
    until(lambda: delivers.failing)
    for _ in range(20):
        delivers.wake()
    server.away = False
    until(lambda: delivers.passes)
    delivers.end()
    delivers.join(10)
    assert server.created == ["a", "b"]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "refused; the work goes on" in said[0] and said[1] == "MLflow: answers again"


def test_one_process_delivers_and_another_takes_over(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Server(), Server()
    for server in (first, second):
        server.away = False
        server.answer.set()
    one = thread_of(spooled(tmp_path), first, monkeypatch)
    until(lambda: one.holds)
    other = thread_of(spooled(tmp_path), second, monkeypatch)
    assert other.decided.wait(10) and not other.holds
    tracker.start(RunFacts("a", "a", "e", {}, {}))
    until(lambda: first.created)
    one.end()
    one.join(10)
    until(lambda: other.holds)
    tracker.start(RunFacts("b", "b", "e", {}, {}))
    until(lambda: second.created)
    other.end()
    other.join(10)
    assert (first.created, second.created) == (["a"], ["b"])
