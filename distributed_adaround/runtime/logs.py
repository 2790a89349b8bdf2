"""Log lines of this program on stderr. Only the command line configures them; as a library it stays silent."""

import logging
import sys

from distributed_adaround.errors import redact


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: a progress bar may have taken it over."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(redact(self.format(record)) + "\n")
            sys.stderr.flush()
        except OSError:
            self.handleError(record)


def configure(rank: int, world_size: int, debug: bool = False) -> None:
    """Send this program's log lines to stderr, each with its rank, in place of an earlier configuration.

    Rank 0 shows information, the other ranks warnings; `debug` shows everything on all ranks.
    """
    logger = logging.getLogger("distributed_adaround")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
        logger.removeHandler(handler)
    handler = _StderrHandler()
    pattern = f"%(asctime)s rank {rank}/{world_size} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(pattern, datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    # The job's model code may have configured the root logger; every line would then appear twice.
    logger.propagate = False
