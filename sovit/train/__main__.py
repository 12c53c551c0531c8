"""`python -m sovit.train RUN.json`: train one run where only torch and timm are installed."""

import sys

from sovit.train.command import main

if __name__ == "__main__":
    sys.exit(main())
