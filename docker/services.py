"""The services of compose.yaml as plain processes on loopback, for machines without a container engine and for tests.

    docker/make-secrets.sh && .venv/bin/python docker/services.py --state /tmp/distilllens

Commands, environment, health checks, order, secrets, configs and volumes are read from compose.yaml. What differs:

- Addresses: NAME:PORT of a service becomes 127.0.0.1 and a free port, and 0.0.0.0 becomes 127.0.0.1 (`_Translation`).
- Paths: volumes, secrets, configs and temporary file systems are files and folders under the state folder.
- postgres: what its image's entrypoint does on an empty folder is done here, by initdb (`_initialise_postgres`).
- The images built here have docker/entrypoint.sh as entrypoint, and their Python is the one that runs this.
- Users, limits and read-only file systems are not enforced; only PostgreSQL, which refuses root, gets its system user.
- `init: true`: when a service's first process ends, every process that it left behind is killed, as in a container.
"""

from __future__ import annotations

import argparse
import contextlib
import graphlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
_MARK = "DISTILLLENS_SERVICE"
"""In the environment of everything that a service starts: which container it would be in."""
_INITDB_FOLDER = "/docker-entrypoint-initdb.d/"
_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_]\w*)(?::-([^}]*))?\})")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class ServiceFailed(Exception):
    """A service did not start."""


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """A part of a compose file with `${NAME}`, `${NAME:-default}` and `$$` replaced in every string."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: "$" if found[1] else variables.get(found[2]) or found[3] or "", value)
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if isinstance(value, dict):
        return {name: interpolate(item, variables) for name, item in value.items()}
    return value


def read_compose(path: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """A compose file, interpolated; variables that are passed through have their value or are left out."""
    content: dict[str, Any] = interpolate(yaml.safe_load(path.read_text(encoding="utf-8")), variables)
    for service in content["services"].values():
        given = service.get("environment", {})
        passed = {name: variables.get(name) if value is None else str(value) for name, value in given.items()}
        service["environment"] = {name: value for name, value in passed.items() if value is not None}
    return content


def port_of(service: Mapping[str, Any]) -> int:
    """The port that a service listens on, in its container."""
    return int([*service.get("ports", []), *service.get("expose", [])][0].rsplit(":", 1)[-1])


def _seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", text).groups()  # type: ignore[union-attr]
    return int(number) * _SECONDS[unit]


@dataclass(frozen=True)
class _Translation:
    """What a service's text means outside of its container.

    Attributes:
        own: the service's name.
        ports: service → (port in its container, port here).
        paths: path in the container → path here.
    """

    own: str
    ports: Mapping[str, tuple[int, int]]
    paths: Mapping[str, Path]

    def __call__(self, text: str) -> str:
        for name, (inside, here) in self.ports.items():
            text = re.sub(rf"(?<![\w.-]){name}:{inside}\b", f"127.0.0.1:{here}", text)
        inside, here = self.ports[self.own]
        text = re.sub(rf"(?<![\w.]){inside}(?![\w.])", str(here), text).replace("0.0.0.0", "127.0.0.1")
        longest_first = "|".join(re.escape(path) for path in sorted(self.paths, key=len, reverse=True))
        return re.sub(rf"(?<![\w./-])({longest_first})(?![\w.-])", lambda found: str(self.paths[found[0]]), text)


@dataclass
class Stack:
    """The services of one compose file.

    Attributes:
        compose: the file's content.
        folder: state: data of volumes, temporary folders, logs/NAME.log.
        say: told what happens.
        ports: service → (port in its container, port here).
    """

    compose: dict[str, Any]
    folder: Path
    say: Callable[[str], None] = print
    ports: dict[str, tuple[int, int]] = field(init=False)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        inside = {name: port_of(service) for name, service in self.compose["services"].items()}
        free = _free_ports(len(inside))
        self.ports = {name: (port, here) for (name, port), here in zip(inside.items(), free, strict=True)}

    def url(self, name: str) -> str:
        """Where a service answers."""
        return f"http://127.0.0.1:{self.ports[name][1]}"

    def log(self, name: str) -> Path:
        """What a service prints."""
        return self.folder / "logs" / f"{name}.log"

    def up(self, *names: str) -> None:
        """Start services, and those that they depend on before them, and wait for the health of each.

        Args:
            names: which; none means all. What runs already is left alone.

        Raises:
            ServiceFailed: one ended, or is not healthy in time.
        """
        needs = {name: set(item.get("depends_on", {})) for name, item in self.compose["services"].items()}
        wanted, found = list(names or needs), set[str]()
        while wanted:
            found.add(name := wanted.pop())
            wanted += needs[name] - found
        for name in graphlib.TopologicalSorter({name: needs[name] for name in found}).static_order():
            if name not in self._processes:
                self.start(name)
                self.wait_healthy(name)

    def start(self, name: str) -> None:
        """Start a service."""
        service, translate = self.compose["services"][name], self._translation(name)
        environment = self._environment(name)
        command = [translate(word) for word in service["command"]]
        user = None
        if service["command"][0] == "postgres":
            user = _postgres_user()
            if not (Path(environment["PGDATA"]) / "PG_VERSION").exists():
                self._initialise_postgres(name, environment, user)
            command += ["-p", str(self.ports[name][1]), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        else:
            command = [str(FOLDER / "entrypoint.sh"), *command]
        cwd = self._place(name, "work")
        with self.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, user=user,
            )  # fmt: skip

    def wait_healthy(self, name: str) -> None:
        """Run a service's health check until it passes, as long as compose would."""
        check = self.compose["services"][name]["healthcheck"]
        command = [self._translation(name)(word) for word in check["test"][1:]]  # after CMD
        limit = _seconds(check["start_period"]) + _seconds(check["interval"]) * check["retries"]
        deadline, environment = time.monotonic() + limit, self._environment(name)
        while True:
            code = self._processes[name].poll()
            if code is not None:
                raise ServiceFailed(f"{name}: exit code {code}\n{_end_of(self.log(name))}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                asked = subprocess.run(command, env=environment, capture_output=True, timeout=_seconds(check["timeout"]))
                if asked.returncode == 0:
                    self.say(f"{name}: healthy on 127.0.0.1:{self.ports[name][1]}")
                    return
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{name}: not healthy after {limit:.0f} s\n{_end_of(self.log(name))}")
            time.sleep(0.5)

    def kill(self, name: str) -> list[int]:
        """SIGKILL a service's first process, upon which its container would end; returns the processes that ended by that."""
        first = self._processes.pop(name)
        first.kill()
        first.wait()
        return self._end_container(name)

    def stop(self, name: str) -> None:
        """Stop a service as compose does: its stop signal, its grace period, SIGKILL."""
        service, first = self.compose["services"][name], self._processes.pop(name)
        first.send_signal(signal.Signals[service.get("stop_signal", "SIGTERM")])
        try:
            first.wait(_seconds(service.get("stop_grace_period", "10s")))
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()
            self.say(f"{name}: did not stop in time, killed")
        self._end_container(name)

    def down(self) -> None:
        """Stop what runs, the last one started first."""
        for name in reversed(list(self._processes)):
            self.stop(name)

    def processes(self, name: str) -> list[int]:
        """Living processes of a service."""
        mark = f"{_MARK}={self.folder}/{name}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                if not dead and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return sorted(found)

    def _end_container(self, name: str) -> list[int]:
        ended: set[int] = set()
        while left := self.processes(name):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended.update(left)
            time.sleep(0.05)
        return sorted(ended)

    def _environment(self, name: str) -> dict[str, str]:
        """A service's environment; nothing of this process's comes along, but the path to the installed commands."""
        translate = self._translation(name)
        given = {key: translate(value) for key, value in self.compose["services"][name]["environment"].items()}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {"PATH": path, "HOME": str(self._place(name, "work")), **given, _MARK: f"{self.folder}/{name}"}

    def _translation(self, name: str) -> _Translation:
        service = self.compose["services"][name]
        paths = {path: self._place(name, path) for path in service.get("tmpfs", [])}
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                source, target = volume.split(":")
                paths[target] = self._folder("volumes", source)
            else:
                paths[volume["target"]] = self._source(volume["source"])
        for secret in service.get("secrets", []):
            paths[f"/run/secrets/{secret}"] = self._source(self.compose["secrets"][secret]["file"])
        bare = _Translation(name, self.ports, paths)
        for config in service.get("configs", []):
            file = self._source(self.compose["configs"][config["source"]]["file"])
            copy = self._place(name, "configs") / file.name
            copy.write_text(bare(file.read_text(encoding="utf-8")), encoding="utf-8")
            paths[config["target"]] = copy
        return bare

    def _source(self, path: str) -> Path:
        return (FOLDER / path).resolve()

    def _place(self, name: str, path: str) -> Path:
        return self._folder(name, path.strip("/").replace("/", "-"))

    def _folder(self, *parts: str) -> Path:
        folder = self.folder.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _initialise_postgres(self, name: str, environment: dict[str, str], user: str | None) -> None:
        """What the image's entrypoint does on an empty folder: initdb, and its scripts at a server without TCP."""
        data = Path(environment["PGDATA"])
        with self.log(name).open("ab") as log, tempfile.TemporaryDirectory(prefix="pg-") as folder:
            password = Path(folder) / "password"
            shutil.copy(environment["POSTGRES_PASSWORD_FILE"], password)
            for path in (Path(folder), data, password):
                path.chmod(0o700)
                if user is not None:
                    shutil.chown(path, user)
            _let_through(data, self.folder)
            options = [*environment["POSTGRES_INITDB_ARGS"].split(), "--auth-local=trust", f"--pwfile={password}"]
            command = ["initdb", "--pgdata", str(data), "--username", environment["POSTGRES_USER"], *options]
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True, user=user, cwd=data)
            command = ["postgres", "-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, user=user, cwd=data)
            try:
                inside = {**environment, "PGHOST": folder, "PGUSER": environment["POSTGRES_USER"]}
                while subprocess.run(["pg_isready", "--quiet"], env=inside, stdout=log, stderr=log).returncode != 0:
                    if server.poll() is not None:
                        raise ServiceFailed(f"{name}: exit code {server.returncode}\n{_end_of(self.log(name))}")
                    time.sleep(0.2)
                for script in self._initdb_scripts(name):
                    subprocess.run([str(script)], env=inside, stdout=log, stderr=log, check=True)
            finally:
                server.send_signal(signal.SIGINT)
                server.wait()

    def _initdb_scripts(self, name: str) -> list[Path]:
        configs = self.compose["services"][name].get("configs", [])
        wanted = [config["source"] for config in configs if config["target"].startswith(_INITDB_FOLDER)]
        return [self._source(self.compose["configs"][each]["file"]) for each in wanted]


def _postgres_user() -> str | None:
    """The system user for PostgreSQL where this process is root; None is the own user."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise ServiceFailed("postgres refuses to run as root, and there is no user postgres or nobody")


def _let_through(folder: Path, top: Path) -> None:
    """Let another user pass from `top` to `folder`."""
    for parent in folder.parents:
        if top in (parent, *parent.parents):
            parent.chmod(parent.stat().st_mode | 0o011)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _end_of(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def main() -> None:
    """Run the services until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="The services of compose.yaml as plain processes on loopback.")
    parser.add_argument("--state", type=Path, required=True, help="folder for data and logs; kept")
    arguments = parser.parse_args()
    stack = Stack(read_compose(FOLDER / "compose.yaml", os.environ), arguments.state.resolve())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        stack.up()
        print(
            f"Prefect: {stack.url('prefect-server')}   MLflow: {stack.url('mlflow')}   logs: {stack.folder / 'logs'}",
            flush=True,
        )
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        stack.down()


if __name__ == "__main__":
    main()
