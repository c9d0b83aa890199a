"""docker/: users, file systems, secrets, addresses, health and limits of every service and image."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
OVERLAYS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in DOCKER.glob("compose.*.yaml")]
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|API_KEY|CREDENTIALS")

each = pytest.mark.parametrize("name", sorted(SERVICES))


@each
def test_a_service_runs_as_a_user_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] not in ("root", "0", "0:0") and service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"] and not service.get("cap_add")


@each
def test_a_services_file_system_cannot_be_written_but_for_its_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and "/tmp" in service["tmpfs"]
    for volume in service.get("volumes", []):
        # Nothing of the machine but the folder of experiments, which cannot be written.
        if isinstance(volume, dict):
            assert volume["read_only"] is True and volume["source"] == "${CONFIGS:-../configs}"
        else:
            assert volume.partition(":")[0] in COMPOSE["volumes"]
    assert "docker.sock" not in yaml.safe_dump(service)


@each
def test_a_service_has_a_health_check_limits_and_short_logs(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD" and {"interval", "timeout", "retries"} <= service["healthcheck"].keys()
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"} and service["restart"] == "unless-stopped"


@each
def test_a_service_is_published_on_loopback_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert isinstance(port, str) and port.startswith("127.0.0.1:")
    assert "network_mode" not in SERVICES[name] and SERVICES[name]["networks"]


def test_the_database_cannot_be_reached_from_outside() -> None:
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == ["database"] and "ports" not in SERVICES["postgres"]
    assert "database" not in SERVICES["worker"]["networks"]


@each
def test_secrets_come_from_files(name: str) -> None:
    service = SERVICES[name]
    for variable, value in (service.get("environment") or {}).items():
        if SECRET.search(variable):
            assert variable.endswith("_FILE"), f"{name}: {variable} holds a secret itself"
            assert str(value).removeprefix("/run/secrets/") in service["secrets"]
        assert not re.search(r"://[^/@\s]*:[^/@\s]*@", str(value or "")), f"{name}: {variable} has a password in its address"
    assert not SECRET.search(" ".join(map(str, service["command"])))
    assert set(service["secrets"]) <= COMPOSE["secrets"].keys()


def test_no_secret_is_in_the_configuration_or_an_image() -> None:
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    assert not SECRET.search(
        "\n".join(line for line in DOCKERFILE.splitlines() if line.split(" ")[0] in ("ARG", "ENV", "COPY"))
    )
    ignored = (DOCKER.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
    # Only what is named is sent to the engine; of docker/ that is the entry point.
    assert ignored[0] == "*" and [line for line in ignored if line.startswith("!docker")] == ["!docker/entrypoint.sh"]
    assert "docker/secrets/" in (DOCKER.parent / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert not any(text in yaml.safe_dump(OVERLAYS) for text in ("secret", "PASSWORD", "privileged"))


def test_prefect_and_mlflow_ask_who_it_is() -> None:
    prefect, mlflow, worker = (SERVICES[name] for name in ("prefect-server", "mlflow", "worker"))
    assert prefect["environment"]["PREFECT_SERVER_API_AUTH_STRING_FILE"] == "/run/secrets/prefect_auth"
    assert worker["environment"]["PREFECT_API_AUTH_STRING_FILE"] == "/run/secrets/prefect_auth"
    command = mlflow["command"]
    assert command[command.index("--app-name") + 1] == "basic-auth"
    hosts = command[command.index("--allowed-hosts") + 1].split(",")
    assert hosts == ["mlflow:*", "localhost:*", "127.0.0.1:*"]  # the check of hosts is on, and lets nobody else in
    settings = configparser.ConfigParser()
    settings.read(DOCKER / "mlflow-auth.ini", encoding="utf-8")
    assert settings["mlflow"]["default_permission"] == "NO_PERMISSIONS" and "admin_password" not in settings["mlflow"]


def test_images_are_pinned_and_built_for_a_user_without_rights() -> None:
    images = [SERVICES["postgres"]["image"], *re.findall(r"^ARG PYTHON_IMAGE=(\S+)", DOCKERFILE, re.M)]
    assert len(images) == 2
    for image in images:
        assert re.search(r":\d+\.\d+[\w.-]*\}?$|@sha256:[0-9a-f]{64}\}?$", image), f"{image}: no version, no digest"
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    assert all(stage.split(" ")[0] in ("${PYTHON_IMAGE}", "base", "build", "build-pipeline") for stage in stages)
    users = {stage.split()[2]: re.findall(r"^USER (\S+)", stage, re.M) for stage in stages}
    assert users["base"][-1] == "10001:10001"  # server and cpu add nothing to it
    assert all(not found or found[-1] == "10001:10001" for found in users.values())
    assert "--cert" not in DOCKERFILE and "curl" not in DOCKERFILE
    readme = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert "docker buildx imagetools inspect" in readme and "@sha256:" in readme


def test_the_secrets_are_made_for_their_owner_and_differ(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    subprocess.run(["sh", str(DOCKER / "make-secrets.sh"), str(folder)], check=True, capture_output=True)
    assert folder.stat().st_mode & 0o777 == 0o700
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert made.keys() == COMPOSE["secrets"].keys()
    random = [text for name, text in made.items() if name != "aws_credentials"]
    assert len(set(random)) == len(random) and all(len(text) >= 48 for text in random)


def test_the_entry_point_passes_a_secret_on_without_its_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    (tmp_path / "empty").write_text("")
    entry = ["sh", str(DOCKER / "entrypoint.sh"), "sh", "-c", "echo $PGPASSWORD; env | grep -c PGPASSWORD_FILE"]
    found = subprocess.run(
        entry, env={"PATH": "/usr/bin:/bin", "PGPASSWORD_FILE": str(tmp_path / "secret")}, capture_output=True, text=True
    )  # fmt: skip
    assert found.stdout.split() == ["s3cret", "0"]
    found = subprocess.run(
        entry, env={"PATH": "/usr/bin:/bin", "PGPASSWORD_FILE": str(tmp_path / "empty")}, capture_output=True, text=True
    )  # fmt: skip
    assert found.returncode == 2 and "empty (PGPASSWORD_FILE) is empty" in found.stderr


def test_the_servers_that_the_command_starts_listen_on_loopback() -> None:
    for file in ("pipeline/cli.py", "flows/engine.py", "flows/serve.py"):
        source = (DOCKER.parent / file).read_text(encoding="utf-8")
        assert '"--host", "127.0.0.1"' in source and "0.0.0.0" not in source
