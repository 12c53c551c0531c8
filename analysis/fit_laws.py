"""Which shape law do these ledgers give? `python analysis/fit_laws.py LEDGER... [--out DIR]` is `sovit fit`."""

import sys

from sovit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
