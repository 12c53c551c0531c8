"""`sovit status`, `track` and `ui`: look at a study."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sovit import UserError
from sovit.cli.common import Folders, Json, Whole, show


def status(
    study: str,
    /,
    *,
    folders: Folders = Folders(),
    watch: Annotated[list[float] | None, Parameter(consume_multiple=(0, 1))] = None,
    json: Json = False,
) -> None:
    """Tell what of a study is done, running, waiting, failed, and the best so far.

    Args:
        study: name of the study
        watch: refresh every N seconds (default 2)
    """
    from sovit.sweep import status as library
    from sovit.sweep import status_text

    if watch is None:
        found = library.study_status(study, folders.runs, folders.results)
        return show(vars(found) if json else found, status_text.status_text, json)
    if json:
        raise UserError("--watch draws on a terminal; leave out --json")
    (seconds,) = watch or [2.0]
    if not seconds > 0:
        raise UserError(f"--watch {seconds:g} must be above 0 seconds")
    status_text.watch(study, folders.runs, folders.results, seconds)


def track(study: str, /, *, folders: Folders = Folders(), store: Path | None = None, json: Json = False) -> None:
    """Fill MLflow's store with a study, from its ledger and its training curves.

    Args:
        study: a study's name, or the path of a ledger
        store: the SQLite file, made again if deleted (default RUNS/mlflow.db)
    """
    from sovit.sweep.mlflow_log import fill, fill_text

    show(fill(study, folders.results, folders.runs, store), fill_text, json)


def ui(study: str, /, *, folders: Folders = Folders(), store: Path | None = None, port: Whole | None = None) -> int:
    """Open a study in MLflow and, where there is one, its queue in Optuna's dashboard.

    Args:
        study: a study's name, or the path of a ledger
        store: the SQLite file, made again if deleted (default RUNS/mlflow.db)
        port: MLflow's; the dashboard takes the next (default 5000, or the next that is free)
    """
    from sovit.sweep.dashboards import serve

    return serve(study, folders.results, folders.runs, store, port)
