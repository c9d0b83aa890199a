"""The compose file by its own rules, and its services as plain processes: a night with a worker that is killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import experiment
import httpx
import pytest
import yaml

from pipeline.artifacts import peek

DOCKER = Path(__file__).resolve().parents[2] / "docker"
COMPOSE = DOCKER / "compose.yaml"
NAMES = {"postgres", "prefect-server", "mlflow", "worker"}
STEPS, CHECKPOINT_EVERY = 200, 20


# --- the file -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose(services: ModuleType) -> dict[str, Any]:
    content: dict[str, Any] = services.read_compose(COMPOSE, {})
    return content


def test_interpolation_is_that_of_compose(services: ModuleType) -> None:
    given = {"a": ["${SET:-no}", "${EMPTY:-default}", "${UNSET:-x/y:z}", "${UNSET}", "$${SET}", "$$"], "b": 3}
    found = services.interpolate(given, {"SET": "yes", "EMPTY": ""})
    assert found == {"a": ["yes", "default", "x/y:z", "", "${SET}", "$"], "b": 3}


def test_the_services(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == NAMES


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert all(port.startswith("127.0.0.1:") for each in ports.values() for port in each)
    assert [name for name, each in ports.items() if each] == ["prefect-server", "mlflow"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_service_is_confined(name: str, compose: dict[str, Any]) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "/tmp" in service["tmpfs"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] not in ("root", "0", "0:0")
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "latest" not in service["image"] and ":" in service["image"]


def test_secrets_are_files_that_the_services_name(compose: dict[str, Any]) -> None:
    declared = {name: secret["file"] for name, secret in compose["secrets"].items()}
    assert all(file == f"secrets/{name}" for name, file in declared.items())
    for service in compose["services"].values():
        named = {value for value in service["environment"].values() if value.startswith("/run/secrets/")}
        assert named == {f"/run/secrets/{name}" for name in service["secrets"]}
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|AUTH_STRING", variable):
                assert variable.endswith("_FILE") and value in named
    assert set(declared) == {name for service in compose["services"].values() for name in service["secrets"]}


def test_only_the_servers_reach_the_database(compose: dict[str, Any]) -> None:
    assert compose["networks"]["database"]["internal"] is True
    inside = {name for name, service in compose["services"].items() if "database" in service["networks"]}
    assert inside == {"postgres", "prefect-server", "mlflow"}


def test_images_that_are_built_have_their_target(compose: dict[str, Any]) -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    built = [service["build"] for service in compose["services"].values() if "build" in service]
    assert built and all(build["target"] in targets for build in built) and "cuda" in targets
    assert all((DOCKER / build["context"] / build["dockerfile"]).is_file() for build in built)
    # Nothing runs as root: every final stage comes from one that drops it, and drops it again where it took it back.
    stages = {text.split(maxsplit=3)[2]: text for text in dockerfile.split("\nFROM ")[1:]}
    assert re.findall(r"^USER (\S+)", stages["base"], re.MULTILINE) == ["10001:10001"]
    for target in ("server", "cpu", "cuda"):
        assert stages[target].startswith("base ")
        assert ["10001:10001", *re.findall(r"^USER (\S+)", stages[target], re.MULTILINE)][-1] == "10001:10001"


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]])
def test_docker_compose_takes_the_files(files: list[str]) -> None:
    command = ["docker", "compose"]
    if shutil.which("docker") is None or subprocess.run([*command, "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed")
    given = [word for file in files for word in ("--file", str(DOCKER / file))]
    found = subprocess.run([*command, *given, "config", "--quiet"], capture_output=True, text=True)
    assert found.returncode == 0 and not found.stderr, found.stderr


def test_secrets_are_made_once_and_for_their_owner(tmp_path: Path, compose: dict[str, Any]) -> None:
    def make() -> dict[str, str]:
        subprocess.run([str(DOCKER / "make-secrets.sh"), str(tmp_path / "secrets")], check=True, capture_output=True)
        return {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}

    first = make()
    assert set(first) == set(compose["secrets"])
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    random = [value.rpartition(":")[2] for name, value in first.items() if name != "aws_credentials"]
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in random) and len(set(random)) == len(random)
    assert make() == first


def test_the_entrypoint_gives_secrets_and_hides_where_they_were(tmp_path: Path) -> None:
    def run(content: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "secret").write_text(content)
        environment = {"PATH": "/usr/bin:/bin", "PGPASSWORD_FILE": str(tmp_path / "secret"), "OTHER_FILE": "kept"}
        command = [str(DOCKER / "entrypoint.sh"), "sh", "-c", 'echo "$PGPASSWORD ${PGPASSWORD_FILE-unset} $OTHER_FILE"; exit 3']
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    found = run("s p a c e")
    assert (found.stdout, found.returncode) == ("s p a c e unset kept\n", 3)
    found = run("")
    assert found.returncode == 2 and "is empty" in found.stderr and not found.stdout


# --- the services -------------------------------------------------------------------------------------------------------


@dataclass
class Servers:
    """Both servers' interfaces, as their administrator."""

    prefect: httpx.Client
    mlflow: httpx.Client

    def runs(self) -> list[dict[str, Any]]:
        """Flow runs that have begun or ended, the oldest first."""
        states = {"type": {"not_any_": ["SCHEDULED"]}}
        body = {"sort": "EXPECTED_START_TIME_ASC", "limit": 100, "flow_runs": {"state": states}}
        return list(self.prefect.post("/flow_runs/filter", json=body).raise_for_status().json())

    def in_state(self, state: str) -> list[dict[str, Any]]:
        return [run for run in self.runs() if run["state"]["name"] == state]

    def messages(self) -> str:
        """What the flow runs logged to the server."""
        return str(self.prefect.post("/logs/filter", json={"limit": 200}).raise_for_status().json())

    def tracked(self, name: str) -> list[dict[str, Any]]:
        """MLflow's runs of an experiment."""
        found = self.mlflow.get("/experiments/get-by-name", params={"experiment_name": name}).raise_for_status().json()
        body = {"experiment_ids": [found["experiment"]["experiment_id"]], "max_results": 100}
        return list(self.mlflow.post("/runs/search", json=body).raise_for_status().json().get("runs", []))


