"""Imports go one way: a module imports only what the contents pages list before it."""

import ast
import pathlib
import re

import pytest

import jattn

ROOT = pathlib.Path(jattn.__file__).parent


def listed(package: str) -> list[str]:
    """The modules on the contents page of a package, in its order."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    page = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.findall(r"^ *`(\w+)` {2,}\S", page, re.MULTILINE)


def order(package: str = "") -> list[str]:
    """All modules in the order of the contents pages; a package comes after its modules."""
    found = []
    for module in listed(package):
        name = f"{package}.{module}".lstrip(".")
        inner = order(name) if (ROOT / name.replace(".", "/")).is_dir() else []
        found += [*inner, name]
    return found


LEVEL = {module: level for level, module in enumerate(order())}
PACKAGES = {name for name in LEVEL if (ROOT / name.replace(".", "/")).is_dir()}
MODULES = sorted(set(LEVEL) - PACKAGES)
OUTSIDE = {"jax", "jaxlib", "chex", "numpy"}
PICTURES = [f"pictures.{name}" for name in ("panels", "colours", "words")]
EXTRAS = {
    **{name: {"matplotlib"} for name in ("plot", *PICTURES)},
    **{f"adapters.{name}": {"flax"} for name in ("nnx", "linen")},
    **{f"adapters.{name}": {name} for name in ("equinox", "haiku", "keras")},
}


def imports(module: str):
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # What a package gives out comes from the package, or is one of its modules.
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            own = {name for name in modules if name.removeprefix("jattn.") in LEVEL}
            yield from own or [node.module]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_earlier_layers_only(module):
    own = {name.removeprefix("jattn.") for name in imports(module) if "jattn." in name}
    later = {name for name in own if LEVEL.get(name, 99) >= LEVEL[module]}
    assert not later


def test_every_module_has_a_layer():
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert found == set(MODULES)  # and no module is listed that is not there


@pytest.mark.parametrize("module", MODULES)
def test_core_depends_on_jax_and_chex_alone(module):
    import sys

    known = set(sys.stdlib_module_names) | OUTSIDE | {"jattn"} | EXTRAS.get(module, set())
    assert {name.split(".")[0] for name in imports(module)} <= known


# Kernels are one body of code from their first read to their last write.
KERNELS = ("implementations.tpu.", "implementations.gpu.")


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module):
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert len(text.splitlines()) <= (350 if module.startswith(KERNELS) else 250)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines <= 40, node.name  # one screen


def test_the_picture_of_imports_has_few_rooms_and_floors():
    """A room is what one sees at the top; a floor is above all that its rooms import."""
    below: dict[str, set[str]] = {name.partition(".")[0]: set() for name in MODULES}
    for module in MODULES:
        room = module.partition(".")[0]
        names = (x.removeprefix("jattn.") for x in imports(module) if "jattn." in x)
        below[room] |= {x.partition(".")[0] for x in names} - {room}

    def floor(room):
        return 1 + max(map(floor, below[room]), default=0)

    # With `jattn` and `python -m jattn` they are 25 rooms on 11 floors at most.
    assert len(below) <= 23
    assert max(map(floor, below)) <= 10
