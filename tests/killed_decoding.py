"""Run by test_stores: decode a set, and die by SIGKILL after NUM saves. Arguments: PRESET IMAGE_SIZE NUM."""

import os
import signal
import sys

from sovit.data import open_data, store

left = int(sys.argv[3])
write = store.write_atomic


def write_and_die(path, text):
    global left
    write(path, text)
    left -= path.name == "progress.json"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


store.write_atomic = write_and_die
store.BLOCK, store.SAVE_SECONDS = 8, 0.0
open_data("hub", sys.argv[1], int(sys.argv[2]), 4, 0)
