"""Writes docs/api.md, the table of the public names: `python docs/api.py`."""

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mijax as mj

PAGE = Path(__file__).with_suffix(".md")
MODULES = {
    "mijax": mj,
    "mijax.metrics": mj.metrics,
    "mijax.superposition": mj.superposition,
    "mijax.plots": mj.plots,
    "mijax.processing": mj.processing,
}
HEAD = """\
# Public names

Written by `python docs/api.py` from the code. An optional parameter ends in `=...`. A function with several signatures
has a row for each, with the annotations in which they differ. Annotations are as in the code: `Array` is `jax.Array`,
`xr` is xarray, and shapes are written as jaxtyping reads them.
"""


def page() -> str:
    """The page."""
    parts = [HEAD]
    for title, module in MODULES.items():
        lines = [_line(row) for name in public(module) for row in rows_of(module, name)]
        parts.append("\n".join([f"## {title}", "", "| Name | Parameters | Returns |", "|---|---|---|", *lines, ""]))
    return "\n".join(parts)


def public(module: ModuleType) -> list[str]:
    """The public names of a module: its `__all__`, or else the functions, classes and type aliases that it defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        nodes = [node for node in _tree(module).body if not isinstance(node, ast.ImportFrom)]
        names = {name for node in nodes for name in _defined(node)}
        names = {name for name in names if callable(getattr(module, name)) and not name.startswith("_")}
    return sorted(names)


def rows_of(module: ModuleType, name: str) -> list[tuple[str, str, str]]:
    """Name, parameters and return type, once for each signature."""
    value = getattr(module, name)
    if isinstance(value, ModuleType):
        return [(name, "", "module")]
    nodes = definitions(module, name)
    if isinstance(value, type) and issubclass(value, Exception):
        return [(name, "", f"a {value.__base__.__name__}")]  # pyright: ignore[reportOptionalMemberAccess]
    if isinstance(value, type):
        parameters = "abstract" if inspect.isabstract(value) else _parameters(value, {})
        return [(name, parameters, value.__name__)]
    if isinstance(nodes[0], ast.FunctionDef):
        overloads = nodes[:-1] or nodes
        annotations = [
            {a.arg: _written(a.annotation) for a in ast.walk(n) if isinstance(a, ast.arg)} for n in overloads
        ]
        differ = {p for p in annotations[0] if len({a.get(p) for a in annotations}) > 1}
        shown = [{p: a[p] for p in differ} for a in annotations]
        return [(name, _parameters(value, some), _written(node.returns)) for node, some in zip(overloads, shown)]
    (node,) = nodes
    is_annotated = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) != "TypeAlias"
    return [(name, "", _written(node.annotation if is_annotated else node.value))]


def definitions(module: ModuleType, name: str) -> list:
    """The statements that define a name, found through imports: one, or overloads and what they are of."""
    nodes = [node for node in _tree(module).body if name in _defined(node)]
    if isinstance(nodes[0], ast.ImportFrom):
        (original,) = (alias.name for alias in nodes[0].names if (alias.asname or alias.name) == name)
        return definitions(importlib.import_module(str(nodes[0].module)), original)
    return nodes


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(Path(inspect.getfile(module)).read_text())


def _defined(node: ast.stmt) -> list[str]:
    """The names to which a statement gives a value."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _written(annotation: ast.expr | None) -> str:
    """An annotation as in the code, but for quotes around all of it; nothing where there is none."""
    if isinstance(annotation, ast.Constant):
        return str(annotation.value)
    return ast.unparse(annotation).replace("'", '"') if annotation else ""


def _parameters(value: Callable, annotations: dict[str, str]) -> str:
    """The names of the parameters, some with annotations."""
    parts, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = f": {annotations[parameter.name]}" if parameter.name in annotations else ""
        parts.append(prefix + parameter.name + annotation + "=..." * (parameter.default is not parameter.empty))
    return ", ".join(parts)


def _line(row: tuple[str, str, str]) -> str:
    shown = [text if text in ("", "abstract", "module") else f"`{text}`".replace("|", r"\|") for text in row]
    return f"| {' | '.join(shown)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
