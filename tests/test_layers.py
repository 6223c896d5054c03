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
    return re.findall(r"^`(\w+)` {2,}\S", page, re.MULTILINE)


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
