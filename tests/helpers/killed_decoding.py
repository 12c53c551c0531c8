"""Run by test_stores: decode a set, and die by SIGKILL after NUM images. Arguments: FOLDER IMAGE_SIZE NUM."""

import itertools
import os
import signal
import sys
from pathlib import Path

from sovit.data.hub import decoding
from sovit.data.hub.splits import Location

folder, size, num = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
decode, count = decoding.decode, itertools.count()


def decode_or_die(file, size):
    if next(count) >= num:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(file, size)


decoding.decode, decoding.BLOCK = decode_or_die, 8
decoding.decoded(Location(folder, Path(folder), folder), size)
