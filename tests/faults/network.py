"""Two hosts, as network namespaces joined by a cable: one is killed or loses power, the cable is cut, packets get lost.

Needs root, `ip` (iproute2) and `nft` (nftables). Both hosts see the same disk. Each has one rank under a torchrun of
its own; a launcher on each host starts it again when it ends, and both are restarted together.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults import jobs, launch
from tests.faults.jobs import Job
from tests.faults.trial import Bench, Record, Verdict, seconds_to_next_layer, starts

TIMEOUT = 15
_CONF = "join_timeout=60"
_MAX_ROUNDS = 6
_ADDRESSES = ("10.77.0.1", "10.77.0.2")

# What is done to a running job.
Fault = Callable[["Hosts", Sequence[launch.Attempt]], None]


class Hosts:
    """The two namespaces. Names hold the process id, so several trials can go on at once."""

    def __init__(self) -> None:
        self.names = [f"ft{os.getpid()}-{host}" for host in (0, 1)]
        self._cables = [f"ft{host}" for host in (0, 1)]

    def __enter__(self) -> Hosts:
        for name in self.names:
            _run("ip", "netns", "add", name)
        (a, b), (first, second) = self._cables, self.names
        _run("ip", "link", "add", a, "netns", first, "type", "veth", "peer", "name", b, "netns", second)
        for name, cable, address in zip(self.names, self._cables, _ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", cable, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            _run("ip", "netns", "delete", name)

    def cable(self, up: bool) -> None:
        _run("ip", "-n", self.names[0], "link", "set", self._cables[0], "up" if up else "down")

    @contextmanager
    def losing(self, percent: int) -> Iterator[None]:
        """Both hosts lose so many of the packets that come in."""
        for name, cable in zip(self.names, self._cables, strict=True):
            rule = f'iifname "{cable}" numgen random mod 100 < {percent} drop;'
            text = f"table inet loss {{ chain input {{ type filter hook input priority 0; {rule} }}; }}"
            _run("ip", "netns", "exec", name, "nft", text)
        try:
            yield
        finally:
            for name in self.names:
                _run("ip", "netns", "exec", name, "nft", "delete table inet loss")

    def start(
        self, job: Job, output: Path, host: int, number: int, options: Sequence[str], conf: str = _CONF
    ) -> launch.Attempt:
        """torchrun on one host. number: of the round, for a rendezvous that no earlier round has used."""
        return launch.start(
            job,
            output,
            1,
            settings=[f"runtime.timeout_minutes={TIMEOUT / 60}"],
            torchrun=[
                *options,
                # By its address alone torchrun does not know the host of the rendezvous.
                f"--rdzv-conf={conf},is_host={int(host == 0)}",
                f"--rdzv-id=round-{number}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={_ADDRESSES[0]}:{29400 + number}",
                f"--local-addr={_ADDRESSES[host]}",
            ],
            prefix=("ip", "netns", "exec", self.names[host]),
            extra_environment={"GLOO_SOCKET_IFNAME": self._cables[host], "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "4"},
        )


def run(bench: Bench, options: Namespace) -> Iterator[Record]:
    """options.count: rounds of all cases."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nft")):
        raise SystemExit("this trial needs root, ip (apt-get install iproute2) and nft (apt-get install nftables)")
    with Hosts() as hosts:
        for _ in range(options.count):
            for case, (strike, ended) in CASES.items():
                job = bench.job(bench.draw.choice(bench.names))
                yield one_case(bench, hosts, job, case, strike, ended)
            for percent in (2, 10):
                yield one_lossy(bench, hosts, bench.job(bench.draw.choice(bench.names)), percent)
            yield one_shrink(bench, hosts, bench.job(bench.draw.choice(bench.names)))


def _kill(host: int) -> Fault:
    def strike(_: Hosts, attempts: Sequence[launch.Attempt]) -> None:
        attempts[host].kill_all()

    return strike


def _power_cut(hosts: Hosts, attempts: Sequence[launch.Attempt]) -> None:
    """Nobody hears from the host any more, not even that its connections are closed."""
    hosts.cable(up=False)
    attempts[1].kill_all()
    attempts[0].wait()
    hosts.cable(up=True)


