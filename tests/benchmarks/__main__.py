"""The benchmark: `python -m tests.benchmarks {layers,networks,block,table,plot} ...`, from the root of a clone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import records
from tests.benchmarks.configurations import ANCESTOR, CASES, DEFAULT_SOLVERS, FORMATS, TRAJECTORIES, solver_sections

# --quick: enough to see that everything works.
_QUICK_SAMPLES, _QUICK_STEPS, _QUICK_ANCESTOR = (64, 32), 30, (2, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Loading a model is not what is reported here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    layers = commands.add_parser("layers", help="one layer at a time behind a float prefix")
    _add_common(layers)
    layers.add_argument("--every", type=int, default=1, help="take each n-th layer only")
    layers.add_argument("--trajectories", action="store_true", help="several numbers of steps, for error over seconds")
    layers.set_defaults(run=_layers)
    networks = commands.add_parser("networks", help="whole networks, with their own metrics; a process for each run")
    _add_common(networks)
    networks.add_argument("--ranks", type=int, default=1, help="processes of each run (not of the ancestor)")
    networks.add_argument("--ancestor-layers", type=int, help="measure so many layers of it, extrapolate its time")
    networks.add_argument("--ancestor-steps", type=int, help="measure so many steps of it, extrapolate its time")
    networks.set_defaults(run=_networks)
    one = commands.add_parser("one", help="one run of networks, as networks starts it")
    one.add_argument("job", type=json.loads)
    one.set_defaults(run=_one)
    block = commands.add_parser("block", help="seconds of one synthetic decoder block, beside bare matrix products")
    _add_out(block)
    block.add_argument("--solver", nargs="+", default=("gram-bare@1000",))
    block.add_argument("--format", choices=tuple(FORMATS), default="int4")
    block.add_argument("--scale", type=int, default=1, help="divides all sizes; 16 runs on a CPU")
    block.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    block.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="in every spec")
    block.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    block.add_argument("--seed", type=int, default=0)
    block.set_defaults(run=_block)
    plot = commands.add_parser("plot", help="error against seconds, in OUT/layers.png and OUT/networks.png")
    _add_out(plot)
    plot.set_defaults(run=_plot)
    table = commands.add_parser("table", help="Markdown tables of OUT/results.jsonl, in OUT/results.md too")
    _add_out(table)
    table.set_defaults(run=_table)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and what is made from it")


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_out(parser)
    parser.add_argument(
        "--cases",
        type=Path,
        default=os.environ.get("ADAROUND_CASES"),
        help="folder with the modules of the cases; default: the environment variable ADAROUND_CASES",
    )
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    parser.add_argument("--solver", nargs="+", default=DEFAULT_SOLVERS, help="of configurations.py; NAME@N: N steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--vary-samples", action="store_true", help="each seed draws samples of its own")
    parser.add_argument("--samples", nargs=2, type=int, metavar=("CALIBRATION", "HELD_OUT"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="in every spec")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", action="store_true", help="also runs that have a line already")
    parser.add_argument("--quick", action="store_true", help="few samples and steps: does everything work?")


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What both parts take, checked."""
    if options.cases is None:
        sys.exit("name the folder with the cases: --cases DIR or the environment variable ADAROUND_CASES")
    solvers, settings, samples = list(options.solver), list(options.set), options.samples
    if options.quick:
        samples = samples or _QUICK_SAMPLES
        settings.insert(0, f"rounding.max_iter={_QUICK_STEPS}")
        solvers = [name.partition("@")[0] for name in solvers]
    for name in solvers:
        if name.partition("@")[0] != ANCESTOR:
            solver_sections(name)
    return {
        "folder": Path(options.cases).resolve(),
        "out": options.out,
        "formats": options.format,
        "solvers": list(dict.fromkeys(solvers)),
        "seeds": options.seeds,
        "settings": settings,
        "samples": None if samples is None else tuple(samples),
        "vary_samples": options.vary_samples,
        "device": options.device,
        "again": options.again,
    }


def _layers(options: argparse.Namespace) -> None:
    from tests.benchmarks.layers import LayerOptions, run_case

    options.solver = [*options.solver, *(TRAJECTORIES if options.trajectories else ())]
    chosen = _chosen(options)
    skipped = [name for name in chosen["solvers"] if name.partition("@")[0] == ANCESTOR]
    if skipped:
        sys.exit(f"{', '.join(skipped)}: works on whole networks; use `networks`, or the solver seed here")
    for name in options.case:
        run_case(CASES[name], LayerOptions(**chosen, every=options.every))


def _networks(options: argparse.Namespace) -> None:
    from tests.benchmarks.networks import NetworkOptions, run_networks

    partial = (options.ancestor_layers, options.ancestor_steps)
    if options.quick and partial == (None, None):
        partial = _QUICK_ANCESTOR
    run_networks(NetworkOptions(**_chosen(options), cases=options.case, ranks=options.ranks, partial=partial))


def _one(options: argparse.Namespace) -> None:
    from tests.benchmarks.network_run import run

    run(options.job)


def _block(options: argparse.Namespace) -> None:
    from tests.benchmarks.block import BlockOptions, run_block

    run_block(
        BlockOptions(
            out=options.out,
            solvers=options.solver,
            number_format=options.format,
            settings=options.set,
            scale=options.scale,
            precision=options.precision,
            device=options.device,
            seed=options.seed,
        )
    )


def _plot(options: argparse.Namespace) -> None:
    from tests.benchmarks.plot import draw

    for path in draw(records.read(options.out), options.out):
        print(path)


def _table(options: argparse.Namespace) -> None:
    from tests.benchmarks.table import markdown

    text = markdown(records.read(options.out))
    (options.out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
