"""Holds one rank of a real job at a known place until it is told to stop, so that no test depends on who is faster."""

import os
from pathlib import Path

# Python runs a sitecustomize.py in each process that finds one.
_SITE = """
import os

if os.environ.get("RANK", "0") == {rank!r} and not os.path.exists({mark!r}):
    import signal
    import time

    rename, left = os.replace, [{count}]

    def hold():
        told, before = [], signal.getsignal(signal.SIGTERM)

        def tell(*arguments):
            told.append(arguments)
            before(*arguments)

        signal.signal(signal.SIGTERM, tell)
        open({mark!r}, "w").close()
        while not told:
            time.sleep(0.01)

    def watched(source, target, **options):
        rename(source, target, **options)
        if {part!r} in str(target):
            left[0] -= 1
            if left[0] == 0:
                hold()

    os.replace = watched
"""


def hold(folder: Path, part: str, count: int = 1, rank: int = 0) -> tuple[Path, dict[str, str]]:
    """A mark, and the environment for a job whose rank stops when for the count-th time it has written a file whose
    path holds `part`: it writes the mark, and goes on when it gets SIGTERM. Once there is a mark no rank is held.

    folder: an empty one for the files of this.
    """
    folder.mkdir()
    mark = folder / "held"
    source = _SITE.format(rank=str(rank), mark=str(mark), count=count, part=part)
    (folder / "sitecustomize.py").write_text(source, encoding="utf-8")
    return mark, {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
