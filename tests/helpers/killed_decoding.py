"""Run by test_stores: decode a set, and die by SIGKILL after NUM saves. Arguments: FOLDER STREAMED IMAGE_SIZE NUM."""

import math
import os
import signal
import sys
from pathlib import Path

from sovit.data.hub import decoding
from sovit.data.hub.splits import Location

folder, streamed, size, left = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
write = decoding.write_atomic


def write_and_die(path, text):
    global left
    write(path, text)
    left -= path.name == "progress.json"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


decoding.write_atomic = write_and_die
decoding.BLOCK, decoding.SAVE_SECONDS = 8, 0.0
decoding.decoded(Location(folder, Path(folder), folder, streamed=streamed), size, math.inf)
