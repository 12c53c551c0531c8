"""Settings of the whole suite: one thread, deterministic examples, no network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of subprocesses


def pytest_configure(config):
    try:
        import hypothesis
    except ImportError:
        return
    hypothesis.settings.register_profile("sovit", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("sovit")
