"""Refuse a `.pt2` file that could run code, before torch reads it.

`torch.export.load` of torch 2.13 is not safe for files from elsewhere. It unpickles without `weights_only` (pickled
weights, constants, custom objects, and example inputs, where a failed `weights_only` load is repeated without it),
evaluates shape expressions with `sympy.sympify`, looks operators up as any attribute of torch (`torch.os.system` is
one), puts node names into generated Python, imports modules that a pytree names, and loads compiled kernels.

What an ordinary `torch.export.save` writes needs none of this. So the archive is read here with torch's own reader
(another zip reader could see another file), and all that is not on the lists below is refused.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._sympy import functions as sympy_functions

_CONFIG_RECORDS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORD = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)|extra/.*"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|")
_QUALIFIED_NAME = re.compile(r"[\w.\-:/<>@+ ]*")
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
_SYMPY_CALLS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|And|Or|Not|Piecewise|ExprCondPair|Equality|"
    r"Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|Eq|Ne|Le|Lt|Ge|Gt|floor|ceiling|"
    + "|".join(sympy_functions.__all__)
)
_SYMPY_NODES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.UnaryOp, ast.USub)
_PYTHON_OPERATORS = re.compile(
    r"add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|xor|invert|lshift|rshift|"
    r"getitem|index"
)
_NAMESPACES = frozenset({"aten", "prims", "torchvision", "quantized_decomposed"})
_HIGHER_ORDER = re.compile(
    r"cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast|"
    r"invoke_subgraph"
)


def unsafe_content(path: Path) -> str | None:
    """What makes the archive unsafe to load, in words. Raises what torch's reader raises on a damaged file."""
    with zipfile.ZipFile(path) as archive:
        if "version" in archive.namelist():
            return "it is in the format of torch 2.7 and older, which is read by unpickling"
    reader = torch._C.PyTorchFileReader(str(path))
    for record in reader.get_all_records():
        if not _RECORD.fullmatch(record):
            return f"it contains {record!r}, which is not a plain weight, constant or graph"
    for record in _CONFIG_RECORDS:
        for name, payload in json.loads(reader.get_record(record))["config"].items():
            if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                return f"{name!r} is stored as a pickle"
    try:
        torch.load(io.BytesIO(reader.get_record("data/sample_inputs/model.pt")), weights_only=True, map_location="cpu")
    except Exception as error:
        return f"its example inputs hold more than tensors ({type(error).__name__})"
    for key, value in _strings(json.loads(reader.get_record("models/model.json"))):
        if not _is_harmless(key, value):
            return f"its graph contains {key} {value[:80]!r}, which is not on the list of what may run"
    return None


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All (key, string) pairs of a JSON tree; strings of a list carry the key of the list."""
    if isinstance(node, dict):
        for child_key, child in node.items():
            yield from _strings(child, child_key)
    elif isinstance(node, list):
        for child in node:
            yield from _strings(child, key)
    elif isinstance(node, str):
        yield key, node


def _is_harmless(key: str, value: str) -> bool:
    if key in ("target", "as_operator"):
        return _is_known_operator(value)
    if key == "expr_str":
        return _is_plain_expression(value)
    if key in ("name", "as_name", "forward_arg_names"):
        return _IDENTIFIER.fullmatch(value) is not None
    if key in ("in_spec", "out_spec", "treespec"):
        return "__enum__" not in value and "default_factory" not in value and "\\u" not in value
    if key == "fqn" or key.endswith("_name"):
        return _QUALIFIED_NAME.fullmatch(value) is not None
    return True


def _is_known_operator(target: str) -> bool:
    head, _, rest = target.partition(".")
    if head == "_operator":
        return _PYTHON_OPERATORS.fullmatch(rest) is not None
    if head == "math":
        return re.fullmatch(r"[a-z0-9]+", rest) is not None
    if re.fullmatch(r"_?sym_[a-z]+", rest):
        return head == "torch"
    if not target.startswith("torch.ops."):
        return False
    namespace, _, name = target.removeprefix("torch.ops.").partition(".")
    if namespace == "higher_order":
        return _HIGHER_ORDER.fullmatch(name) is not None
    found: Any = getattr(torch.ops, namespace) if namespace in _NAMESPACES else None
    for part in name.split("."):
        found = getattr(found, part, None)
    # Operators that take a file name read or write files.
    return isinstance(found, torch._ops.OpOverload) and "filename" not in {x.name for x in found._schema.arguments}


def _is_plain_expression(text: str) -> bool:
    """Only nested calls of known sympy classes on numbers, and names given to Symbol."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    named: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _SYMPY_CALLS.fullmatch(node.func.id):
                return False
            if node.func.id in ("Symbol", "Float") and node.args and isinstance(node.args[0], ast.Constant):
                pattern = _IDENTIFIER if node.func.id == "Symbol" else _NUMBER
                if pattern.fullmatch(str(node.args[0].value)):
                    named.add(node.args[0])
        elif not isinstance(node, _SYMPY_NODES):
            return False
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return all(node in named or isinstance(node.value, int | float) for node in constants)
