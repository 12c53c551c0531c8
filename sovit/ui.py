"""`sovit ui STUDY`: MLflow's pages on a study's ledger and Optuna's dashboard on its journal, both on loopback alone."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from wsgiref.simple_server import make_server

from sovit import UserError
from sovit.track import beside, fill, fill_text, ledger_path, store_path, store_uri

HOST = "127.0.0.1"
FIRST_PORT = 5000  # MLflow's own; the next free one is taken where no --port was asked for
POLL_SECONDS = 0.5
START_SECONDS = 180.0  # for a server to answer; MLflow takes about 10 s on a free core
STOP_SECONDS = 10.0  # for a server to end when asked
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def serve(study: str, results: Path, runs: Path, store: Path | None = None, port: int | None = None) -> int:
    """Fill the store, start the servers, print where they are, and refill as the ledger grows, until Ctrl-C or a kill.

    Returns 0, or 1 where a server ended by itself. Raises UserError for bad input and for a --port that cannot be had.
    """
    port = _asked_port(port) if port is not None else _free_port(FIRST_PORT)
    store, ledger = store_path(store, runs), ledger_path(study, results, runs)
    seen = ledger.stat().st_mtime_ns if ledger.exists() else 0  # before the fill, which takes its time
    done = fill(study, results, runs, store)
    print(f"{fill_text(done)}; starting", flush=True)
    # the saved view of sovit.track, on the page for training runs
    view = "workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=sovit"
    pages = {"MLflow": f"http://{HOST}:{port}/#/experiments/{done['experiment_id']}/runs?{view}"}
    commands = {"MLflow": mlflow_command(store, port)}
    journal = runs / f"{done['study']}.journal"
    if not journal.exists():
        print(f"no Optuna dashboard: there is no journal at {journal}", flush=True)
    elif importlib.util.find_spec("optuna_dashboard") is None:
        print("no Optuna dashboard: it is not installed; pip install 'sovit[dashboard]'", flush=True)
    else:
        second = _free_port(port + 1)
        pages["Optuna"] = f"http://{HOST}:{second}/dashboard/studies/0"
        commands["Optuna"] = [sys.executable, "-m", "sovit.ui", "dashboard", str(journal), str(second)]

    processes: dict[str, subprocess.Popen] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):  # a polite kill, or a closed terminal, ends like Ctrl-C
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, signal.default_int_handler)
    with open(beside(store, ".log"), "w") as log:
        try:
            for name, command in commands.items():
                processes[name] = _start(command, log)
            for name, page in pages.items():
                if _answers(page, processes[name]):
                    print(f"{name:<7} {page}", flush=True)
                else:
                    print(f"sovit: {name} did not start; see {log.name}", file=sys.stderr)
                    _stop([processes.pop(name)])
            if "MLflow" in processes:
                print("Ctrl-C stops", flush=True)
                name = _watch(processes, ledger, seen, lambda: fill(study, results, runs, store))
                print(f"sovit: {name} ended; see {log.name}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave them behind
            _stop(list(processes.values()))


def _watch(processes: dict[str, subprocess.Popen], ledger: Path, seen: int, refill: Callable[[], dict]) -> str:
    """Refill whenever the ledger is no longer of the time `seen`, until a process ends; which."""
    while True:
        time.sleep(POLL_SECONDS)
        for name, process in processes.items():
            if process.poll() is not None:
                return name
        if ledger.exists() and ledger.stat().st_mtime_ns != seen:
            seen = ledger.stat().st_mtime_ns
            try:
                print(fill_text(refill()), flush=True)
            except UserError as error:  # a ledger that someone is mending is no reason to stop
                print(f"sovit: {error}", file=sys.stderr)


def mlflow_command(store: Path, port: int) -> list[str]:
    uri = store_uri(store)
    where = ["--backend-store-uri", uri, "--registry-store-uri", uri, "--host", HOST, "--port", str(port)]
    return [sys.executable, "-m", "mlflow", "server", *where, "--workers", "1"]


def dashboard(journal: Path, port: int) -> None:
    """Optuna's dashboard, through the storage that the sweep uses: its lock, and its mending of a torn line."""
    from optuna_dashboard import wsgi

    from sovit.sweep import open_storage

    with make_server(HOST, port, from_here_alone(wsgi(open_storage(f"journal:{journal}")))) as server:
        server.serve_forever()


def from_here_alone(app: Callable) -> Callable:
    """The WSGI app, but 403 where it is asked for by another name than this machine's own: a page of another site whose
    name was made to lead here (DNS rebinding) could read studies and change them. MLflow does the same by itself."""

    def checked(environ: dict, start_response: Callable):
        if environ.get("HTTP_HOST", "").partition(":")[0] in (HOST, "localhost"):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [f"only for {HOST} and localhost\n".encode()]

    return checked


# ports and processes ---------------------------------------------------------------------------------------------------


def _asked_port(port: int) -> int:
    if not 0 < port < 65535:
        raise UserError(f"--port {port} is no port; give a number from 1 to 65534")
    if error := _refusal(port):
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"--port {port} {why}; give another, or none for the next free one")
    return port


def _free_port(first: int) -> int:
    for port in range(first, min(first + 100, 65536)):
        if not _refusal(port):
            return port
    raise UserError(f"no port from {first} to {first + 99} is free; give another with --port")


def _refusal(port: int) -> OSError | None:
    """Why nothing can listen at a port: something does already, or it is a privileged one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # which a listener still refuses
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error
    return None


def _start(command: list[str], log) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    # a session of its own: Ctrl-C reaches us alone, and we end whatever the server has started; its stdin is ours to
    # hold, and the kernel's to close where we are killed
    leashed = [sys.executable, "-m", "sovit.ui", "leash", *command]
    return subprocess.Popen(
        leashed, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    )


def leash(command: list[str]) -> None:
    """Run a command until it ends or our stdin closes, then end it and all of our process group, ourselves with it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the group's, which we outlive until the command has ended
    while process.poll() is None and not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        pass
    os.killpg(os.getpgrp(), signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _answers(page: str, process: subprocess.Popen) -> bool:
    """Wait until the page answers; False where its server ends, or takes too long."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with direct.open(page.partition("#")[0], timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)
    return False


def _stop(processes: list[subprocess.Popen]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)


if __name__ == "__main__":
    if sys.argv[1] == "leash":
        leash(sys.argv[2:])
    else:
        dashboard(Path(sys.argv[2]), int(sys.argv[3]))
