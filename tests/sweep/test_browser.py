"""`sovit ui` in a real browser: a study's own numbers on MLflow's pages and on Optuna's dashboard, and a clean end.

SOVIT_SCREENSHOTS=FOLDER keeps pictures of what was seen.
"""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from planted_ledger import write_ledger
from planted_study import plant, planted_row, planted_runs

from sovit.sweep.queue import Sweep, open_storage, open_study, reconcile

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium and its driver are not installed"),
    pytest.mark.filterwarnings("ignore:The ``noload``"),  # MLflow's use of SQLAlchemy
]
pytest.importorskip("mlflow", reason="mlflow is not installed")
pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
PATIENCE = 180  # seconds for a page or a server, on a busy machine
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=2400,1600"""


class Ui:
    """A running `sovit ui` on a planted study, all but one row of which are in the ledger and the journal."""

    def __init__(self, folder):
        self.name, self.design = "planted", planted_runs()
        self.results, self.runs, self.rows = plant(folder, self.design)
        sweep = Sweep(self.name, self.design, self.runs, self.results / "planted.jsonl")
        with sweep.lock():  # makes the journal from the ledger, as for a store that was deleted
            reconcile(sweep, open_study(self.name, open_storage(sweep.storage), self.design), "browser")
        command = [sys.executable, "-m", "sovit", "ui", self.name, "--results", str(self.results)]
        # a suite in the background of a shell is deaf to Ctrl-C, and so would this be
        hears = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [*command, "--runs", str(self.runs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"PATH": os.defpath},  # an environment that is not activated: make calls its programs by path
        )
        signal.signal(signal.SIGINT, hears)
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=lambda: [self.lines.put(line) for line in self.process.stdout], daemon=True).start()

    def said(self, words):
        """The lines up to the first that has these words."""
        found, until = [], time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                found.append(self.lines.get(timeout=1))
            except queue.Empty:
                assert self.process.poll() is None, f"sovit ui ended: {found}"
                continue
            if words in found[-1]:
                return found
        raise AssertionError(f"{words!r} was not said: {found}")


@pytest.fixture(scope="module")
def ui(tmp_path_factory):
    running = Ui(tmp_path_factory.mktemp("ui"))
    try:
        said = running.said("Ctrl-C")
        running.pages = {line.split()[0]: line.split()[1] for line in said if "http://" in line}
        for page in running.pages.values():
            answers(page)
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)


def answers(page):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            return urllib.request.urlopen(page.partition("#")[0], timeout=30)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{page} does not answer")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


def open_page(browser, url):
    browser.get("about:blank")  # else only the part after # changes, and the page stays
    browser.get(url)


def seen(browser, wanted, name, text=None):
    """Wait until all of `wanted` stand on the page, and keep a picture of it if asked."""
    until, missing = time.monotonic() + PATIENCE, list(wanted)
    text = text or (lambda: browser.execute_script("return document.body.textContent"))
    while missing and time.monotonic() < until:
        page = text()
        missing = [word for word in missing if word not in page]  # a table shows its rows as it is scrolled
        time.sleep(0.5)
    if folder := os.environ.get("SOVIT_SCREENSHOTS"):
        time.sleep(3)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
    assert not missing, f"{name}: {missing} not on the page: {text()[:3000]}"


def run_ids(ui):
    from sovit.sweep.mlflow_log import open_store

    found = open_store(ui.runs / "mlflow.db").search_runs(["1"])
    return {run.data.tags["run_id"]: run.info.run_id for run in found}


def test_servers_listen_on_loopback_alone(ui):
    assert set(ui.pages) == {"MLflow", "Optuna"}
    for page in ui.pages.values():
        port = int(page.split(":")[2].split("/")[0])
        assert page.startswith(f"http://127.0.0.1:{port}/")
        assert listening_addresses(port) == {"0100007F"}  # 127.0.0.1


def listening_addresses(port):
    """Addresses, as the kernel writes them, on which anything listens at this port."""
    tables = [
        Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        for name in ("tcp", "tcp6")
        if Path(f"/proc/net/{name}").exists()
    ]
    sockets = [line.split() for table in tables for line in table]
    return {s[1].split(":")[0] for s in sockets if s[3] == "0A" and int(s[1].split(":")[1], 16) == port}


def test_the_experiments_page_shows_every_run(ui, browser):
    open_page(browser, ui.pages["MLflow"])
    names = [f"{w}x2x256 @{budget} s0" for w in (16, 32, 48) for budget in ("8e9", "2e10")]
    seen(browser, [*names, f"{len(ui.rows)} matching runs"], "runs")


def test_the_compare_page_shows_the_ledgers_own_numbers(ui, browser):
    ids = run_ids(ui)
    page = ui.pages["MLflow"].partition("#")[0]
    open_page(browser, f"{page}#/compare-runs?runs={json.dumps(list(ids.values()))}&experiments={json.dumps(['1'])}")
    losses = [f"{row['val_loss']:.4g}" for row in ui.rows]
    widths = sorted({f"{row['width']}x{row['depth']}x{row['mlp_dim']}" for row in ui.rows})
    assert len(set(losses)) == len(losses)

    def scrolled():
        """Every table scrolled on by some rows, and round; MLflow draws only the rows in sight."""
        browser.execute_script("""for (const e of document.querySelectorAll('div'))
            if (e.scrollHeight > e.clientHeight + 5 && e.clientHeight > 50)
                e.scrollTop = e.scrollTop + e.clientHeight >= e.scrollHeight - 2 ? 0 : e.scrollTop + 100""")
        time.sleep(0.3)
        return browser.execute_script("return document.body.textContent")

    seen(browser, [f"Comparing {len(ids)} Runs", "final/val_loss", *losses, *widths], "compare", scrolled)


def test_the_dashboard_shows_every_trial(ui, browser):
    last = {row["trunk_id"]: row for row in ui.rows}  # a trial's value is the loss at its trunk's largest budget
    expected = [f"Value{row['val_loss']}" for row in last.values()] + [f"width {row['width']}" for row in last.values()]
    study = f"{ui.pages['Optuna']}/studies/0"
    open_page(browser, f"{study}/trials?numbers=0,1,2")
    seen(browser, [f"{len(last)} Trials", *expected], "trials")
    open_page(browser, study)
    seen(browser, ["planted", "Best Trial", str(min(row["val_loss"] for row in last.values()))], "dashboard")


def test_what_joins_the_ledger_joins_the_page_and_ctrl_c_ends_all(ui, browser):
    more = planted_runs(budgets=(4e9,))[0]
    rows = [*ui.rows, planted_row(more, more.budgets[0])]
    write_ledger(ui.results / "planted.jsonl", sorted(rows, key=lambda row: row["run_id"]))
    ui.said("1 runs added")
    assert len(run_ids(ui)) == len(rows)

    group = descendants(ui.process.pid)
    assert len(group) >= 2
    ui.process.send_signal(signal.SIGINT)
    assert ui.process.wait(60) == 0
    until = time.monotonic() + 10
    while any(alive(pid) for pid in group) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in group if alive(pid)]
    for page in ui.pages.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(page.split(":")[2].split("/")[0])))


def descendants(pid):
    children: dict = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = []
    for child in children.get(pid, []):
        found += [child, *descendants(child)]
    return found


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
