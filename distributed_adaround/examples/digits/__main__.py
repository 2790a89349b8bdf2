"""Runs the example: `python -m distributed_adaround.examples.digits [all | prepare | evaluate]`.

prepare   writes the job folder: job.yaml, calibration.npz, digits.safetensors
all       prepare, then two jobs with torchrun (nearest rounding and AdaRound), then evaluate
evaluate  prints top-1 on held-out digits for the float, nearest and AdaRound weights

Each job is a command that is printed first, so that it can be repeated by hand in the job folder.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from distributed_adaround.examples.digits import data
from distributed_adaround.examples.digits.model import build
from distributed_adaround.examples.digits.train import WEIGHTS
from distributed_adaround.examples.ranks import run_on_ranks

# Output folder of each job, and what differs from job.yaml.
JOBS = {"nearest": ("--set", "rounding.solver=nearest", "--set", "output.uri=nearest"), "adaround": ()}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or that of the job that failed."""
    name = "python -m distributed_adaround.examples.digits"
    parser = argparse.ArgumentParser(name, description=__doc__.split("\n")[0])
    parser.add_argument("action", nargs="?", choices=["all", "prepare", "evaluate"], default="all")
    parser.add_argument("--folder", type=Path, default=Path("digits-job"), help="job folder (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the job (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.action != "evaluate":
        prepare(args.folder)
    if args.action == "all":
        for options in JOBS.values():
            code = run_on_ranks(args.folder, args.ranks, ["job.yaml", *options])
            if code != 0:
                return code
    if args.action != "prepare":
        for name in JOBS:
            if not checkpoint(args.folder, name).exists():
                sys.stderr.write(f"{checkpoint(args.folder, name)} is missing; run the jobs first (action: all)\n")
                return 65
        evaluate(args.folder)
    return 0


def prepare(folder: Path) -> None:
    """Writes all that the job needs. Relative paths in job.yaml are relative to this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data.write_calibration(folder / "calibration.npz")
    for source in (WEIGHTS, data.FOLDER / "job.yaml"):
        shutil.copyfile(source, folder / source.name)


def checkpoint(folder: Path, job: str) -> Path:
    """The dequantized weights that a job leaves."""
    return folder / job / "dequantized.safetensors"


def evaluate(folder: Path) -> None:
    print(f"top-1 on {len(data.held_out()[1])} held-out digits")
    rows = {"float": folder / WEIGHTS.name, "nearest": checkpoint(folder, "nearest")}
    for name, weights in {**rows, "AdaRound": checkpoint(folder, "adaround")}.items():
        print(f"  {name:<10}{100 * top1(weights):7.2f} %")


def top1(weights: Path) -> float:
    """Share of the held-out images, 0 to 1, that the network with these weights (.safetensors) names correctly."""
    model = build()
    model.load_state_dict(load_file(weights))
    images, labels = data.held_out()
    with torch.inference_mode():
        predicted = model.eval()(images).argmax(dim=1)
    return int((predicted == labels).sum()) / len(labels)


if __name__ == "__main__":
    raise SystemExit(main())
