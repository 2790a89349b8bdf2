"""What all trials share: jobs with their undisturbed results, restarts as a launcher does them, and the verdict."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from distributed_adaround import cli
from tests.faults import jobs, launch
from tests.faults.injected import Fault
from tests.faults.jobs import Job

Record = dict[str, Any]
TRY_AGAIN = 75
_MAX_ATTEMPTS = 12


@dataclass
class Bench:
    """A folder to work in, the seeded draws of this run, and what the jobs publish when nothing disturbs them."""

    root: Path
    seed: int = 0
    names: Sequence[str] = jobs.NAMES
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    # How often a job is struck at any time from its start, which may come too late, and not while layers are solved.
    anytime: float = 0.25
    # For tests: a job is held at a commit until it is struck, the clock judges nothing, and undisturbed runs and
    # restarts are one rank in this process, since every start of torchrun costs seconds.
    steady: bool = False
    draw: random.Random = field(init=False)
    _jobs: dict[str, Job] = field(default_factory=dict)
    _references: dict[str, Path] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _outputs: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def job(self, name: str) -> Job:
        if name not in self._jobs:
            self._jobs[name] = jobs.prepare(name, self.root, **self.changes)
        return self._jobs[name]

    def reference(self, job: Job) -> Path:
        """Output of one rank alone that nothing disturbed. Do not write there."""
        if job.name not in self._references:
            output = self.root / f"reference-{job.name}"
            started = time.monotonic()
            if self.steady:
                code, text = run_here(job, output), "see above"
            else:
                attempt = launch.start(job, output, 1)
                code, text = attempt.wait(), attempt.text()[-3000:]
            if code != 0:
                raise SystemExit(f"{job.name}: the undisturbed run failed:\n{text}")
            self._references[job.name], self._seconds[job.name] = output, time.monotonic() - started
        return self._references[job.name]

    def seconds(self, job: Job) -> float:
        """How long the undisturbed run took."""
        self.reference(job)
        return self._seconds[job.name]

    def solving_seconds(self, job: Job) -> float:
        """How much of it went by between the first layer's start and the end."""
        found = events(self.reference(job))
        first, last = (datetime.fromisoformat(event["time"]) for event in (found[0], found[-1]))
        return (last - first).total_seconds()

    def start(self, job: Job, output: Path, ranks: int) -> tuple[launch.Attempt, Callable[[], bool]]:
        """Start a job that is to be struck, and whether the moment to strike has come. Thaw it when it is struck."""
        if self.steady:
            fault = Fault("freeze", "renamed", "commits/manifest.json", self.draw.randint(1, 4), 0)
            attempt = launch.start(job, output, ranks, fault=str(fault))
            return attempt, lambda: bool(attempt.frozen())
        attempt = launch.start(job, output, ranks)
        return attempt, moment(self, job, output, ranks, attempt)

    def finish(self, job: Job, output: Path, sizes: Iterable[int], verdict: Verdict, **options: Any) -> int:
        """Start the job until it is done, as a launcher does, with the given numbers of ranks.

        options: of launch.start. Returns the starts that it took.
        """
        if self.steady:
            code = run_here(job, output)
            verdict.expect(code == 0, f"in this process it ended with {code}")
            return 1
        for number, ranks in enumerate(sizes, start=1):
            attempt = launch.start(job, output, ranks, **options)
            code = exit_code(attempt, attempt.wait())
            verdict.ended(attempt)
            if code == 0:
                return number
            if code != TRY_AGAIN or number == _MAX_ATTEMPTS:
                tail = " / ".join(attempt.text().splitlines()[-4:])
                verdict.problems.append(f"attempt {number} on {ranks} ranks ended with {code}: {tail[-600:]}")
                return number
        return 0

    def in_time(self, seconds: float, limit: float) -> bool:
        return self.steady or seconds <= limit

    def output(self) -> Path:
        """A folder that no run has used."""
        self._outputs += 1
        return self.root / f"out-{self._outputs}"


