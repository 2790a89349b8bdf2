"""The rules of the house, read from the source: layers, who may import what, lengths, forbidden calls.

Imports inside functions and under TYPE_CHECKING count like all others.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NAME = "distributed_adaround"
PACKAGE = Path(__file__).parents[1] / NAME

# A file may import from its own layer and from lower ones. A folder stands for all files in it.
LAYERS = [
    {"errors", "logs", "memory", "storage", "uris", "retries", "integrity", "jsontext", "stopping", "parent"},
    {"numerics", "spec", "spec_errors", "spec_format", "spec_load", "spec_quantize", "spec_reference", "spec_rounding"},
    {"distributed"},
    {"data", "model", "activations"},
    {"walk", "solve"},
    {"checkpoint", "solver_state", "export", "report"},
    {"network", "layer_setup", "commits", "monitor", "job", "api", "plan", "launch"},
    {"__init__", "__main__", "cli"},
    {"examples"},
]
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
SPEC_STOPS_AT = LAYER_OF["job"]
TORCH_FREE = {*LAYERS[0], *LAYERS[1], "__init__", "__main__", "cli", "launch"} - {"numerics"}
LAUNCHERS = ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.launcher")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def violations(path: str, source: str) -> list[str]:
    """Broken rules of one file; path relative to the package."""
    tree = ast.parse(source)
    part = path.removesuffix(".py").split("/")[0]
    if part not in LAYER_OF:
        return ["file without a layer; give it one in LAYERS"]
    found = [*_import_violations(part, tree), *_call_violations(part, tree)]
    if Path(path).name == "utils.py":
        found.append("a file named utils.py; name it after what it does")
    if source.count("\n") > MAX_FILE_LINES:
        found.append(f"more than {MAX_FILE_LINES} lines")
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
            found.append(f"line {node.lineno}: function of more than {MAX_FUNCTION_LINES} lines")
    return found


def _import_violations(part: str, tree: ast.Module) -> Iterator[str]:
    for node, target in _imports(tree):
        top, *rest = target.split(".")
        where = f"line {node.lineno}: import of {target}"
        if target.startswith("."):
            yield f"{where}: relative"
        if top == NAME:
            # `from distributed_adaround import name`: a module, or a public name, which __init__ stands for.
            imported = rest[0] if rest and rest[0] in LAYER_OF else "__init__"
            if rest[:1] != ["__version__"] and LAYER_OF[imported] > LAYER_OF[part]:
                yield f"{where}: from a higher layer"
            if imported == "examples" and part != "examples":
                yield f"{where}: nobody imports the examples"
            if imported.startswith("spec") and not part.startswith("spec") and LAYER_OF[part] < SPEC_STOPS_AT:
                yield f"{where}: the spec stops at job.py"
        if top == "fsspec" and part != "storage":
            yield f"{where}: only storage.py may"
        if f"{target}.".startswith("torch.distributed.") and part != "distributed":
            launcher = f"{target}.".startswith(tuple(f"{name}." for name in LAUNCHERS))
            if not (launcher and part in {"cli", "__main__", "examples"}):
                yield f"{where}: only distributed/ may"
        if part == "numerics" and top not in {"torch", *sys.stdlib_module_names} and rest[:1] != ["numerics"]:
            yield f"{where}: numerics imports torch and the standard library only"
        if part in TORCH_FREE and top in {"torch", "torchdata"} and node in tree.body:
            yield f"{where}: at module level, here torch is imported inside functions only"
        if target == "torch.load":
            yield f"{where}: call it as torch.load, so that weights_only=True can be checked"
        if target == "time.time":
            yield f"{where}: call it as time.time, so that its use can be checked"


def _imports(tree: ast.Module) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Everything imported, and the use of `torch.distributed` through `torch`, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node, "torch.distributed"


def _call_violations(part: str, tree: ast.Module) -> Iterator[str]:
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__hash__"]
    inside_hash = {node for method in methods for node in ast.walk(method)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    dates = {argument for node in calls if ast.unparse(node.func) == "int" for argument in node.args}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "time.time" and node not in dates:
            yield f"line {node.lineno}: time.time() jumps with the clock; use time.monotonic(), or int(...) for a date"
        if called == "hash" and node not in inside_hash:
            yield f"line {node.lineno}: hash() differs between processes; use hashlib"
        if called == "print" and part not in {"cli", "examples"}:
            yield f"line {node.lineno}: print() outside cli.py and examples/"
        if called == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True runs code from the file"


@pytest.mark.parametrize("path", sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")))
def test_file_follows_the_rules(path: str) -> None:
    assert violations(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("new.py", "", "without a layer"),
        ("walk.py", f"def f():\n    from {NAME}.job import run", "higher layer"),
        ("walk.py", f"from {NAME} import quantize", "higher layer"),
        ("errors.py", f"import {NAME}.spec", "higher layer"),
        ("cli.py", f"from {NAME}.examples.digits import data", "nobody imports the examples"),
        ("walk.py", f"from {NAME}.spec import RoundingSpec", "spec stops"),
        ("model/graph.py", "from . import sites", "relative"),
        ("data/readers.py", "import fsspec.core", "only storage.py"),
        ("walk.py", "import torch.distributed as dist", "only distributed/"),
        ("walk.py", "from torch import distributed", "only distributed/"),
        ("walk.py", "import torch\ntorch.distributed.barrier()", "only distributed/"),
        ("walk.py", "from torch.distributed.elastic.multiprocessing.errors import record", "only distributed/"),
        ("numerics/grid.py", "import numpy", "standard library only"),
        ("numerics/grid.py", f"from {NAME}.errors import InputError", "standard library only"),
        ("spec.py", "import torch", "inside functions only"),
        ("model/load.py", "from torch import load", "weights_only"),
        ("model/load.py", "import torch\ntorch.load(path, weights_only=flag)", "weights_only"),
        ("walk.py", "seed = hash('a')", "hashlib"),
        ("walk.py", "print('a')", "print()"),
        ("walk.py", "import time\nstart = time.time()", "time.monotonic()"),
        ("walk.py", "from time import time", "call it as time.time"),
        ("model/utils.py", "", "utils.py"),
        ("walk.py", "\n" * 401, "400 lines"),
        ("walk.py", "def f():\n" + "    pass\n" * 60, "60 lines"),
    ],
)
def test_a_broken_rule_is_noticed(path: str, source: str, rule: str) -> None:
    assert any(rule in violation for violation in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", f"def f():\n    import torch\n    from {NAME}.job import run\n    print(torch)"),
        ("__main__.py", "def f():\n    from torch.distributed.elastic.multiprocessing.errors import record"),
        ("job.py", f"from {NAME}.spec import JobSpec\nfrom {NAME} import __version__, walk"),
        ("distributed/comm.py", "import torch.distributed as dist"),
        ("walk.py", "class A:\n    def __hash__(self):\n        return hash(self.name)"),
        ("numerics/grid.py", f"import math\nfrom torch import Tensor\nfrom {NAME}.numerics.layers import pad"),
        ("model/load.py", "import torch\ntorch.load(path, map_location='cpu', weights_only=True)"),
        ("walk.py", "def f():\n" + "    pass\n" * 59),
        ("cli.py", "import time\nstamp = int(time.time())"),
    ],
)
def test_what_the_rules_allow(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize("module", ["", ".spec", ".storage", ".logs", ".cli", ".__main__"])
def test_import_leaves_torch_out(module: str) -> None:
    code = f"import sys, {NAME}{module}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
