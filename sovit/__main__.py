"""`python -m sovit` is the command `sovit`."""

import sys

from sovit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
