"""Fault trials on the real program: `python -m tests.faults TRIAL --out DIR [--count N] [--seed S]`.

Each trial does something bad to whole jobs and compares what they publish with an undisturbed run of one rank. Every
case is one line on the screen and in DIR/results.jsonl; the exit code is 1 when one went wrong.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from tests.faults import jobs, launch, records
from tests.faults.trial import Bench, Record

Trial = Callable[[Bench, argparse.Namespace], Iterator[Record]]
# Name, which is also that of the module -> (default of --count, what it does).
TRIALS = {
    "kills": (10, "SIGKILL at random moments; count: kills"),
    "saves": (20, "SIGKILL inside a save; count: cases"),
    "worlds": (3, "1, 2, 3, 4 and 8 ranks; count: restarts on another number, for each job"),
    "disk": (12, "full, read-only, without inodes, file size limit; count: cases"),
    "stop": (12, "SIGTERM and SIGUSR2, once and twice; count: cases"),
    "hang": (9, "SIGSTOP of one rank; count: cases"),
    "network": (1, "two hosts: killed, cut off, lossy, shrinking; count: rounds"),
    "elastic": (8, "torchrun --max-restarts restarts killed ranks; count: kills"),
    "clock": (1, "the clock jumps; count: rounds"),
    "crowd": (1, "four jobs at once; count: crowds"),
    "soak": (30, "faults of all kinds at random; count: minutes"),
    "mutate": (10_000, "odd job files, damaged files, odd numbers; count: job files"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.trial == "table":
        print(records.table(options.out))
        return 0
    # So that an interrupted harness leaves no process, mount or network behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fault-trials-") as folder:
        try:
            return _run(Bench(Path(folder), options.seed, options.job), options)
        finally:
            launch.end_all()


def _run(bench: Bench, options: argparse.Namespace) -> int:
    # mutate needs hypothesis, which the others do without.
    trial: Trial = import_module(f"tests.faults.{options.trial}").run
    bad = 0
    started = time.monotonic()
    run = {"run": datetime.now(UTC).isoformat(), "seed": options.seed, "command": _command(options)}
    for record in trial(bench, options):
        bad += not record["ok"]
        records.append(options.out, {**record, **run})
        mark = "ok  " if record["ok"] else "BAD "
        print(f"{mark} {record['job']}: {record['case']} ({record['seconds']} s)", flush=True)
        for problem in record["problems"]:
            print(f"     {problem}", flush=True)
    print(f"{options.trial}: {bad} went wrong, {time.monotonic() - started:.0f} s")
    return min(bad, 1)


def _command(options: argparse.Namespace) -> str:
    chosen = "" if tuple(options.job) == jobs.NAMES else f" --job {' '.join(options.job)}"
    return f"python -m tests.faults {options.trial} --count {options.count} --seed {options.seed}{chosen}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="trial", required=True, metavar="TRIAL")
    for name, (count, text) in TRIALS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--count", type=int, default=count, help="default: %(default)s")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--job", nargs="+", choices=jobs.NAMES, default=jobs.NAMES)
        sub.add_argument("--out", type=Path, default=Path("fault-trials"), help="folder for results.jsonl")
    table = commands.add_parser("table", help="Markdown table of the latest figures")
    table.add_argument("--out", type=Path, default=Path("fault-trials"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
