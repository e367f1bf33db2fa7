"""The rules of the house, read off the sources: who imports whom, how long, how wide, that keys are read."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY = {     # room of the root: the rooms it may import
    "configs": (), "model": (), "losses": (), "metrics": (),
    "volumes": (),
    "data": ("configs", "volumes", "run"),                  # run: where it is a program
    "plan": ("configs", "data", "run", "volumes"),
    "run": ("configs", "model"),
    "tasks": ("model", "losses", "metrics", "data", "volumes"),
    "pretrain": ("model", "losses", "data", "run", "configs"),
    "finetune": ("model", "data", "tasks", "run", "configs"),
    "evaluate": ("model", "data", "tasks", "metrics", "run", "configs"),
}
SIX = {"torch", "numpy", "scipy", "nibabel", "einops"}       # and pytest, for the tests
WHERE_USED = {"matplotlib", "sklearn", "SimpleITK", "PIL"}   # imported by the functions that need them
LINES = {"data": 1050}                                       # else 700
LOOPS = {("pretrain", "main"), ("finetune", "main")}         # at most 110 lines, other functions 60


def sources(*patterns):
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def room(path):
    return "configs" if path.parent.name == "configs" else path.stem


PRODUCT = [*sources("*.py"), ROOT / "configs/__init__.py"]
LAB = sources("lab/*.py", "lab/*/*.py")


def imported(tree):
    """{top-level name of a module: whether the import stands at the top of the file}"""
    found = {}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            found[name.split(".")[0]] = found.get(name.split(".")[0], False) or node in tree.body
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=room)
def test_a_room_imports_what_it_may(path):
    assert room(path) in MAY, f"{path.name} is no room of the house"
    found = imported(ast.parse(path.read_text()))
    ours = {name for name in found if name in MAY or name == "lab"}
    assert ours <= set(MAY[room(path)])
    top = {name for name, at_the_top in found.items() if at_the_top}
    assert not top & WHERE_USED and not set(found) & {"monai", "lightning", "hydra", "skimage", "torchvision"}
    assert not (room(path) == "metrics" and "torch" in found)


def test_the_table_of_rooms_has_no_circle():
    done = set()
    while len(done) < len(MAY):
        ready = {name for name in MAY if name not in done and set(MAY[name]) <= done}
        assert ready, f"a circle among {set(MAY) - done}"
        done |= ready


def test_no_private_name_is_used_outside_its_file():
    for path in [*PRODUCT, *LAB]:
        tree = ast.parse(path.read_text())
        modules = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                   for a in node.names}
        modules |= {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                    for a in node.names if node.module == "lab"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not [a.name for a in node.names if a.name[0] == "_"], path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr[0] == "_" and not node.attr.startswith("__")
                ours = node.value.id in modules & set(MAY)
                assert not (ours and private), f"{path.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", [*PRODUCT, *LAB], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_length_and_width(path):
    text = path.read_text()
    assert text.count("\n") <= LINES.get(room(path), 700)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length, most = node.end_lineno - node.lineno + 1, 110 if (room(path), node.name) in LOOPS else 60
            assert length <= most, f"{node.name} has {length} lines"
    wide = [k for k, line in enumerate(text.split("\n"), 1) if len(line) > 110]
    assert not wide, f"lines {wide} are wider than 110"


def test_no_registry_no_trainer_no_base_class_with_one_child():
    children = {}
    for path in [*PRODUCT, *LAB]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                assert "Trainer" not in node.name and "Registry" not in node.name
                for base in node.bases:
                    children.setdefault(ast.unparse(base), []).append(node.name)
    plain = "Exception", "ValueError", "NamedTuple"
    ours = {name for name in children if "." not in name and name not in plain}
    assert not [name for name in ours if len(children[name]) < 2]
    assert not sources("utils.py", "*/utils.py")


def test_every_key_is_read():
    """By the code, not by the class that declares it."""
    for path in [*PRODUCT, *LAB]:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                keys = {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
                read = set()
                for other in [*PRODUCT, *LAB]:
                    for part in ast.walk(ast.parse(other.read_text())):
                        if isinstance(part, ast.Attribute):
                            read.add(part.attr)
                        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                            read.add(part.value)
                assert keys <= read, f"{path.name}: {sorted(keys - read)} are read nowhere"
