"""`python -m lightning_efficient` is `lightning-efficient`."""

import sys

from lightning_efficient.cli import main

if __name__ == "__main__":
    sys.exit(main())
