"""The sweep: every trunk exactly once, whatever is killed when; the records are the truth and Optuna a queue."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fake_sweep
import optuna
import pytest
from fake_sweep import loss_of, runs
from kill_rounds import FAULTS, kill_rounds
from optuna.trial import TrialState

from sovit import UserError
from sovit.files import CannotWrite, is_locked, locked
from sovit.ledger.ledger import read_ledger
from sovit.ledger.records import write_record
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import launch, queue
from sovit.sweep import study_main as sweep_study_main
from sovit.sweep import worker as sweep
from sovit.train.trainer import train

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)


def executions(folder, word="end"):
    """run_id -> how often it began or ended."""
    path = Path(folder) / "executions"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith(word))


def num_ended(folder):
    return sum(executions(folder).values())


def trials(folder, name="s"):
    study = optuna.load_study(
        study_name=name, storage=queue.open_storage(f"journal:{Path(folder) / 'runs' / name}.journal")
    )
    return study.get_trials(deepcopy=False)


def held(folder, design):
    return [run for run in design if is_locked(Path(folder) / "runs" / run.trunk_id / "lock")]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def pids_begun(folder):
    path = Path(folder) / "executions"
    lines = path.read_text().splitlines() if path.exists() else []
    ended = {line.split()[1] for line in lines if line.startswith("end")}
    return [int(line.split()[2]) for line in lines if line.startswith("begin") and line.split()[1] not in ended]


def expect_exactly_once(folder, design, rows):
    asked = {i for run in design for i in run.run_ids}
    assert {row["run_id"] for row in rows} == asked >= set(executions(folder, "begin"))  # none lost, none unasked
    assert set(executions(folder).values()) == {1}  # none doubled
    assert rows == read_ledger(Path(folder) / "s.jsonl")
    by_seed = {run.init_seed: run for run in design}
    assert all(row["val_loss"] == loss_of(by_seed[row["init_seed"]], row["num_examples"]) for row in rows)
    complete = Counter(t.user_attrs["trunk_id"] for t in trials(folder) if t.state == TrialState.COMPLETE)
    assert complete == {run.trunk_id: 1 for run in design}


# exactly once --------------------------------------------------------------------------------------------------------


def tuned(bases, times=2):
    """Fine-tunings of the last branch of each base."""
    bases = [base for base in bases for _ in range(times)]
    return [
        fake_sweep.runs(1)[0].replace(base=base.run_ids[-1], trained="attention", init_seed=100 + i)
        for i, base in enumerate(bases)
    ]


def test_fine_tunings_wait_for_their_base_and_workers_for_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SOVIT_TEST_PAUSE", "0.4")  # long enough for both workers to be up before the end
    (base,) = runs(1, (1600, 3200))
    design = [*tuned([base], 12), base]  # asked for before what they stand on
    rows = fake_sweep.launch(tmp_path, design, workers=2)
    expect_exactly_once(tmp_path, design, rows)
    events = [line.split() for line in (tmp_path / "executions").read_text().splitlines()]
    order = [event[:2] for event in events]
    for run in design[:-1]:
        assert order.index(["end", base.run_ids[-1]]) < order.index(["begin", run.run_ids[0]])
    assert len({pid for _, _, pid in events}) == 2  # the second had nothing to do at first, and did not leave
    assert {t.params.get("trained") for t in trials(tmp_path)} == {None, "attention"}


def test_a_base_that_fails_holds_nothing_up_for_ever(tmp_path):
    base = runs(1)[0].replace(init_seed=666)
    rows = fake_sweep.launch(tmp_path, [*tuned([base], 1), base], workers=2)
    assert Counter(row["status"] for row in rows) == {"ok": 1, "failed": 1}  # the real training would refuse the first


def test_a_base_in_its_last_attempt_is_still_waited_for(tmp_path):
    (base,) = runs(1)
    (tuning,) = tuned([base], 1)
    opened = fake_sweep.opened(tmp_path, [base, tuning])
    study = queue.open_study("s", queue.open_storage(opened.storage), [base, tuning])
    for _ in range(queue.MAX_ATTEMPTS - 1):  # its worker was killed
        assert queue.reconcile(opened, study, "token") == 1
        study.ask()
    assert queue.reconcile(opened, study, "token") == 1
    study.ask()
    with locked(tmp_path / "runs" / base.trunk_id / "lock"):
        assert queue.reconcile(opened, study, "token") == 1
        assert not queue.is_waiting(study)
    assert queue.reconcile(opened, study, "token") == 0  # given up: the fine-tuning says what it lacks
    assert queue.is_waiting(study)


@pytest.mark.parametrize("where", ["another study", "only a ledger"])
def test_a_base_without_weights_is_refused_before_anything_is_trained(tmp_path, where):
    (base,) = runs(1)
    (tuning,) = tuned([base], 1)
    if where == "only a ledger":
        fake_sweep.launch(tmp_path, [base])
        shutil.rmtree(tmp_path / "runs")
    opened = fake_sweep.opened(tmp_path, [tuning] if where == "another study" else [base, tuning])
    with pytest.raises(UserError, match=f"begins at {base.run_ids[0]}, whose weights are not in .*; copy them there"):
        sweep_study_main.run_sweep(opened, 1)
    sweep_study_main.refuse_missing_bases(
        fake_sweep.opened(tmp_path, [base, tuning], "t")
    )  # there it is still to be trained


def test_a_sweep_without_trouble(tmp_path):
    design = runs(6, (1600, 3200))
    rows = fake_sweep.launch(tmp_path, design, workers=2)
    expect_exactly_once(tmp_path, design, rows)
    found = trials(tmp_path)
    assert len(found) == 6  # an empty queue made up no point
    for trial in found:
        run = Run.from_dict(trial.user_attrs["run"])
        assert trial.value == loss_of(run, 3200)  # the largest budget's
        assert (
            trial.params["width"] == 16
            and trial.params["peak_lr"] == 0.008
            and trial.params["init_seed"] == run.init_seed
        )
        assert trial.user_attrs["run_ids"] == list(run.run_ids)
    assert len({pid for pid in (tmp_path / "executions").read_text().split() if pid.isdigit()}) == 2


def test_a_second_launch_does_nothing(tmp_path):
    design = runs(3)
    rows = fake_sweep.launch(tmp_path, design)
    text = (tmp_path / "s.jsonl").read_text()
    assert fake_sweep.launch(tmp_path, design) == rows
    expect_exactly_once(tmp_path, design, rows)
    assert (tmp_path / "s.jsonl").read_text() == text
    assert len(trials(tmp_path)) == 3


def test_a_killed_worker_is_replaced_and_its_trunk_done_again(tmp_path):
    design = runs(8)
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "8", "2"]
    launcher = subprocess.Popen(command)
    killed = set()
    for kills in (1, 2):
        wait_for(lambda least=2 * kills: num_ended(tmp_path) >= least and set(pids_begun(tmp_path)) - killed)
        pid = (set(pids_begun(tmp_path)) - killed).pop()
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    assert launcher.wait(60) == 0
    rows = read_ledger(tmp_path / "s.jsonl")
    expect_exactly_once(tmp_path, design, rows)
    assert sum(executions(tmp_path, "begin").values()) <= 10  # only what was killed in the middle began twice
    states = Counter(t.state for t in trials(tmp_path))
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    assert states[TrialState.FAIL] == 2


@pytest.mark.slow
def test_everything_killed_and_launched_again(tmp_path):
    design = runs(12)
    for attempt in range(3):
        command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "12", "2"]
        launcher = subprocess.Popen(command, start_new_session=True)
        wait_for(lambda least=2 * (attempt + 1): num_ended(tmp_path) >= least and pids_begun(tmp_path))
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        time.sleep(0.05)
    assert sum(executions(tmp_path).values()) < 12
    rows = fake_sweep.launch(tmp_path, design)
    expect_exactly_once(tmp_path, design, rows)
    assert not [t for t in trials(tmp_path) if not t.state.is_finished()]


@pytest.mark.slow
def test_a_killed_launcher_leaves_workers_that_stop_and_nothing_is_doubled(tmp_path):
    """Only the launcher dies; its workers end the trunk they are on while the next launch is under way."""
    design = runs(6)
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "6", "2"]
    launcher = subprocess.Popen(command)
    wait_for(lambda: pids_begun(tmp_path))
    launcher.kill()
    launcher.wait()
    for _ in range(3):  # the last trunk may still be with a worker of the first launch
        rows = fake_sweep.launch(tmp_path, design)
        if not fake_sweep.opened(tmp_path, design).pending():
            break
    expect_exactly_once(tmp_path, design, read_ledger(tmp_path / "s.jsonl"))
    assert len(rows) == 6


@pytest.mark.slow
def test_two_launchers_of_one_study_share_the_work(tmp_path):
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "12", "2"]
    launchers = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in launchers] == [0, 0]
    rows = read_ledger(tmp_path / "s.jsonl")
    expect_exactly_once(tmp_path, runs(12), rows)
    assert not list((tmp_path / "runs").glob("*.plan.json"))


def test_a_relaunch_waits_for_what_an_orphan_still_trains(tmp_path):
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "1", "1"]
    first = subprocess.Popen(command, env=os.environ | {"SOVIT_TEST_PAUSE": "4"})
    wait_for(lambda: pids_begun(tmp_path))
    first.kill()
    first.wait()
    rows = fake_sweep.launch(tmp_path, runs(1))
    expect_exactly_once(tmp_path, runs(1), rows)
    assert len(executions(tmp_path, "begin")) == 1


def test_a_trunk_in_the_hands_of_another_study_holds_up_nobody_else(tmp_path):
    design = runs(4)
    found = fake_sweep.opened(tmp_path, design)
    with locked(found.runs_dir / design[0].trunk_id / "lock"):
        process = subprocess.Popen([sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "4", "2"])
        wait_for(lambda: num_ended(tmp_path) == 3)  # all but the one that is held
    assert process.wait(60) == 0
    expect_exactly_once(tmp_path, design, read_ledger(tmp_path / "s.jsonl"))


def test_rows_of_another_design_are_refused_without_a_journal_too(tmp_path):
    fake_sweep.launch(tmp_path, runs(2))
    shutil.rmtree(tmp_path / "runs")
    other = [run.replace(init_seed=run.init_seed + 100) for run in runs(2)]
    before = (tmp_path / "s.jsonl").read_text()
    with pytest.raises(UserError, match="does not ask for"):
        fake_sweep.launch(tmp_path, other)
    assert (tmp_path / "s.jsonl").read_text() == before


@pytest.mark.slow
def test_rounds_of_kills(tmp_path):
    """The short form of `python tests/bench/kill_rounds.py`."""
    found = kill_rounds(2, workers=2, quiet_rounds=1)
    assert {name: found[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0), found
    assert found["kills"] and found["points"] == 120


# a trial that is told while another is about to tell it ---------------------------------------------------------------


class TellsFirst:
    """A study whose worker comes first: trial `number` is told, and its lock freed, between the read and the tell."""

    def __init__(self, study, number, worker, after_the_check=False):
        self.study, self.number, self.worker, self.after_the_check = study, number, worker, after_the_check

    def __getattr__(self, name):
        return getattr(self.study, name)

    def tell(self, trial, *values, **how):
        number = trial if isinstance(trial, int) else trial.number
        if number == self.number and self.worker:
            worker, self.worker = self.worker, None
            worker()
            if self.after_the_check:
                raise optuna.exceptions.UpdateFinishedTrialError("told since")
        return self.study.tell(trial, *values, **how)


def taken_up(folder, design):
    """The sweep, its study and one trial that a worker took up; of all other trunks a trial waits."""
    found = fake_sweep.opened(folder, design)
    study = queue.open_study("s", queue.open_storage(found.storage), list(found.runs.values()))
    with found.lock():
        queue.reconcile(found, study, "token")
    return found, study, study.ask()


@pytest.mark.parametrize("after_the_check", [False, True])
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_trial_told_by_its_worker_meanwhile_is_told_once(tmp_path, ends, after_the_check):
    """`reconcile` reads it as RUNNING and its lock as free; the worker was just done with both."""
    found, study, trial = taken_up(tmp_path, runs(2))
    run = Run.from_dict(trial.user_attrs["run"])

    def worker():
        if ends == "badly":
            return sweep._tell_result(study, trial, None, "RuntimeError: out of luck")
        write_record(found.runs_dir, fake_sweep.new_row(run, 1600, status="ok", num_classes=16, val_loss=2.5))
        return sweep._tell_result(study, trial, 2.5, "")

    now = queue.look(found, TellsFirst(study, trial.number, worker, after_the_check), "token")
    for _ in range(2):
        assert [t.state for t in study.trials] == [
            TrialState.COMPLETE if ends == "well" else TrialState.FAIL,
            TrialState.WAITING,
        ]
        assert (len(now.done), now.num_pending) == ((1, 1) if ends == "well" else (0, 2))
        assert now.is_waiting and not now.in_training and not now.num_abandoned
        now = queue.look(found, study, "token")


@pytest.mark.parametrize("value", [2.5, None])
def test_a_worker_whose_trial_was_given_up_meanwhile_goes_on(tmp_path, value):
    _, study, trial = taken_up(tmp_path, runs(1))
    study.tell(trial.number, state=TrialState.FAIL)
    sweep._tell_result(study, trial, value, "RuntimeError: out of luck")
    assert [t.state for t in study.trials] == [TrialState.FAIL]
    with pytest.raises(ValueError):  # what is no race is an error still
        queue._tell(study, study.ask(), value=[1.0, 2.0], state=TrialState.COMPLETE)


def test_a_trial_given_up_while_its_worker_waits_for_the_lock_is_left(tmp_path):
    """Another study held the trunk; between its end and the next try, `reconcile` saw nobody at it."""
    found, study, trial = taken_up(tmp_path, runs(1))
    lock = found.runs_dir / trial.user_attrs["trunk_id"] / "lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "a") as holder:
        assert queue.look(found, study, "token").num_abandoned == 1
        assert not sweep._await_lock(found, study, trial, holder, lambda: True)
        assert sweep._await_lock(found, study, study.ask(), holder, lambda: True)  # enqueued anew
        assert not queue.look(found, study, "token").num_abandoned - 1


def test_somebody_who_looks_at_a_lock_does_not_keep_it_from_a_worker(tmp_path):
    with open(tmp_path / "lock", "a") as holder, open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        threading.Timer(sweep.LOOK_SECONDS / 4, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        assert sweep._try_lock(holder)


def test_a_status_that_cannot_be_drawn_ends_nothing(tmp_path, monkeypatch):
    """The live display reads files that somebody may delete while workers train."""
    found = fake_sweep.opened(tmp_path, runs(2))
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    before = queue.Snapshot({}, 2, (), True, 0)
    with launch._display(found, before) as show:  # no design.json beside the runs
        show(before, ["a line"])


def test_a_worker_that_cannot_begin_leaves_with_a_status_of_its_own(tmp_path, capsys):
    plan = tmp_path / "plan.json"
    found = fake_sweep.opened(tmp_path, runs(1))
    found.ledger.write_text("not a row\n")
    asked = dict(
        name="s", runs=[r.to_dict() for r in found.runs.values()], runs_dir=str(found.runs_dir), metric="val_loss"
    )
    plan.write_text(json.dumps(asked | dict(ledger=str(found.ledger), storage=found.storage)))
    assert sweep.work(plan) == queue.CANNOT_WRITE
    assert capsys.readouterr().err.count("\n") == 1


def test_a_lock_in_a_folder_that_cannot_be_made_is_no_crash(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"), locked(tmp_path / "file" / "lock"):
        pass


def test_a_worker_that_crashes_is_said_and_replaced(tmp_path, capfd):
    """By an error of its own, whose exit status is not one of those that a worker leaves with."""
    crashing = tmp_path / "crashing.py"
    crashing.write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\nimport fake_sweep\n"
        "from sovit.sweep.worker import work\n"
        "def crash(*_, **__): raise SystemExit('no more')\n"
        "mark = Path(__file__).with_name('crashed')\n"
        "train = fake_sweep.fake_train if mark.exists() else crash\nmark.touch()\n"
        "sys.exit(work(Path(sys.argv[2]), train))\n"
    )
    command = [sys.executable, str(crashing), str(Path(__file__).parents[1] / "helpers")]
    rows = launch.launch(fake_sweep.opened(tmp_path, runs(3)), 1, worker_command=command)
    assert len(rows) == 3 and set(executions(tmp_path).values()) == {1}
    said = [line for line in capfd.readouterr().err.splitlines() if "died" in line]
    assert re.fullmatch(rf"s: worker \d+ died with exit status 1 and is replaced; see {tmp_path}/runs/s.log", *said)


# stopping ------------------------------------------------------------------------------------------------------------


def expect_dead(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_polite_kill_stops_the_workers_and_names_the_command_that_goes_on(tmp_path):
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "8", "2"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(pids_begun(tmp_path)) == 2)
    pids = pids_begun(tmp_path)
    launcher.terminate()
    assert launcher.wait(30) != 0
    said = launcher.stderr.read()
    assert "stopping: waiting for 2 workers to save" in said
    done, go_on = re.search(r"s: stopped with (\d) of 8 trunks done; go on with: (.*)", said).groups()
    assert 2 <= len(read_ledger(tmp_path / "s.jsonl")) == int(done) < 8
    assert executions(tmp_path, "begin") == executions(tmp_path, "end")  # each ended what it was at
    expect_dead(pids)
    subprocess.run(go_on, shell=True, check=True)
    expect_exactly_once(tmp_path, runs(8), read_ledger(tmp_path / "s.jsonl"))
    assert not [t for t in trials(tmp_path) if "error" in t.user_attrs]


def test_a_worker_that_is_stopped_leaves_its_trunk_to_the_others(tmp_path):
    launcher = subprocess.Popen([sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "6", "2"])
    wait_for(lambda: len(pids_begun(tmp_path)) == 2)
    stopped = pids_begun(tmp_path)[0]
    os.kill(stopped, signal.SIGTERM)
    assert launcher.wait(60) == 0
    expect_exactly_once(tmp_path, runs(6), read_ledger(tmp_path / "s.jsonl"))
    lines = [line.split() for line in (tmp_path / "executions").read_text().splitlines()]
    assert len({pid for _, _, pid in lines}) == 2  # nobody took its place: it was asked to leave
    assert len([pid for word, _, pid in lines if word == "begin" and int(pid) == stopped]) < 4


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(tmp_path):
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "3", "2"]
    slow = os.environ | {"SOVIT_TEST_PAUSE": "60"}
    launcher = subprocess.Popen(command, env=slow, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(pids_begun(tmp_path)) == 2)
    pids = pids_begun(tmp_path)
    launcher.send_signal(signal.SIGINT)
    while "stopping" not in launcher.stderr.readline():
        pass
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(10) != 0
    assert "stopped with 0 of 3 trunks done; go on with: " in launcher.stderr.read()
    expect_dead(pids)
    assert not held(tmp_path, runs(3)) and not list((tmp_path / "runs").glob("*.plan.json"))


@pytest.mark.slow
def test_a_worker_that_does_not_leave_is_killed_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.5)
    monkeypatch.setenv("SOVIT_TEST_PAUSE", "60")

    def interrupt():
        wait_for(lambda: pids_begun(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt, match="stopped with 0 of 1 trunks done; go on with: "):
        fake_sweep.launch(tmp_path, runs(1))
    expect_dead(pids_begun(tmp_path))


def test_a_full_disk_stops_the_workers_and_is_no_runs_failure(tmp_path):
    design = [runs(1)[0].replace(init_seed=999), *runs(2)]
    assert fake_sweep.launch(tmp_path, design) == []
    log = (tmp_path / "runs" / "s.log").read_text().splitlines()
    assert (
        log[-1]
        == "sovit: cannot write trunk-1280.pt: No space left on device; free some space, and run the same command again"
    )
    assert set(executions(tmp_path, "begin")) == {design[0].run_ids[0]}  # nor were the others tried in vain


@pytest.mark.slow
def test_a_trunk_that_kills_its_worker_is_given_up(tmp_path):
    design = [*runs(2), runs(1)[0].replace(init_seed=888)]
    rows = fake_sweep.launch(tmp_path, design)
    assert {row["init_seed"] for row in rows} == {0, 1}
    assert executions(tmp_path, "begin")[design[2].run_ids[0]] == queue.MAX_ATTEMPTS
    assert fake_sweep.opened(tmp_path, design).pending() == [design[2].replace(study="s")]


def test_looking_at_a_lock_does_not_take_it(tmp_path):
    """Two who look at once, a worker and the launcher's display, must both see that nobody trains."""
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # somebody who looks
        assert not is_locked(tmp_path / "lock")
    with open(tmp_path / "lock") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)  # somebody who trains
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "none")


