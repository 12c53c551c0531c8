"""The pinned-asset fetcher, with stand-ins for npm on PATH: nothing here touches the network."""

import hashlib
import subprocess
import sys

import pytest

from sovit import UserError
from sovit.data import assets

CONTENT = b"a small package\n"


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """One pinned asset `toy`, an empty cache, and a function that installs a stand-in for npm."""
    pins = tmp_path / "assets.toml"
    fields = dict(registry="npm", package="@toy/box", version="1.0.0", file="toy.tgz", licence="MIT", use="tests")
    lines = [f'{key} = "{value}"' for key, value in fields.items()]
    lines += [f'sha256 = "{hashlib.sha256(CONTENT).hexdigest()}"', f"size = {len(CONTENT)}"]
    pins.write_text("[toy]\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr(assets, "PINS", pins)
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SOVIT_TOY", raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def install(body: str) -> None:
        program = programs / "npm"
        program.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        program.chmod(0o755)

    return install


def test_fetch_verifies_and_keeps_the_file(pinned, tmp_path):
    pinned(f"open('toy.tgz', 'wb').write({CONTENT!r}); open({str(tmp_path / 'argv')!r}, 'a').write(repr(sys.argv[1:]))")
    said = []
    kept = assets.fetch("toy", said.append)
    assert kept == tmp_path / "cache" / "assets" / "toy.tgz" and kept.read_bytes() == CONTENT
    assert (tmp_path / "argv").read_text() == "['pack', '--ignore-scripts', '@toy/box@1.0.0']"
    assert "@toy/box@1.0.0" in said[0] and str(kept) in said[-1]
    assert assets.path("toy") == kept
    assert assets.fetch("toy") == kept  # no second call: argv would have grown
    assert (tmp_path / "argv").read_text().count("pack") == 1
    assert [p.name for p in kept.parent.iterdir()] == ["toy.tgz"]


def test_wrong_hash_is_refused_and_not_kept(pinned, tmp_path):
    pinned("open('toy.tgz', 'wb').write(b'something else')")
    with pytest.raises(UserError, match="has SHA-256 .* instead of .* thrown away"):
        assets.fetch("toy")
    assert list((tmp_path / "cache" / "assets").iterdir()) == []


def test_damaged_cached_file_is_fetched_again(pinned, tmp_path):
    pinned(f"open('toy.tgz', 'wb').write({CONTENT!r})")
    assets.fetch("toy").write_bytes(b"cut short")
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_missing_client_names_the_remedy(pinned):
    with pytest.raises(UserError, match="needs 'npm', which is not on PATH; install Node.js"):
        assets.fetch("toy")


def test_failing_client_says_its_last_line(pinned, tmp_path):
    pinned("print('npm error 404 no such thing', file=sys.stderr); sys.exit(1)")
    with pytest.raises(UserError, match=r"ended with 1 \(npm error 404 no such thing\)") as caught:
        assets.fetch("toy")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "assets").iterdir()) == []


def test_client_that_leaves_nothing(pinned):
    pinned("pass")
    with pytest.raises(UserError, match="left 0 files instead of one"):
        assets.fetch("toy")


def test_cache_that_cannot_be_written(pinned, tmp_path, monkeypatch):
    pinned(f"open('toy.tgz', 'wb').write({CONTENT!r})")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match="the cache folder .*/file/assets cannot be written .*; set SOVIT_CACHE"
    ) as caught:
        assets.fetch("toy")
    assert "\n" not in str(caught.value)


def test_read_only_disk_is_noticed_and_nothing_is_left_on_another(tmp_path, monkeypatch):
    assert assets.writable(tmp_path / "new") == tmp_path / "new" and not list((tmp_path / "new").iterdir())

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(assets.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        assets.writable(tmp_path)


@pytest.mark.parametrize("has_pip", [True, False])
def test_a_wheel_is_brought_by_pip_which_builds_and_installs_nothing(pinned, tmp_path, monkeypatch, has_pip):
    """`python -m pip` where this Python has one, else the `pip` on PATH; its last line where it fails."""
    pins = assets.PINS.read_text().replace('"npm"', '"pypi"').replace("@toy/box", "toy-box")
    assets.PINS.write_text(pins)
    argv = tmp_path / "argv"
    pip = f"open({str(argv)!r}, 'w').write(repr(sys.argv[1:])); open('toy.tgz', 'wb').write({CONTENT!r})"
    if has_pip:
        python = tmp_path / "python"
        python.write_text(f"#!{sys.executable}\nimport sys\n{pip}\n")
        python.chmod(0o755)
        monkeypatch.setattr(assets.sys, "executable", str(python))
    else:
        monkeypatch.setattr(assets.importlib.metadata, "distributions", lambda name: [])
        with pytest.raises(UserError, match="needs 'pip', which is not on PATH; run: python -m ensurepip"):
            assets.fetch("toy")
        pinned(pip)
        (tmp_path / "bin" / "npm").rename(tmp_path / "bin" / "pip")
    assert assets.fetch("toy").read_bytes() == CONTENT
    words = ["download", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "toy-box==1.0.0"]
    assert argv.read_text() == repr(["-m", "pip"] * has_pip + words)


def test_path_prefers_the_environment_then_says_the_command(pinned, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="run: sovit assets fetch toy"):
        assets.path("toy")
    own = tmp_path / "own.tgz"
    own.write_bytes(b"mine")
    monkeypatch.setenv("SOVIT_TOY", str(own))
    assert assets.path("toy") == own
    monkeypatch.setenv("SOVIT_TOY", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="SOVIT_TOY=.*gone' is not a file"):
        assets.path("toy")


def test_unknown_asset_lists_the_known_ones(pinned):
    with pytest.raises(UserError, match="asset 'toi' is unknown; choose one of toy"):
        assets.path("toi")


def test_listing_says_what_is_here(pinned):
    assert assets.listing()[0]["path"] is None
    pinned(f"open('toy.tgz', 'wb').write({CONTENT!r})")
    kept = assets.fetch("toy")
    (row,) = assets.listing()
    assert row["path"] == str(kept) and row["licence"] == "MIT" and row["size"] == len(CONTENT)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SOVIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / "sovit"
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "here"))
    assert assets.cache_dir() == tmp_path / "here"


@pytest.mark.parametrize("asset", assets.load_pins().values(), ids=lambda asset: asset.name)
def test_pins_are_complete(asset):
    assert asset.registry in assets.CLIENTS and len(bytes.fromhex(asset.sha256)) == 32
    assert asset.size > 0 and asset.version in asset.file and "/" not in asset.file
    assert all(isinstance(word, str) for word in assets.CLIENTS[asset.registry](asset.package, asset.version))


def test_every_client_has_a_pin_and_a_remedy():
    assert assets.CLIENTS.keys() == assets.REMEDIES.keys() == {pin.registry for pin in assets.load_pins().values()}


def test_import_needs_only_the_standard_library():
    code = "import sys; import sovit.data.assets; print(sorted({'torch', 'numpy', 'datasets'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_look_for_pip_leaves_setuptools_alone():
    """`sovit profile` imports setuptools through torch, and failed after it."""
    work = "from sovit.data.assets import _pip_download; _pip_download('a', '1'); import torch.utils.benchmark"
    subprocess.run([sys.executable, "-c", work], check=True)
