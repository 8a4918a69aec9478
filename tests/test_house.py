"""The structure of the code: who imports whom, and who reads what."""

import ast
import dataclasses
import graphlib
from pathlib import Path

import mijax as mj

FLOORS = (  # rooms side by side know nothing of one another
    ("_types", "display", "arguments", "rules"),
    ("cache", "files", "programs", "meshes", "memory"),
    ("chunks",),
    ("superposition", "model"),
    ("checkpoints", "interventions"),
    ("forward",),
    ("metrics", "generation"),
    ("engine",),
    ("sweeps", "attribution"),
    ("plots",),
    ("__init__",),
)


def imported(file: Path, root: Path) -> set[str]:
    """The modules of mijax that a file imports, anywhere in it: `model.sites`; of `from mijax import x` too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            module = node.module or ""
            there = lambda name: (root / "/".join(name.split(".")[1:])).with_suffix(".py")
            within = {f"{module}.{alias.name}" for alias in node.names}
            deeper = {n for n in within if there(n).exists() or (there(n).with_suffix("") / "__init__.py").exists()}
            names |= deeper or {module}
    return {name.removeprefix("mijax").lstrip(".") or "__init__" for name in names if name.split(".")[0] == "mijax"}


def test_arrows_only_fall():
    """A room imports from the floors below it, and none beside it."""
    root = Path(mj.__file__).parent
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for file in root.rglob("*.py"):
        room = file.relative_to(root).parts[0].removesuffix(".py")
        for name in imported(file, root):
            other = name.split(".")[0]
            assert other == room or floor[other] < floor[room], f"{file} imports {name}"


def test_there_is_no_circle():
    """Nor between the modules of a room."""
    root = Path(mj.__file__).parent
    name = lambda file: ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    arrows = {name(file): imported(file, root) - {name(file)} for file in root.rglob("*.py")}
    order = graphlib.TopologicalSorter({module: others & arrows.keys() for module, others in arrows.items()})
    assert len(list(order.static_order())) == len(arrows)  # raises CycleError, which shows the circle


def test_where_is_read_in_one_room():
    """What an entry of `Where` means, only `interventions` knows, and the grid that builds it."""
    root = Path(mj.__file__).parent
    fields = {field.name for field in dataclasses.fields(mj.Where)}
    name = lambda node: getattr(node, "attr", getattr(node, "id", ""))
    for file in root.rglob("*.py"):
        if "interventions" in file.parts or file.name == "grid.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read = node.attr == "given" or (node.attr in fields and name(node.value) == "where")
                assert not read, f"{file}:{node.lineno} reads {name(node.value)}.{node.attr}"


def test_only_the_model_knows_its_config_and_parameters():
    """Nothing else reads `config` or a matrix of a model's."""
    root = Path(mj.__file__).parent
    for file in root.rglob("*.py"):
        if {"model", "checkpoints", "superposition"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "jax":
                assert node.attr not in ("config", "blocks") and not node.attr.startswith("W_"), f"{file}:{node.lineno}"
