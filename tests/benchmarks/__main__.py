"""Command line of the benchmark: `python -m tests.benchmarks {layers,table} ...`, from the root of a clone."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import records
from tests.benchmarks.configurations import ANCESTOR, DEFAULT_SOLVERS, FORMATS, TRAJECTORIES, solver_sections

_CASES = ("resnet20", "minilm", "smollm2")
# --quick: enough to see that everything works.
_QUICK_SAMPLES, _QUICK_STEPS = (64, 32), 30


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
    parser.add_argument("--case", nargs="+", choices=_CASES, default=_CASES)
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    parser.add_argument("--solver", nargs="+", default=DEFAULT_SOLVERS, help="of configurations.py; NAME@N: N steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--vary-samples", action="store_true", help="each seed draws samples of its own")
    parser.add_argument("--samples", nargs=2, type=int, metavar=("CALIBRATION", "HELD_OUT"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="in every spec")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--again", action="store_true", help="also runs that have a line already")
    parser.add_argument("--quick", action="store_true", help="few samples and steps: does everything work?")


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    if options.cases is None:
        sys.exit("name the folder with the cases: --cases DIR or the environment variable ADAROUND_CASES")
    for name in options.solver:
        if name != ANCESTOR:
            solver_sections(name)
    if options.quick:
        options.samples = options.samples or _QUICK_SAMPLES
        options.set = [f"rounding.max_iter={_QUICK_STEPS}", *options.set]
        options.solver = list(dict.fromkeys(name.partition("@")[0] for name in options.solver))
    return options


def _layers(options: argparse.Namespace) -> None:
    from tests.benchmarks.cases import CASES
    from tests.benchmarks.layers import LayerOptions, run_case

    options = _checked(options)
    solvers = dict.fromkeys([*options.solver, *(TRAJECTORIES if options.trajectories else ())])
    chosen = LayerOptions(
        folder=options.cases.resolve() if isinstance(options.cases, Path) else Path(options.cases).resolve(),
        out=options.out,
        formats=options.format,
        solvers=[name for name in solvers if name != ANCESTOR],
        seeds=options.seeds,
        settings=options.set,
        samples=None if options.samples is None else tuple(options.samples),
        vary_samples=options.vary_samples,
        every=options.every,
        device=options.device,
        again=options.again,
    )
    for name in options.case:
        run_case(CASES[name], chosen)


def _table(options: argparse.Namespace) -> None:
    from tests.benchmarks.table import markdown

    text = markdown(records.read(options.out))
    (options.out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