@pytest.fixture(scope="module")
def secrets(settings: dict[str, str]) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(settings["SECRETS"]).iterdir()}


@pytest.fixture(scope="module")
def servers(stack: Any, secrets: dict[str, str]) -> Iterator[Servers]:
    def client(url: str, user: str, password: str) -> httpx.Client:
        return httpx.Client(base_url=url, auth=(user, password), timeout=30, trust_env=False)

    with (
        client(f"{stack.url('prefect-server')}/api", *secrets["prefect_auth"].split(":")) as prefect,
        client(f"{stack.url('mlflow')}/api/2.0/mlflow", "admin", secrets["mlflow_admin_password"]) as mlflow,
    ):
        yield Servers(prefect, mlflow)


def until(condition: Callable[[], Any], seconds: float, stack: Any, pause: float = 0.5) -> Any:
    """What a condition comes to as soon as that is anything."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(pause)
    logs = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted((stack.folder / "logs").iterdir()))
    raise AssertionError(f"not within {seconds:.0f} s\n{logs}")


def test_requests_without_a_password_are_refused(stack: Any, servers: Servers, say: Any) -> None:
    query = {"experiment_ids": ["0"]}
    for url, body in (
        (f"{stack.url('prefect-server')}/api/flow_runs/filter", {}),
        (f"{stack.url('mlflow')}/api/2.0/mlflow/runs/search", query),
    ):
        assert httpx.post(url, json=body, trust_env=False).status_code == 401
        assert httpx.post(url, json=body, auth=("admin", "wrong"), trust_env=False).status_code == 401
        say(f"401 without or with a wrong password: {url}")
    assert servers.runs() == []
    servers.mlflow.post("/runs/search", json=query).raise_for_status()
    # The UI asks for the password, and asks its own address.
    shown = httpx.get(f"{stack.url('prefect-server')}/ui-settings", trust_env=False).raise_for_status().json()
    assert (shown["api_url"], shown["auth"]) == (f"{stack.url('prefect-server')}/api", "BASIC")


def test_mlflow_refuses_a_foreign_host(servers: Servers, say: Any) -> None:
    found = servers.mlflow.post("/runs/search", json={"experiment_ids": ["0"]}, headers={"Host": "evil.example"})
    assert found.status_code == 403
    say("403 from MLflow for Host: evil.example")


def test_artifacts_go_through_mlflows_server(stack: Any, servers: Servers) -> None:
    made = servers.mlflow.post("/experiments/create", json={"name": "proxied"}).raise_for_status().json()
    found = servers.mlflow.get("/experiments/get", params=made).json()["experiment"]
    assert found["artifact_location"].startswith("mlflow-artifacts:/")
    where = f"{stack.url('mlflow')}/api/2.0/mlflow-artifacts/artifacts/{found['experiment_id']}/file.txt"
    servers.mlflow.put(where, content=b"content").raise_for_status()
    assert (stack.folder / "volumes" / "mlflow" / found["experiment_id"] / "file.txt").read_bytes() == b"content"
    assert httpx.get(where, trust_env=False).status_code == 401


# --- a night ------------------------------------------------------------------------------------------------------------


@dataclass
class Night:
    """What happened; filled as it does."""

    runs: Path
    command_lines: set[str] = field(default_factory=set)
    before: dict[Path, float] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)
    killed_at: float = 0.0
    crashed: dict[str, Any] = field(default_factory=dict)
    completed: dict[str, Any] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)


def write_configs(folder: Path, start: datetime) -> None:
    """Two trainings, every minute from `start` on; and two short ones on request, each a flow run of its own."""
    train = {"max_steps": STEPS, "batch_size": 6, "learning_rate": 1e-4, "checkpoint_every": CHECKPOINT_EVERY}
    experiment.write(folder, train=train)
    axes = {"method": ["kd"], "train_seed": [10, 20]}
    sweep = {"name": "swept", "experiment": "experiment.yaml", "axes": axes, "concurrency": 2, "trial": {"threads": 1}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    short = {"name": "scattered", "engine": "work-pool", "overrides": {"train.max_steps": 4}}
    (folder / "scattered.yaml").write_text(yaml.safe_dump({**sweep, **short}))
    schedule = {"interval_minutes": 1, "timezone": "UTC", "anchor": start.replace(tzinfo=None).isoformat()}
    nightly = {"flow": "sweep", "config": "sweep.yaml", "schedule": schedule}
    deployments = {"nightly": nightly, "scattered": {"flow": "sweep", "config": "scattered.yaml"}}
    (folder / "serve.yaml").write_text(yaml.safe_dump({"deployments": deployments, "trial": {"enabled": True}}))


def artifacts(runs: Path) -> dict[Path, float]:
    """Finished artifacts → when they were made."""
    found = {folder: peek(folder) for folder in (runs / "artifacts").glob("*/*/")}
    return {folder.relative_to(runs): manifest.created for folder, manifest in found.items() if manifest is not None}


def checkpoints(runs: Path) -> dict[str, int]:
    """Unfinished training → step of its checkpoint. Not while it is at work, as it swaps them."""
    found = {}
    for folder in (runs / "artifacts" / "train").glob("*.partial"):
        whole = next(path for name in ("checkpoint", "checkpoint.old") if (path := folder / name / "state.json").exists())
        found[folder.name.removesuffix(".partial")] = int(json.loads(whole.read_text())["progress"]["step"])
    return found


def command_lines(stack: Any) -> set[str]:
    found = set()
    for name in NAMES:
        for pid in stack.processes(name):
            try:
                found.add(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.fixture(scope="module")
def night(stack: Any, servers: Servers, settings: dict[str, str], say: Any) -> Night:
    """Worker up, schedule fires, two trials at work, SIGKILL, worker again, the schedule goes on, a run after the last."""
    seen = Night(stack.folder / "volumes" / "runs" / "runs")
    start = datetime.now(UTC) + timedelta(seconds=25)
    write_configs(Path(settings["CONFIGS"]), start)
    stack.up("worker")
    say(f"scheduled-sweep/nightly is deployed: every minute, counted from {start:%H:%M:%S}")

    (run,) = until(lambda: servers.in_state("Running"), 120, stack)
    say(fired(run))
    training = seen.runs / "artifacts" / "train"
    until(lambda: len(list(training.glob("*.partial/checkpoint/state.json"))) == 2, 120, stack, pause=0.05)
    seen.command_lines = command_lines(stack)
    seen.before, seen.killed_at = artifacts(seen.runs), time.time()
    ended = stack.kill("worker")
    seen.checkpoints = checkpoints(seen.runs)
    say(
        f"SIGKILL to the worker with two trials at step {sorted(seen.checkpoints.values())} of {STEPS}; {len(ended)} more ended"
    )
    say(f"  finished before: {len(seen.before)} artifacts; MLflow: {statuses(servers)}")

    stack.up("worker")
    (seen.crashed,) = until(lambda: servers.in_state("Crashed"), 60, stack)
    say(f"worker is back; flow run {run['name']!r} is Crashed: {seen.crashed['state']['message']}")
    say(f"  MLflow: {statuses(servers)}")
    (next_run,) = until(lambda: servers.in_state("Running"), 120, stack)
    say(fired(next_run))
    until(lambda: servers.in_state("Completed"), 240, stack)
    seen.completed = servers.in_state("Completed")[0]
    say(f"flow run {seen.completed['name']!r} is Completed: {seen.completed['state']['message']}")
    say(f"  MLflow: {statuses(servers)}")
    until(lambda: len(servers.in_state("Completed")) == 2, 120, stack)
    seen.again = servers.in_state("Completed")[1]
    say(f"flow run {seen.again['name']!r} is Completed: {seen.again['state']['message']}")
    say(f"  Prefect: {', '.join(each['state']['name'] for each in servers.runs())}")
    seen.command_lines |= command_lines(stack)
    return seen


def fired(run: dict[str, Any]) -> str:
    due, began = run["expected_start_time"][11:19], run["start_time"][11:19]
    return f"the schedule fired for {due}, worker took flow run {run['name']!r} at {began}"


def statuses(servers: Servers) -> str:
    return ", ".join(sorted(f"{run['info']['run_name']} {run['info']['status']}" for run in servers.tracked("swept")))


@pytest.mark.timeout(600)
def test_the_killed_run_is_crashed_and_the_next_one_completes(night: Night, servers: Servers) -> None:
    assert night.crashed["state"]["message"].endswith("is gone; found when serving began again")
    assert night.completed["state"]["message"] == "4 trials finished (2 of them now)"  # the others are models as they come
    assert night.completed["expected_start_time"] > night.crashed["expected_start_time"]
    # Runs whose time came while another one worked gave way to it.
    assert {run["state"]["name"] for run in servers.runs()} <= {"Crashed", "Completed", "Cancelled", "Running", "Pending"}


def test_the_next_run_after_it_has_nothing_to_do(night: Night) -> None:
    assert night.again["state"]["message"] == "nothing new: 4 trials finished"


def test_trials_go_on_from_their_checkpoints(night: Night) -> None:
    assert len(night.checkpoints) == 2 and all(0 < step < STEPS for step in night.checkpoints.values())
    found = {}
    for path in (night.runs / "swept" / "trials").glob("kd*/log.txt"):
        text = path.read_text()
        found[path.parent.name] = re.findall(rf"going on from step (\d+) of {STEPS}", text)
        assert text.count("going on from step") == 1
    assert sorted(int(step) for (step,) in found.values()) == sorted(night.checkpoints.values())


def test_nothing_is_computed_twice(night: Night) -> None:
    after = artifacts(night.runs)
    stages = {path.parts[1] for path in night.before}
    assert {"prepare", "student", "cache"} <= stages and "train" not in stages
    assert night.before.items() <= after.items()
    assert sum(path.parts[1] == "train" for path in after) == 2
    for fingerprint, step in night.checkpoints.items():
        lines = (night.runs / "artifacts" / "train" / fingerprint / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        keys = [(record["step"], frozenset(record["metrics"])) for record in records]
        assert len(keys) == len(set(keys)) and {record["step"] for record in records} >= set(range(1, STEPS + 1))
        assert all(record["time"] < night.killed_at + 1 for record in records if record["step"] <= step)
        assert all(record["time"] > night.killed_at for record in records if record["step"] > step + CHECKPOINT_EVERY)


def test_mlflow_has_every_trial_once(night: Night, servers: Servers) -> None:
    runs = {run["info"]["run_name"]: run for run in servers.tracked("swept")}
    assert len(servers.tracked("swept")) == len(runs) == 4
    assert set(runs) == {"teacher", "untrained", "kd s10", "kd s20"}
    assert {run["info"]["status"] for run in runs.values()} == {"FINISHED"}
    run_id = runs["kd s10"]["info"]["run_id"]
    query = {"run_id": run_id, "metric_key": "train/loss", "max_results": 2000}
    points = servers.mlflow.get("/metrics/get-history", params=query).raise_for_status().json()["metrics"]
    assert [int(point["step"]) for point in points] == sorted({int(point["step"]) for point in points})
    names = [run["info"]["run_name"] for run in servers.tracked("swept · stages")]
    assert len(names) == len(set(names)) >= 3


def test_prefect_shows_the_trials(night: Night, servers: Servers) -> None:
    body = {"task_runs": {"flow_run_id": {"any_": [night.completed["id"]]}}, "limit": 100}
    tasks = servers.prefect.post("/task_runs/filter", json=body).raise_for_status().json()
    names = {task["name"] for task in tasks if task["state"]["type"] == "COMPLETED"}
    assert {"trial kd s10", "trial kd s20"} <= names
    assert "kd s10: finished" in servers.messages()


def test_trials_are_flow_runs_of_the_work_pool(night: Night, stack: Any, servers: Servers, say: Any) -> None:
    found = servers.prefect.get("/deployments/name/scheduled-sweep/scattered").raise_for_status().json()
    run = servers.prefect.post(f"/deployments/{found['id']}/create_flow_run", json={}).raise_for_status().json()
    say(f"flow run {run['name']!r} of scheduled-sweep/scattered is asked for")

    def ended() -> Any:
        state = servers.prefect.get(f"/flow_runs/{run['id']}").raise_for_status().json()["state"]
        return state if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    state = until(ended, 240, stack)
    assert (state["name"], state["message"]) == ("Completed", "4 trials finished (4 of them now)")
    trials = {each["name"]: each for each in servers.runs() if each["flow_id"] != night.completed["flow_id"]}
    assert set(trials) == {"teacher", "untrained", "kd s10", "kd s20"}
    assert {each["state"]["name"] for each in trials.values()} == {"Completed"}
    assert {each["work_pool_name"] for each in trials.values()} == {"distilllens"}
    say(f"it is Completed; flow runs of trial/trial: {', '.join(sorted(trials))}")


def test_no_secret_is_in_a_log_or_a_command_line(
    night: Night, stack: Any, secrets: dict[str, str], settings: dict[str, str], servers: Servers, say: Any
) -> None:
    passwords = {value.rpartition(":")[2] for value in secrets.values() if value}
    assert len(passwords) == 6
    assert any("prefect worker start" in line for line in night.command_lines)
    assert any("pipeline.worker" in line for line in night.command_lines)
    texts = {line: line for line in night.command_lines} | {"Prefect's logs": servers.messages()}
    for path in [*(stack.folder / "logs").iterdir(), *night.runs.rglob("*")]:
        if path.is_file() and path.suffix not in (".safetensors", ".arrow"):
            texts[str(path)] = path.read_bytes().decode("utf-8", "replace")
    assert [name for name, text in texts.items() if any(password in text for password in passwords)] == []
    say(f"no secret in {len(texts)} logs, command lines and files of the run directory")


def test_a_stopped_worker_leaves_no_process(night: Night, stack: Any, say: Any) -> None:
    assert stack.processes("worker")
    stack.stop("worker")
    assert stack.processes("worker") == []
    say(f"worker stopped by {signal.SIGTERM.name}, nothing of it is left")
