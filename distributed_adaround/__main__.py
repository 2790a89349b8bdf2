"""`python -m distributed_adaround` and `torchrun ... -m distributed_adaround`."""

from __future__ import annotations

import sys

from distributed_adaround.cli import main as run


def main() -> None:
    """Console script: run the command line and exit with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
