"""Command line: run | quantize | init | plan | validate | status | export | verify | schema | launch.

What needs torch is imported where it is used.
"""

import argparse
import glob
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_adaround import __version__
from distributed_adaround.errors import AdaRoundError, PeerError, SpecError, StoppedError, redact
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.launch.arguments import add_launch
from distributed_adaround.report.status import read_status, record_failure
from distributed_adaround.report.text import console, layout, rendered
from distributed_adaround.runtime import logs
from distributed_adaround.runtime.signals import StopRequest, end_with_launcher
from distributed_adaround.spec.job import EXPORTERS, JobSpec, json_schema
from distributed_adaround.spec.reference import markdown

if TYPE_CHECKING:
    from distributed_adaround.quickstart import Request
    from distributed_adaround.report.table import ExportFigures

COMMANDS = ("run", "quantize", "init", "plan", "validate", "status", "export", "verify", "schema", "launch")
_INTERNAL_ERROR = 70
_INTERRUPTED = 130
_BROKEN_PIPE = 141
# torchrun ends all ranks as soon as one exits, and names that one: let it be the one that tells the user.
_LET_OTHERS_SPEAK_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see errors.py). One line per error, a traceback only with --debug."""
    end_with_launcher()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `python -m distributed_adaround job.yaml` means run.
    if given and given[0] not in (*COMMANDS, "-h", "--help", "--version"):
        given.insert(0, "run")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    known = argparse.Namespace(given=given, rank=rank, world_size=world_size, debug=False, spec=None, stop=None)
    options = _parser().parse_args(given, known)
    logs.configure(rank, world_size, options.debug)
    try:
        return int(options.command(options) or 0)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough (| head); the interpreter must not try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        code = error.exit_code if isinstance(error, AdaRoundError) else _INTERNAL_ERROR
        _report(error, code, options)
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distributed_adaround",
        description="Learn how to round a network's weights (AdaRound), on one or many processes.",
        epilog="Example: torchrun --nproc_per_node=8 -m distributed_adaround job.yaml",
    )
    parser.add_argument("--version", action="version", version=f"distributed_adaround {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    any_job = argparse.ArgumentParser(add_help=False)
    add, what = any_job.add_argument, "change a field of the job; may be given several times"
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=what)
    add("--debug", action="store_true", help="more log lines, and tracebacks of errors")
    job = argparse.ArgumentParser(add_help=False, parents=[any_job])
    job.add_argument("job", metavar="JOB", help="job file: .yaml, .json or .toml; a path or a URI")
    for name, command, text in (
        ("run", _run, "run a job (the default: `distributed_adaround job.yaml`)"),
        ("plan", _plan, "show layers, data, memory and time of a job; solves nothing"),
        ("validate", _validate, "check a job file; needs no torch"),
        ("status", _status, "show how a job stands; ends with 0 when it is done, 75 when it is to be started (again)"),
    ):
        sub = commands.add_parser(name, help=text, description=text, parents=[job])
        sub.set_defaults(command=command)
        if name == "plan":
            sub.add_argument("--ranks", type=_positive, default=1, metavar="W", help="plan for W ranks (default 1)")
    _add_quickstart(commands, any_job)
    _add_outputs(commands, any_job)
    schema = commands.add_parser("schema", help="print the JSON Schema of job files")
    schema.add_argument("--markdown", action="store_true", help="print a table of all fields instead")
    schema.set_defaults(command=_schema)
    add_launch(commands)
    return parser


def _add_quickstart(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", any_job: argparse.ArgumentParser
) -> None:
    """The commands that need no job file. any_job: the options of all commands on a job."""
    given = argparse.ArgumentParser(add_help=False, parents=[any_job])
    add = given.add_argument
    add("directory", metavar="DIR", help="HuggingFace model directory; a path or a URI")
    add("--dtype", help="number format of the weights (default: int4; init chooses by the kind of model)")
    add(
        "--group-size",
        type=_positive,
        metavar="N",
        help="inputs that share a scale (default: all of a channel)",
    )
    add("--out", metavar="OUT", help="folder for the results (default: the model's name and the dtype)")
    add("--samples", type=_positive, metavar="N", help="calibration samples, at most (default: by the kind of data)")
    add("--sequence-length", type=_positive, metavar="T", help="tokens of a sample of text (default: 512)")
    add("--format", dest="formats", action="append", default=[], choices=EXPORTERS, metavar="FORMAT",
        help=f"what is written (default: huggingface); may be given several times: {', '.join(EXPORTERS)}")  # fmt: skip
    add("--evaluate", nargs="+", default=[], metavar="FILES", help="other data, to compare the model before and after")
    files = "texts, pictures, recordings or arrays: files, folders or globs, paths or URIs"
    text = "quantize a HuggingFace model directory, without a job file"
    sub = commands.add_parser("quantize", help=text, description=text, parents=[given])
    sub.add_argument("--data", nargs="+", required=True, metavar="FILES", help=files)
    sub.set_defaults(command=_quantize)
    text = "print a job file for a HuggingFace model directory, with what the job would do"
    sub = commands.add_parser("init", help=text, description=text, parents=[given])
    sub.add_argument("--data", nargs="+", default=[], metavar="FILES", help=files)
    sub.set_defaults(command=_init)


def _add_outputs(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", any_job: argparse.ArgumentParser
) -> None:
    """The commands on the output of a finished job."""
    given = argparse.ArgumentParser(add_help=False, parents=[any_job])
    given.add_argument("output", metavar="OUTPUT", help="folder with the results of a finished job; a path or a URI")
    text = "write the results of a finished job in other formats, without running it again"
    sub = commands.add_parser("export", help=text, description=text, parents=[given])
    names, what = ", ".join(EXPORTERS), "may be given several times"
    sub.add_argument("--format", dest="formats", action="append", required=True, choices=EXPORTERS, metavar="FORMAT",
                     help=f"{what}: {names}")  # fmt: skip
    sub.add_argument(
        "--verify", action="store_true", help="read the formats again afterwards, as the command verify does"
    )
    sub.set_defaults(command=_export)
    text = "read all formats of an output by their own libraries, and compare them with the quantized model"
    sub = commands.add_parser("verify", help=text, description=text, parents=[given])
    sub.set_defaults(command=_verify)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _folder(job: str) -> Path | None:
    """Of a local job file; modules that it names are searched there too."""
    return Path(job).resolve().parent if "://" not in job else None


def _load(options: argparse.Namespace) -> JobSpec:
    spec = options.spec = load_spec(options.job, options.overrides)  # for errors too
    return spec


def _run(options: argparse.Namespace) -> None:
    _run_job(_load(options), options)


def _quantize(options: argparse.Namespace) -> None:
    from distributed_adaround.quickstart import job_of

    spec = options.spec = job_of(_request(options))
    _run_job(spec, options)


def _init(options: argparse.Namespace) -> None:
    from distributed_adaround.quickstart import commented_job

    print(commented_job(_request(options)), end="")


def _request(options: argparse.Namespace) -> "Request":
    from distributed_adaround.quickstart import Request

    return Request(**{name: getattr(options, name) for name in Request.__dataclass_fields__})


def _run_job(spec: JobSpec, options: argparse.Namespace) -> None:
    from distributed_adaround.job import run_job

    options.stop = StopRequest()
    with options.stop.listening():
        table = run_job(spec, _folder(getattr(options, "job", "")), options.stop)
    if options.rank == 0:
        print(table)
        print(f"\nResults are in {redact(spec.output.uri)}")


def _plan(options: argparse.Namespace) -> None:
    spec = _load(options)
    from distributed_adaround.plan import plan_job

    plan = plan_job(spec, _folder(options.job), options.ranks)
    print(plan.coverage)
    if plan.coverage.warning:
        print(f"Warning: {plan.coverage.warning}")
    print()
    header = ("layer", "kind", "shape", "format", "rows", "seconds")
    rows = [
        (x.name, x.kind, "x".join(map(str, x.shape)), x.format or "float", f"{x.rows:,}", f"{x.seconds:.1f}")
        for x in plan.layers
    ]
    print(rendered(console(), layout(header, rows, numbers=("rows", "seconds"))))
    print("\nParameters left in float:")
    for parameter in plan.float_parameters:
        print(f"  {parameter.name} {'x'.join(map(str, parameter.shape))}: {parameter.reason}")
    for note in plan.notes:
        print(f"\nNote: {note}")
    print(f"\nSamples per rank: {', '.join(map(str, plan.samples_per_rank))}")
    print(f"Activations of one rank: about {plan.activation_bytes / 2**20:,.0f} MiB, spilled beyond the budget")
    how = spec.rounding.solver
    if plan.num_steps:
        how += f", {plan.num_steps} {'sweeps' if how == 'gram' else 'steps'}"
    print(f"Time: about {plan.seconds:,.0f} s on this machine ({how})")
    if spec.rounding.solver == "minibatch":
        print(f"With rounding.solver=gram: about {plan.gram_seconds:,.0f} s ({spec.rounding.sweeps} sweeps)")


def _validate(options: argparse.Namespace) -> None:
    _load(options)
    print(f"{redact(options.job)} is a valid job file")


def _status(options: argparse.Namespace) -> int:
    spec = _load(options)
    status = read_status(spec.output.uri)
    if status is None or status.job != spec.job_digest():
        where = spec.output.uri if "://" in spec.output.uri else os.path.abspath(spec.output.uri)
        print(f"not started: no status of this job in {redact(where)}{_beside(spec.output.uri, options.job)}")
        return PeerError.exit_code
    print(status)
    return status.launch_code


def _schema(options: argparse.Namespace) -> None:
    print(markdown().rstrip() if options.markdown else json.dumps(json_schema(), indent=2))


def _export(options: argparse.Namespace) -> None:
    # Under torchrun one rank is enough; the others have nothing to do.
    if options.rank:
        return
    from distributed_adaround.convert import export_output

    _print_exports(export_output(options.output, options.formats, options.overrides, options.verify))
    print(f"Results are in {redact(options.output)}")


def _verify(options: argparse.Namespace) -> None:
    if options.rank:
        return
    from distributed_adaround.convert import verify_output
    from distributed_adaround.export.verify import refuse_different

    found = verify_output(options.output, options.overrides)
    _print_exports(found)
    refuse_different(found)


def _print_exports(found: "Sequence[ExportFigures]") -> None:
    from distributed_adaround.report.table import export_table

    if found:
        print(rendered(console(), export_table(found)))


def _where(message: str, options: argparse.Namespace) -> str:
    """For an error about a relative path that leads nowhere: what was tried, and whether it is beside the job file."""
    job, spec = getattr(options, "job", ""), options.spec
    paths = [job]
    if spec is not None:
        paths += [uri for _, uri in spec.inputs()]
    with suppress(OSError):  # the working folder may be gone
        for path in paths:
            if path and path in message and _is_relative(path) and not _exists(path):
                return f"; tried {os.path.abspath(path)}{_beside(path, job)}"
    return ""


def _beside(path: str, job: str) -> str:
    folder = _folder(job)
    if folder in (None, Path.cwd()) or not _is_relative(path) or not _exists(f"{folder}/{path}"):
        return ""
    return f"; it exists beside the job file in {folder}: run the command there, or write the absolute path"


def _is_relative(path: str) -> bool:
    return "://" not in path and not os.path.isabs(path)


def _exists(path: str) -> bool:
    return os.path.exists(path) or bool(glob.glob(path))


def _report(error: Exception, code: int, options: argparse.Namespace) -> None:
    """One line on stderr, in torchrun's error file and in the job's status, from the rank that failed first."""
    if options.debug:
        # Its lines hold what libraries raised, which know nothing of credentials.
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    reported_by = getattr(error, "reported_by", None)
    if reported_by is not None:
        silent = reported_by != options.rank
    elif isinstance(error, SpecError | StoppedError):
        # A wrong job file is the same for all ranks of a machine, which have not met yet; so are signals.
        silent = os.environ.get("LOCAL_RANK", "0") != "0"
    else:
        silent = isinstance(error, PeerError)
    ended_by_torchrun = options.stop is not None and options.stop.requested
    if (silent or isinstance(error, PeerError)) and not ended_by_torchrun:
        time.sleep(_LET_OTHERS_SPEAK_SECONDS)
    if silent:
        return
    what = f"rank {options.rank}: " if options.world_size > 1 else ""
    if not isinstance(error, AdaRoundError):
        what += f"internal error, {type(error).__name__}: "
    layer = getattr(error, "layer", None)
    if layer is not None and layer not in str(error):
        what += f"layer {layer}: "
    hint = "" if isinstance(error, AdaRoundError) else " (run again with --debug and report this)"
    message = " ".join(str(error).split())
    line = redact(f"{what}{message}{hint}{_where(message, options)}")
    print(f"error: {line}", file=sys.stderr)
    # torchrun shows the message of this file, in the form it expects, instead of a bare exit code.
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
    if options.command in (_run, _quantize):
        uri, job = (None, "") if options.spec is None else (options.spec.output.uri, options.spec.job_digest())
        # Without a job file nobody can ask how the job stands: what never began leaves no folder.
        if uri is not None and options.command is _quantize and read_status(uri) is None:
            uri = None
        record_failure(uri, job, error, code, line)
