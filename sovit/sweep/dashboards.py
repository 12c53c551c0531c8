"""`sovit ui STUDY`: MLflow's pages on a study's ledger and Optuna's dashboard on its journal, both on loopback alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from sovit import UserError
from sovit.ledger.ledger import study_ledger
from sovit.sweep.mlflow_log import beside, fill, fill_text

HOST = "127.0.0.1"
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def serve(study: str, results: Path | None, runs: Path, store: Path | None = None, port: int | None = None) -> int:
    """Fill the store, start the servers, say where they are, and refill as the ledger grows, until Ctrl-C or SIGTERM.

    Returns 0, or 1 where a server ended by itself. Raises UserError for bad input and for a port that cannot be had.
    """
    if port is not None and not 0 < port < 65535:
        raise UserError(f"invalid port {port}; use 1 to 65534")
    port = _free_port(range(5000, 5100) if port is None else range(port, port + 1))
    store, ledger = store or runs / "mlflow.db", study_ledger(study, results, runs)
    seen = ledger.stat().st_mtime_ns if ledger.exists() else 0  # before the fill, which takes its time
    done = fill(study, results, runs, store)
    where = [
        "--backend-store-uri",
        f"sqlite:///{store.resolve()}",
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    commands = {"MLflow": [sys.executable, "-m", "mlflow", "ui", *where]}
    print(f"{fill_text(done)}\nMLflow  http://{HOST}:{port}/#/experiments/{done['experiment_id']}/runs")
    journal, dashboard = runs / f"{done['study']}.journal", Path(sysconfig.get_path("scripts"), "optuna-dashboard")
    if journal.exists() and dashboard.exists():
        second = _free_port(range(port + 1, min(port + 100, 65536)))
        commands["Optuna"] = [str(dashboard), str(journal), "--host", HOST, "--port", str(second)]
        print(f"Optuna  http://{HOST}:{second}/dashboard")
    elif journal.exists():
        print("Optuna's dashboard is not installed; pip install 'sovit[dashboard]'")
    print("they answer in some seconds; Ctrl-C stops", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    processes, env = {}, os.environ | ENVIRONMENT
    with open(beside(store, ".log"), "w", encoding="utf-8") as log:
        try:
            for name, command in commands.items():  # a session of its own: we end whatever the server has started
                processes[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            while not (ended := [name for name in processes if processes[name].poll() is not None]):
                time.sleep(0.5)
                if ledger.exists() and (now := ledger.stat().st_mtime_ns) != seen:
                    seen = now
                    print(fill_text(fill(study, results, runs, store)), flush=True)
            print(f"sovit: {ended[0]} ended; see {log.name}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            _stop(list(processes.values()))


def _free_port(ports: range) -> int:
    why: str | None = "none is left"
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # which a listener still refuses
            try:
                probe.bind((HOST, port))
                return port
            except OSError as error:
                why = error.strerror
    raise UserError(f"port {ports.start} cannot be used ({why}); choose another")


def _stop(processes: list[subprocess.Popen]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