@dataclass
class Verdict:
    """What is wrong after a trial; nothing, if it went well."""

    problems: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def ended(self, attempt: launch.Attempt) -> None:
        """The launcher has ended: nothing of it may be left."""
        self.problems += attempt.leftovers()

    def same_bytes(self, output: Path, reference: Path) -> None:
        """A finished job: what the undisturbed run published, and no temporary file."""
        found, wanted = jobs.published(output), jobs.published(reference)
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        self.expect(not odd, f"other bytes than the undisturbed run: {', '.join(odd)}")
        left = [str(path.relative_to(output)) for path in output.rglob("*.tmp")]
        self.expect(not left, f"temporary files left: {', '.join(left)}")

    def whole(self, output: Path, reference: Path) -> None:
        """A job that was ended by force: every file that has its name is whole."""
        wanted = jobs.published(reference)
        for name, digest in jobs.published(output).items():
            self.expect(digest == wanted[name], f"{name} is not whole")
        manifest = output / "commits" / "manifest.json"
        for layer in json.loads(manifest.read_bytes())["layers"] if manifest.exists() else ():
            data = (output / "commits" / layer["file"]).read_bytes()
            self.expect(hashlib.sha256(data).hexdigest() == layer["sha256"], f"{layer['file']} is not what was named")
        for path in (*output.rglob("*.json"), *output.rglob("*.jsonl")):
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                self.expect(_is_json(line), f"{path.name} holds what is no JSON: {line[:80]}")

    def record(self, trial: str, job: Job, case: str, **figures: Any) -> Record:
        seconds = round(time.monotonic() - self.started, 1)
        return {"trial": trial, "job": job.name, "case": case, "ok": not self.problems, "problems": self.problems,
                "seconds": seconds, **figures}  # fmt: skip


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def exit_code(attempt: launch.Attempt, returncode: int) -> int:
    """What the ranks of an attempt ended with: torchrun makes 1 of everything, but a rank that fails leaves a note.

    Ranks that were killed leave none: try again.
    """
    path = attempt.scratch / "status.json"
    if returncode == 0 or not path.exists():
        return TRY_AGAIN if returncode else 0
    return int(json.loads(path.read_text(encoding="utf-8"))["exit_code"])


def run_here(job: Job, output: Path) -> int:
    """One rank in this process, whose exit code is returned."""
    with chdir(job.folder):
        return cli.main([job.path.name, "--set", f"output.uri={output}"])


def moment(bench: Bench, job: Job, output: Path, ranks: int, attempt: launch.Attempt) -> Callable[[], bool]:
    """When to strike: at any time (`Bench.anytime`), else in one of the next layers, or in the export."""
    # Two cores: several ranks take longer than one.
    slower = 1.6 if ranks > 1 else 1.0
    if bench.draw.random() < bench.anytime:
        after = bench.draw.uniform(0.2, slower * bench.seconds(job))
        return lambda: attempt.seconds > after
    of = jobs.committed(bench.reference(job))
    # A few layers on, so that several kills of one job spread over its length.
    layers = min(of, jobs.committed(output) + bench.draw.randint(0, 3))
    after = bench.draw.uniform(0, slower * bench.solving_seconds(job) / of)
    started, begun = len(starts(output)), []

    def reached() -> bool:
        if not begun and len(starts(output)) > started and jobs.committed(output) >= layers:
            begun.append(attempt.seconds)
        return bool(begun) and attempt.seconds > begun[0] + after

    return reached


def events(output: Path) -> list[Record]:
    """What rank 0 wrote down."""
    path = output / "events" / "rank-0.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def starts(output: Path) -> list[Record]:
    """The attempts that came as far as the first layer."""
    return [event for event in events(output) if event["event"] == "start"]


def seconds_to_next_layer(output: Path, since: float) -> float | None:
    """From a time (of time.time) to the first new layer behind it, or to the end where none was left to do."""
    for event in events(output):
        written = datetime.fromisoformat(event["time"]).timestamp()
        new = event["event"] == "done" or (event["event"] == "layer" and not event["resumed"])
        if new and written > since:
            return round(written - since, 1)
    return None
