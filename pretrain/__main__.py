"""`python -m pretrain` is the console script `trainyard`."""

import sys

from pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
