"""`python -m distributed_adaround` and `torchrun ... -m distributed_adaround`."""

import os
import sys

from distributed_adaround.cli import main as run


def main() -> None:
    """Console script: run the command line and exit with its code."""
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "TORCHELASTIC_RUN_ID" in os.environ:
        # Taking the interpreter and a broken process group apart takes seconds, or for ever; all is said and saved.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
