"""Run by test_stores: decode a set, and die by SIGKILL after NUM saves. Arguments: FOLDER STREAMED IMAGE_SIZE NUM."""

import math
import os
import signal
import sys
from pathlib import Path

from sovit.data.hub import pixel_cache
from sovit.data.hub.splits import Location

folder, streamed, size, left = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
write = pixel_cache.write_atomic


def write_and_die(path, text):
    global left
    write(path, text)
    left -= path.name == "progress.json"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


pixel_cache.write_atomic = write_and_die
pixel_cache.BLOCK, pixel_cache.SAVE_SECONDS = 8, 0.0
pixel_cache.decoded(Location(folder, Path(folder), folder, streamed=streamed), size, math.inf)