def _cut_for(seconds: float) -> Fault:
    def strike(hosts: Hosts, _: Sequence[launch.Attempt]) -> None:
        hosts.cable(up=False)
        time.sleep(seconds)
        hosts.cable(up=True)

    return strike


# Case -> (what happens, whether the attempt ends by it).
CASES: dict[str, tuple[Fault, bool]] = {
    "second host killed": (_kill(1), True),
    "first host killed": (_kill(0), True),
    "second host loses power": (_power_cut, True),
    "cable cut for 5 s": (_cut_for(5), False),
    "cable cut for 60 s": (_cut_for(60), True),
}


def one_case(bench: Bench, hosts: Hosts, job: Job, case: str, strike: Fault, ends: bool) -> Record:
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    options = ("--nnodes=2", "--max-restarts=0")
    attempts = [hosts.start(job, output, host, 0, options) for host in (0, 1)]
    layers = bench.draw.randrange(1, jobs.committed(reference) - 2)
    verdict.expect(attempts[0].wait_until(lambda: jobs.committed(output) >= layers), "it ended before the fault")
    struck, before = time.monotonic(), time.time()
    strike(hosts, attempts)
    codes = [attempt.wait() for attempt in attempts]
    end = round(time.monotonic() - struck, 1)
    verdict.expect((codes != [0, 0]) == ends, f"the launchers ended with {codes}")
    for attempt in attempts:
        verdict.ended(attempt)
    verdict.whole(output, reference)
    rounds = _restart(hosts, job, output, options, verdict) if ends else 0
    verdict.same_bytes(output, reference)
    back = seconds_to_next_layer(output, before)
    return verdict.record("network", job, case, end_seconds=end, recovery_seconds=back, rounds=rounds)


def _restart(hosts: Hosts, job: Job, output: Path, options: Sequence[str], verdict: Verdict) -> int:
    """Both hosts, again and again until both are done. Returns the rounds needed."""
    for number in range(1, _MAX_ROUNDS):
        attempts = [hosts.start(job, output, host, number, options) for host in (0, 1)]
        codes = [attempt.wait() for attempt in attempts]
        for attempt in attempts:
            verdict.ended(attempt)
        if codes == [0, 0]:
            return number
    verdict.problems.append(f"not done after {_MAX_ROUNDS} rounds: {attempts[0].text()[-300:]}")
    return _MAX_ROUNDS


def one_lossy(bench: Bench, hosts: Hosts, job: Job, percent: int) -> Record:
    """A collective may take longer than the timeout by it; then both hosts start again."""
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    options = ("--nnodes=2", "--max-restarts=0")
    with hosts.losing(percent):
        rounds = _restart(hosts, job, output, options, verdict)
    verdict.same_bytes(output, reference)
    plain = round(bench.seconds(job), 1)
    return verdict.record("network", job, f"{percent} % of packets lost", plain_seconds=plain, rounds=rounds)


def one_shrink(bench: Bench, hosts: Hosts, job: Job) -> Record:
    """`--nnodes=1:2`: the second host dies for good, the first goes on alone without a restart from outside."""
    reference, output, verdict = bench.reference(job), bench.output(), Verdict()
    options, conf = ("--nnodes=1:2", "--max-restarts=3"), f"{_CONF},last_call_timeout=3"
    attempts = [hosts.start(job, output, host, 0, options, conf) for host in (0, 1)]
    verdict.expect(attempts[0].wait_until(lambda: jobs.committed(output) >= 1), "it ended before the fault")
    both = starts(output)[-1]["world_size"] == 2
    before = time.time()
    attempts[1].kill_all()
    code = attempts[0].wait()
    for attempt in attempts:
        verdict.ended(attempt)
    verdict.expect(both, "the hosts did not begin together")
    verdict.expect(code == 0, f"the first host ended with {code}: {attempts[0].text()[-300:]}")
    verdict.expect(starts(output)[-1]["world_size"] == 1, "it did not go on alone")
    verdict.same_bytes(output, reference)
    back = seconds_to_next_layer(output, before)
    return verdict.record("network", job, "second host gone, --nnodes=1:2", recovery_seconds=back)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
