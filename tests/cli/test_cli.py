"""The command line: what it prints, what it imports, how it refuses."""

import json
import subprocess
import sys

import pytest
from bench_start import COMMANDS, ROOT

from sovit.cli.main import main

PAPER = "--width 1152 --depth 27 --mlp-dim 4304 --head-dim 72 --patch-size 14 --image-size 224 --pool map --json"


def test_count_of_sovit_400m_as_printed_in_the_documentation(capsys):
    assert main(["count", *PAPER.split()]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["num_params"] == 427_680_704
    assert counts["num_tokens"] == 256
    assert counts["forward_flops"] == pytest.approx(221e9, rel=0.005)  # Table 1 of arXiv 2305.13035
    assert counts["train_flops_per_image"] == 3 * counts["forward_flops"]


def test_several_shapes_make_a_table_and_flags_override_names(capsys):
    assert main(["count", "B/16", "vit_base_patch16_224", "--image-size", "384"]) == 0
    out = capsys.readouterr().out
    assert "vit_base_patch16_224" in out and "577" in out and "576" in out  # with and without a class token


HEAVY = {"torch", "timm", "scipy", "optuna", "mlflow", "matplotlib", "datasets", "pandas", "transformers", "sqlalchemy"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_command_that_must_start_at_once_imports_nothing_heavy(command, tmp_path):
    code = (
        "import json, sys\nfrom sovit.cli.main import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as exit:\n    status = exit.code\n"
        "print(json.dumps([status, sorted(sys.modules)]))"
    )
    arguments = command.format(out=tmp_path / "out").split()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0 and done.stdout.count("\n") > 1
    assert not HEAVY & {name.split(".")[0] for name in modules}


REFUSED = (
    "export nobody --out x",
    "export law.json --out x",
    "export 0000000000-16 --out x --format onnx",
    "finetune nobody",
    "finetune nobody --train neck",
    "probe random:nobody --data icons:single40",
    "probe nobody --data icons:single41",
    "profile nothing",
    "data show icons:huge",
    "vlm train nobody",
    "vlm ask nobody",
)


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_not_there_is_refused_before_anything_heavy_is_imported(command, tmp_path):
    code = (
        "import json, sys\nfrom sovit.cli.main import main\n"
        "print(json.dumps([main(sys.argv[1:]), sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, cwd=tmp_path)
    status, modules = json.loads(done.stdout)
    assert status == 2 and done.stderr.startswith("sovit: ") and done.stderr.count("\n") == 1
    assert not (HEAVY - {"scipy"}) & {name.split(".")[0] for name in modules}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["count", "B/17"], "image_size=224 is not a multiple of patch_size=17"),
        (["count", "vit_bse_patch16_224"], "vit_base_patch16_224"),
        (["count"], "--width"),
        (["count", "--width", "100", "--depth", "1", "--mlp-dim", "8"], "head_dim=64"),
        (["cuont", "B/16"], 'Unknown command "cuont"'),
        (["count", "B/16", "--colour", "red"], "Unknown option: --colour; see sovit count --help"),
        (["count", "B/16", "--width", "1.5"], "'1.5' is not a whole number"),
        (["fit"], "LEDGERS"),
        (["fit", "nowhere.jsonl"], "no ledger at nowhere.jsonl"),
        (["predict", "nowhere.json", "--train-flops", "1e12"], "nowhere.json"),
        (
            ["export", "0000000000-16", "--out", "x", "--runs", "nowhere"],
            "no run '0000000000-16' in nowhere/ (it holds no runs); train a study first",
        ),
        (["export", "law.json", "--out", "x", "--config-only"], "--train-flops"),
        (["data", "show", "photos:cpu"], "stream, icons, hub"),
        (["data", "show", "stream:huge"], "cpu"),
        (["assets", "fetch", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("sovit: ")
    assert list(tmp_path.iterdir()) == []


def test_of_an_option_given_twice_the_last_value_counts(capsys):
    assert main(["count", "S/16", "--image-size", "32", "--image-size", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_size"] == 64


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 0)])
def test_a_stop_has_its_exit_status(stop, status, monkeypatch, capsys):
    def stopped(*_):
        raise stop

    monkeypatch.setattr("sovit.cli.train.named", stopped)
    monkeypatch.setattr("sys.stderr.close", lambda: None)
    assert main(["count", "B/16"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_without_a_command_help_is_printed_and_the_status_is_2(capsys):
    assert main([]) == main(["vlm"]) == 2
    assert "predict" in capsys.readouterr().out


def test_a_file_that_is_no_law_is_refused(tmp_path, capsys):
    path = tmp_path / "law.json"
    path.write_text('{"form": "joint"}')
    assert main(["predict", str(path), "--train-flops", "1e12"]) == 2
    assert f"{path}: not a law.json" in capsys.readouterr().err


def test_contact_sheet_of_the_stream_is_written(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["data", "show", "stream:cpu", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "chance loss 2.76" in capsys.readouterr().out