# the journal ---------------------------------------------------------------------------------------------------------


def test_a_deleted_journal_is_rebuilt_without_training(tmp_path):
    design = runs(4, (1600, 3200))
    rows = fake_sweep.launch(tmp_path, design)
    before = sorted((t.user_attrs["trunk_id"], t.value, sorted(t.params.items())) for t in trials(tmp_path))
    (tmp_path / "runs" / "s.journal").unlink()
    assert fake_sweep.launch(tmp_path, design) == rows
    assert sorted((t.user_attrs["trunk_id"], t.value, sorted(t.params.items())) for t in trials(tmp_path)) == before
    expect_exactly_once(tmp_path, design, rows)


def test_a_torn_journal_is_mended(tmp_path):
    design = runs(4)
    fake_sweep.launch(tmp_path, design[:2])
    journal = tmp_path / "runs" / "s.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:30])  # a kill in the middle of a line
    rows = fake_sweep.launch(tmp_path, design)
    expect_exactly_once(tmp_path, design, rows)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert journal.read_bytes().startswith(whole)


def test_a_torn_line_is_mended_by_whoever_appends_next(tmp_path):
    """The kill comes while other workers have the journal open."""
    path = tmp_path / "j"
    first, second = (queue.open_storage(f"journal:{path}") for _ in range(2))
    study = optuna.create_study(study_name="a", storage=first)
    other = optuna.load_study(study_name="a", storage=second)
    study.enqueue_trial({})
    with open(path, "ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "x')
    assert other.ask().number == 0
    study.enqueue_trial({})
    assert (
        len(other.get_trials())
        == len(optuna.load_study(study_name="a", storage=queue.open_storage(f"journal:{path}")).trials)
        == 2
    )


def test_the_journals_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "j"
    queue.open_storage(f"journal:{path}")
    code = (
        "import sys, time; from sovit.sweep.queue import JournalLock\n"
        "lock = JournalLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    started = time.monotonic()
    optuna.create_study(study_name="a", storage=queue.open_storage(f"journal:{path}"))
    assert time.monotonic() - started < 5  # Optuna's own lock waits 30 s here


def test_a_spoilt_journal_says_what_to_do(tmp_path):
    fake_sweep.launch(tmp_path, runs(1))
    journal = tmp_path / "runs" / "s.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0], "{spoilt\n", *lines[1:]]))
    with pytest.raises(UserError, match="the journal .*s.journal is damaged .* delete it"):
        fake_sweep.launch(tmp_path, runs(2))


def test_sqlite_is_refused(tmp_path):
    for url in (f"sqlite:///{tmp_path}/a.db", "sqlite+pysqlite:///:memory:"):
        with pytest.raises(UserError, match="SQLite repeats and loses trials; leave --storage out"):
            queue.open_storage(url)
    with pytest.raises(UserError, match="cannot open --storage nonsense"):
        queue.open_storage("nonsense")


# designs -------------------------------------------------------------------------------------------------------------


def test_a_design_may_grow(tmp_path):
    fake_sweep.launch(tmp_path, runs(2))
    design = runs(3, (1600, 3200))
    rows = fake_sweep.launch(tmp_path, design)
    assert len(rows) == 6 and set(executions(tmp_path).values()) == {1}
    # the shorter branch was paid for: the longer one is billed from where it left the trunk
    assert {row["spent_flops"] for row in rows if row["num_examples"] == 3200} == {
        (3200 - 1280) * fake_sweep.SHAPE.train_flops_per_image(16)
    }


@pytest.mark.parametrize("other", [runs(1), runs(2, (3200,)), runs(3)[1:]])
def test_another_design_under_the_same_name_is_refused(tmp_path, other):
    study = queue.open_study("s", queue.open_storage(f"journal:{tmp_path}/j"), runs(2))
    queue.open_study("t", study._storage, other)
    with pytest.raises(UserError, match="a study named 's' with another design exists; .* --name"):
        queue.open_study("s", study._storage, other)
    queue.open_study("s", study._storage, runs(2))


def test_one_trunk_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="study 's' names one trunk twice"):
        fake_sweep.opened(tmp_path, [*runs(2), *runs(1, (3200,))])


# failures ------------------------------------------------------------------------------------------------------------


def test_a_failing_run_is_recorded_and_the_sweep_goes_on(tmp_path):
    bad = runs(1, (1600, 3200))[0].replace(init_seed=666)
    design = [bad, *runs(3)]
    rows = fake_sweep.launch(tmp_path, design)
    assert [row["status"] for row in rows if row["init_seed"] != 666] == ["ok"] * 3
    failed = [row for row in rows if row["init_seed"] == 666]
    assert [row["num_examples"] for row in failed] == [1600, 3200]
    for row in failed:
        assert (row["status"], row["error"]) == ("failed", "RuntimeError: out of memory")
        unknown = (
            "val_loss",
            "val_error",
            "num_classes",
            "head_params",
            "head_flops",
            "train_flops",
            "spent_flops",
            "seconds",
        )
        assert [row[name] for name in unknown] == [None] * len(unknown)
    assert executions(tmp_path, "begin")[bad.run_ids[0]] == 1  # an error is not tried again in the same launch
    (trial,) = [t for t in trials(tmp_path) if t.state == TrialState.FAIL]
    assert trial.user_attrs["error"] == "RuntimeError: out of memory"
    fake_sweep.launch(tmp_path, design)
    assert executions(tmp_path, "begin")[bad.run_ids[0]] == 2  # but in the next one
    assert sum(executions(tmp_path).values()) == 3


def test_a_run_that_does_not_fit_into_memory_fails_by_itself(tmp_path):
    rows = fake_sweep.launch(tmp_path, [runs(1)[0].replace(init_seed=555), *runs(2)])
    assert sorted((row["status"], row.get("error")) for row in rows if row["init_seed"] == 555) == [
        ("failed", "out of memory with one sample at a time")
    ]
    assert [row["status"] for row in rows if row["init_seed"] != 555] == ["ok"] * 2


def test_a_diverged_run_is_a_result(tmp_path):
    design = [runs(1)[0].replace(init_seed=777), *runs(1)]
    rows = fake_sweep.launch(tmp_path, design)
    assert sorted(row["status"] for row in rows) == ["diverged", "ok"]
    assert not fake_sweep.opened(tmp_path, design).pending()
    fake_sweep.launch(tmp_path, design)
    assert set(executions(tmp_path).values()) == {1}


# what is done --------------------------------------------------------------------------------------------------------


def test_rows_of_the_ledger_count_as_done(tmp_path):
    design = runs(3, (1600, 3200))
    rows = fake_sweep.launch(tmp_path, design)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    short = [row for row in rows if row["num_examples"] == 1600 or row["init_seed"] == 0]
    (elsewhere / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    again = fake_sweep.launch(elsewhere, design)
    assert executions(elsewhere) == {run.run_id(3200): 1 for run in design[1:]}
    assert len(again) == 6
    whole = {row["spent_flops"] for row in again if row["num_examples"] == 3200 and row["init_seed"]}
    assert whole == {3200 * fake_sweep.SHAPE.train_flops_per_image(16)}  # there was no trunk to go on from


def test_a_damaged_record_is_measured_again_unless_the_ledger_has_it(tmp_path, capfd):
    design = runs(2, (1600, 3200))
    rows = fake_sweep.launch(tmp_path, design)
    record = tmp_path / "runs" / design[0].trunk_id / "records" / f"{design[0].run_ids[0]}.json"
    record.write_text(record.read_text()[:40])
    assert fake_sweep.launch(tmp_path, design) == rows
    assert set(executions(tmp_path).values()) == {1}
    assert capfd.readouterr().err.count(f"the record {record} is damaged and counts as missing") == 1
    (tmp_path / "s.jsonl").unlink()
    again = fake_sweep.launch(tmp_path, design)
    assert executions(tmp_path) == dict.fromkeys((i for run in design for i in run.run_ids), 1) | {record.stem: 2}
    incidental = ("date", "commit_dirty", "seconds")
    assert [r | dict.fromkeys(incidental) for r in again] == [r | dict.fromkeys(incidental) for r in rows]


def test_a_trial_that_waits_for_what_is_done_meanwhile_trains_nothing(tmp_path):
    """The ledger learned of it (from another machine) after the trial was enqueued."""
    design = runs(2)
    found = fake_sweep.opened(tmp_path, design)
    found.runs_dir.mkdir()
    study = queue.open_study("s", queue.open_storage(found.storage), list(found.runs.values()))
    with found.lock():
        queue.reconcile(found, study, "earlier")
    rows = [
        fake_sweep.new_row(r, 1600, status="ok", num_classes=16, val_loss=loss_of(r, 1600)) for r in found.runs.values()
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    write_record(found.runs_dir, rows[1])
    fake_sweep.launch(tmp_path, [*design, *runs(3)[2:]])
    assert executions(tmp_path, "begin") == {runs(3)[2].run_ids[0]: 1}


# the command line of a study -----------------------------------------------------------------------------------------


SHAPES = (fake_sweep.SHAPE, Shape(8, 1, 16, head_dim=8, patch_size=4, image_size=16, pool="none"))


def tiny_runs():
    return [Run(shape, Recipe(peak_lr=0.008, warmup_examples=160), (1600,)) for shape in SHAPES]


def study_main(folder, *arguments):
    paths = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return sweep_study_main.main("A tiny study.", "tiny", tiny_runs, [*paths, *arguments])


def test_a_study_from_the_command_line_with_real_training(tmp_path, capsys):
    assert study_main(tmp_path, "--workers", "2", "recipe.peak_lr=0.004") == 0
    rows = read_ledger(tmp_path / "results" / "tiny.jsonl")
    assert {(row["width"], row["status"], row["peak_lr"], row["study"]) for row in rows} == {
        (8, "ok", 0.004, "tiny"),
        (16, "ok", 0.004, "tiny"),
    }
    assert all(row["val_loss"] < row["zero_line"] for row in rows)
    out = capsys.readouterr()
    assert "tiny.jsonl has 2 rows: 2 ok, 0 diverged, 0 failed" in out.out
    assert "[2/2]" in out.err
    # again: nothing to do; and the same numbers in one process
    assert study_main(tmp_path, "recipe.peak_lr=0.004") == 0
    assert "all 2 trunks are done already" in capsys.readouterr().err
    alone = [train(r.replace(recipe=Recipe(0.004, warmup_examples=160)), tmp_path / "alone")[0] for r in tiny_runs()]
    assert {row["run_id"]: row["val_loss"] for row in alone} == {row["run_id"]: row["val_loss"] for row in rows}


LAUNCH = """
import json, sys
from pathlib import Path
from sovit.sweep.launch import launch
from sovit.spec.run import Run
from sovit.sweep.queue import Sweep
try:
    launch(Sweep("tiny", [Run.from_dict(json.loads(Path("run.json").read_text()))], Path("runs"), Path("tiny.jsonl")), 1)
except KeyboardInterrupt as stop:
    print(stop)
"""


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path):
    """Ctrl-C at a terminal: every process of the launch has it, and the workers the launcher's SIGTERM on top."""
    design = tiny_runs()[0].replace(budgets=(9600,))
    (tmp_path / "run.json").write_text(json.dumps(design.to_dict()))
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = tmp_path / "runs" / design.trunk_id
    wait_for((folder / "progress.json").exists, 120)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(60) == 0
    assert launcher.stdout.read().startswith("tiny: stopped with 0 of 1 trunks done; go on with: ")
    log = (tmp_path / "runs" / "tiny.log").read_text().splitlines()
    assert re.search(rf"sovit: {design.trunk_id} stopped after \d+ steps; launch the study again to go on", log[-1])
    assert (folder / "latest.pt").exists() and not (folder / "records").exists()  # nor one that says failed
    seen = []
    (row,) = train(design, tmp_path / "runs", on_progress=seen.append)
    assert seen[0]["examples"] > 50 * 16
    (alone,) = train(design, tmp_path / "alone")
    assert {k: row[k] for k in row if k.startswith("val_")} == {k: alone[k] for k in alone if k.startswith("val_")}
    weights = f"{design.trunk_id}/{design.run_ids[0]}.safetensors"
    assert (tmp_path / "runs" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()


@pytest.mark.slow
def test_an_interrupted_study_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt("tiny: stopped; go on with: this")

    monkeypatch.setattr(sweep_study_main, "launch", interrupted)
    assert study_main(tmp_path) == 130
    assert capsys.readouterr().err == "\ntiny: stopped; go on with: this\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["recipe.lr=1"], "unknown key in 'recipe.lr=1'"),
        (["shape.width=16", "shape.mlp_dim=32"], "names one trunk twice"),
        (["preset=tpu"], "preset='tpu' is unknown"),
        (["--storage", "sqlite:///x.db"], "SQLite"),
        (["shape.patch_size=8"], "patch_size=8 does not divide"),
        (["shape.pool=avg"], "use pool=none"),
        (["--device", "warp"], "--device warp cannot be used"),
        (["--device", "warp", "--dry-run"], "--device warp cannot be used"),
        (["--runs", "/proc/nowhere"], "cannot write /proc/nowhere"),
    ],
)
def test_bad_input_stops_a_study_before_it_starts(tmp_path, capsys, arguments, message):
    assert study_main(tmp_path, *arguments) == 2
    captured = capsys.readouterr()
    line = captured.err.removesuffix("\n")
    assert line.startswith("sovit: ") and "\n" not in line and re.search(message, line), line
    assert not list(tmp_path.rglob("*.pt")) and not (tmp_path / "results").exists()


def test_exit_status_of_a_study_that_is_not_done(tmp_path, capsys, monkeypatch):
    """Workers that cannot even start leave trunks undone: that is not success, and is not tried for ever."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)\n")
    real = launch.launch
    monkeypatch.setattr(
        sweep_study_main, "launch", lambda *arguments: real(*arguments, worker_command=[sys.executable, str(broken)])
    )
    assert study_main(tmp_path) == 1
    said = capsys.readouterr().err
    assert "2 trunks are not done" in said
    assert "died with exit status 3 and is replaced" in said and "died with exit status 3 and is not replaced" in said


def test_overrides_may_stand_on_both_sides_of_options(tmp_path, capsys):
    assert study_main(tmp_path, "recipe.peak_lr=0.004", "--workers", "0", "recipe.batch_size=32") == 2
    assert "--workers 0" in capsys.readouterr().err


def test_overridden_fine_tunings_begin_at_the_overridden_base():
    """Not at the one that an earlier study, of another recipe, may have left under its old name."""
    (base,) = runs(1, (1600, 3200))
    design = [base, *tuned([base], 1)]
    found = sweep_study_main.overridden(design, ["recipe.peak_lr=0.004"])
    assert [run.recipe.peak_lr for run in found] == [0.004, 0.004]
    assert found[1].base == found[0].run_ids[-1] != design[1].base
    assert sweep_study_main.overridden(design, []) == design
    with pytest.raises(UserError, match=f"takes away {base.run_ids[-1]}"):
        sweep_study_main.overridden(design, ["budgets=[1600]"])
