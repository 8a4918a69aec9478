"""Annotations: every public function says what it returns, and docs/api.md lists the public names as they are."""

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import mijax as mj

PACKAGE = Path(mj.__file__).parent


def returned(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, str | None]]:
    """The public functions and methods of a module or class, with their return annotations."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from returned(node.body, name)
            else:
                yield name, node.returns and ast.unparse(node.returns)


def test_no_public_function_returns_just_anything():
    modules = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
    pairs = [pair for file, tree in modules.items() for pair in returned(tree.body, str(file.relative_to(PACKAGE)))]
    assert len(pairs) > 400
    assert [name for name, annotation in pairs if annotation in (None, "Any")] == []


def test_the_table_of_public_names_is_that_of_the_code():
    """Otherwise run `python docs/api.py`."""
    spec = importlib.util.spec_from_file_location("api", PACKAGE.parent / "docs" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.page() == api.PAGE.read_text()
