"""The rules of the house, read from the source: layers, who may import what, lengths, forbidden calls.

Imports inside functions and under TYPE_CHECKING count like all others.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NAME = "distributed_adaround"
PACKAGE = Path(__file__).parents[1] / NAME

# The floors of the house, from the ground up, as README.md draws them. A file imports from its own room and from lower
# floors; on its own floor besides only from files that lie at the package root.
FLOORS = [
    ("spec", "formats", "errors"),
    ("numerics", "runtime", "files"),
    ("model", "data"),
    ("capture",),
    ("solve", "metrics"),
    ("checkpoint", "export", "report", "launch"),
    ("rounding",),
    ("__init__", "__main__", "cli", "job", "api", "plan", "quickstart", "convert"),
    ("examples",),
]
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
ROOT_FILES = {file.stem for file in PACKAGE.glob("*.py")}
TORCH_FREE = {"spec", "formats", "errors", "files", "launch", "__init__", "__main__", "cli"}
TORCH_FREE_FILES = {f"runtime/{name}.py" for name in ("imports", "logs", "memory", "signals")}
LAUNCHERS = ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.launcher")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ROOT_FILES = 400, 60, 12


def violations(path: str, source: str) -> list[str]:
    """Broken rules of one file; path relative to the package."""
    tree = ast.parse(source)
    part = path.removesuffix(".py").split("/")[0]
    if part not in FLOOR_OF:
        return ["file without a floor; give it one in FLOORS"]
    found = [*_import_violations(path, part, tree), *_call_violations(part, tree)]
    if Path(path).name == "utils.py":
        found.append("a file named utils.py; name it after what it does")
    if source.count("\n") > MAX_FILE_LINES:
        found.append(f"more than {MAX_FILE_LINES} lines")
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
            found.append(f"line {node.lineno}: function of more than {MAX_FUNCTION_LINES} lines")
    return found


def _may_import(part: str, target: str) -> bool:
    if part == target or FLOOR_OF[target] < FLOOR_OF[part]:
        return True
    return FLOOR_OF[target] == FLOOR_OF[part] and target in ROOT_FILES


def _import_violations(path: str, part: str, tree: ast.Module) -> Iterator[str]:
    for node, target in _imports(tree):
        top, *rest = target.split(".")
        where = f"line {node.lineno}: import of {target}"
        if target.startswith("."):
            yield f"{where}: relative"
        if top == NAME:
            # `from distributed_adaround import name`: a module, or a public name, which __init__ stands for.
            imported = rest[0] if rest and rest[0] in FLOOR_OF else "__init__"
            if rest[:1] != ["__version__"] and not _may_import(part, imported):
                yield f"{where}: not from a lower floor"
            if imported == "examples" and part != "examples":
                yield f"{where}: nobody imports the examples"
        if top == "fsspec" and path != "files/storage.py":
            yield f"{where}: only files/storage.py may"
        if f"{target}.".startswith("torch.distributed.") and path not in ("runtime/comm.py", "runtime/context.py"):
            launcher = f"{target}.".startswith(tuple(f"{name}." for name in LAUNCHERS))
            if not (launcher and part in {"cli", "__main__", "examples"}):
                yield f"{where}: only runtime/ may, in comm.py and context.py"
        own = rest[:1] in (["numerics"], ["formats"])
        if part == "numerics" and top not in {"torch", *sys.stdlib_module_names} and not own:
            yield f"{where}: numerics imports torch, the standard library and formats only"
        torch_free = part in TORCH_FREE or path in TORCH_FREE_FILES
        if torch_free and top in {"torch", "torchdata"} and node in tree.body:
            yield f"{where}: at module level, here torch is imported inside functions only"
        if target == "torch.load":
            yield f"{where}: call it as torch.load, so that weights_only=True can be checked"
        if target == "time.time":
            yield f"{where}: call it as time.time, so that its use can be checked"


def import_graph() -> dict[str, set[str]]:
    """Modules of the package, and those that each imports, also inside functions."""
    modules = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    graph = {}
    for name, file in modules.items():
        targets = {target for _, target in _imports(ast.parse(file.read_text(encoding="utf-8")))}
        both = targets | {target.rpartition(".")[0] for target in targets}
        # The package itself is imported for its version, which needs nothing.
        graph[name] = {target for target in both if target in modules and target not in (name, NAME)}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [*graph[start]]
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += graph[name]
        return seen

    return sorted(name for name in graph if name in reachable(name))


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


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = import_graph()
    assert graph[f"{NAME}.job"] >= {f"{NAME}.rounding", f"{NAME}.capture.open"}
    assert cycles(graph) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_the_package_root_holds_a_dozen_files_at_most() -> None:
    assert len(ROOT_FILES) <= MAX_ROOT_FILES


def test_readme_draws_the_same_floors() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    drawn: dict[int, set[str]] = {}
    for line in readme.splitlines():
        if re.match(r"[0-7] [_a-z]", line):
            drawn.setdefault(int(line[0]), set()).update(line[2:32].split())
    assert drawn == {number: set(parts) for number, parts in enumerate(FLOORS[:-1])}


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("new.py", "", "without a floor"),
        ("capture/graph.py", f"def f():\n    from {NAME}.job import run", "not from a lower floor"),
        ("rounding.py", f"from {NAME} import quantize", "not from a lower floor"),
        ("errors.py", f"import {NAME}.spec.job", "not from a lower floor"),
        ("data/readers.py", f"from {NAME}.model.source import OpenedModel", "not from a lower floor"),
        ("export/codes.py", f"from {NAME}.checkpoint.commits import Commits", "not from a lower floor"),
        ("cli.py", f"from {NAME}.examples.digits import data", "nobody imports the examples"),
        ("capture/graph.py", "from . import sites", "relative"),
        ("data/readers.py", "import fsspec.core", "only files/storage.py"),
        ("rounding.py", "import torch.distributed as dist", "only runtime/"),
        ("rounding.py", "from torch import distributed", "only runtime/"),
        ("rounding.py", "import torch\ntorch.distributed.barrier()", "only runtime/"),
        ("rounding.py", "from torch.distributed.elastic.multiprocessing.errors import record", "only runtime/"),
        ("numerics/grid.py", "import numpy", "formats only"),
        ("numerics/grid.py", f"from {NAME}.errors import InputError", "formats only"),
        ("spec/job.py", "import torch", "inside functions only"),
        ("model/weights.py", "from torch import load", "weights_only"),
        ("model/weights.py", "import torch\ntorch.load(path, weights_only=flag)", "weights_only"),
        ("rounding.py", "seed = hash('a')", "hashlib"),
        ("rounding.py", "print('a')", "print()"),
        ("rounding.py", "import time\nstart = time.time()", "time.monotonic()"),
        ("rounding.py", "from time import time", "call it as time.time"),
        ("model/utils.py", "", "utils.py"),
        ("rounding.py", "\n" * 401, "400 lines"),
        ("rounding.py", "def f():\n" + "    pass\n" * 60, "60 lines"),
    ],
)
def test_a_broken_rule_is_noticed(path: str, source: str, rule: str) -> None:
    assert any(rule in violation for violation in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", f"def f():\n    import torch\n    from {NAME}.job import run\n    print(torch)"),
        ("__main__.py", "def f():\n    from torch.distributed.elastic.multiprocessing.errors import record"),
        ("job.py", f"from {NAME}.spec.job import JobSpec\nfrom {NAME} import __version__, rounding"),
        ("runtime/comm.py", "import torch.distributed as dist"),
        ("rounding.py", "class A:\n    def __hash__(self):\n        return hash(self.name)"),
        ("numerics/grid.py", f"import math\nfrom torch import Tensor\nfrom {NAME}.numerics.layers import pad"),
        ("model/weights.py", "import torch\ntorch.load(path, map_location='cpu', weights_only=True)"),
        ("rounding.py", "def f():\n" + "    pass\n" * 59),
        ("cli.py", "import time\nstamp = int(time.time())"),
    ],
)
def test_what_the_rules_allow(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize(
    "module", ["", ".spec.job", ".files.storage", ".runtime.logs", ".launch.arguments", ".cli", ".__main__"]
)
def test_import_leaves_torch_out(module: str) -> None:
    code = f"import sys, {NAME}{module}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
