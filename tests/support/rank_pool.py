"""A pool of spawned workers that run a function as the ranks of a fresh gloo group.

Workers are started when first needed. They are forked from a server that has imported what ranks import, which costs
seconds, and has done nothing else: autograd's threads would not survive that. After any failure the whole pool is
killed; the next call starts another one.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

# torch.export reads the last one when it is first called.
_PRELOAD = ["torch", "torch.distributed", "distributed_adaround.job", "torch._dynamo", "torch.export._trace"]


class WorkerError(AssertionError):
    """A rank raised, died or was too slow; the message holds what is known of it."""


class RankPool:
    """`run(function, world_size, *arguments)` returns the results of all ranks, in rank order."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *arguments: object, timeout: float = 600) -> list[Any]:
        """Call `function(*arguments)` on ranks 0 to world_size - 1, inside an initialised gloo group.

        function: at the top level of a file. Arguments and results are pickled. timeout: seconds for the whole call.
        """
        self._start(world_size - len(self._workers))
        source = sys.modules[function.__module__].__file__
        with tempfile.TemporaryDirectory() as folder:
            call = (str(source), function.__name__, f"file://{folder}/store", world_size, timeout)
            for rank, (_, pipe) in enumerate(self._workers[:world_size]):
                pipe.send_bytes(pickle.dumps((*call, rank, arguments)))
            return self._collect(world_size, time.monotonic() + timeout)

    def _start(self, num_workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))

    def _collect(self, world_size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        open_pipes: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world_size])}
        while open_pipes:
            ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(open_pipes.values(), "did not finish in time")
                break
            for pipe in ready:
                rank = open_pipes.pop(pipe)
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._workers[rank][0].join(5)
                    good, value = False, f"died with exit code {self._workers[rank][0].exitcode}"
                (results if good else failures)[rank] = value
            if failures:
                # The peers of a failed rank wait for it: give them no more than a moment.
                deadline = min(deadline, time.monotonic() + 5)
        if failures:
            self.kill()
            raise WorkerError("\n".join(f"rank {rank} of {world_size}: {failures[rank]}" for rank in sorted(failures)))
        return [results[rank] for rank in range(world_size)]

    def kill(self) -> None:
        """End all workers. The next `run` starts new ones."""
        for worker, pipe in self._workers:
            worker.kill()
            worker.join()
            pipe.close()
        self._workers = []


def _serve(pipe: Connection) -> None:
    """Life of a worker: one call after the other, each in a group of its own."""
    import torch
    import torch.distributed as dist
    from quick_exports import remember

    torch.set_num_threads(1)
    remember()
    gc.freeze()
    functions: dict[str, ModuleType] = {}
    while True:
        try:
            source, name, store, world_size, timeout, rank, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if source not in functions:
                functions[source] = _load(source)
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
            )
            torch.manual_seed(0)
            try:
                # A rank that is done takes its group down, and a slow one that still connects would fail.
                dist.barrier()
                answer = (True, getattr(functions[source], name)(*arguments))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            data = pickle.dumps(answer)
        except BaseException:
            data = pickle.dumps((False, "raised\n" + traceback.format_exc()))
        pipe.send_bytes(data)


def _load(source: str) -> ModuleType:
    """The test file as a module: pytest's importlib mode gives tests no importable names."""
    name = f"rank_functions_{Path(source).stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
