"""Imports go one way: a module may import only modules of the layers before it."""

import ast
import pathlib

import pytest

import jattn

ROOT = pathlib.Path(jattn.__file__).parent

# In reading order; modules of one layer do not know one another.
LAYERS = (
    {"shapes", "pointwise"},
    {"masks", "modifiers", "dropout", "state", "split"},
    {"definition", "tables"},
    {"problem"},
    {"blocks.intervals"},
    {"blocks.rules", "blocks.rearrange"},
    {"blocks.graph"},
    {"blocks.bounds"},
    {"blocks.decide"},
    {"blocks.table"},
    {"tile", "skipping", "operation", "tpu.pairs", "tpu.schedule"},
    {"tpu.layout"},
    {"tpu.call", "tpu.tiles"},
    {"tpu.forward", "tpu.backward"},
    {"tpu.segments"},
    {"blockwise.layout", "blockwise.join", "tabulate"},
    {"blockwise.tiles"},
    {"blockwise.forward", "blockwise.backward"},
    {"blockwise.rows", "blockwise.tangent"},
    {"dense", "blockwise.attention", "blockwise.views"},
    {"blockwise.strongest", "tpu.attention"},
    {"cudnn"},
    {"dispatch", "views"},
    {"explanation"},
    {"api"},
    {"testing", "expression", "picture", "command.refusal", "adapters.jax_nn"},
    {"panels"},
    {"paint"},
    {"text_figure", "terminal"},
    {"plot", "command.files", "command.check", "command.timing", "adapters.layer"},
    {"command.attend", "command.mask", "command.welcome"},
    {f"adapters.{name}" for name in ("nnx", "linen", "equinox", "haiku", "keras")},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(LEVEL)
for package in ("blockwise", "tpu"):  # which give the functions of their last module
    LEVEL[package] = LEVEL[f"{package}.attention"]
OUTSIDE = {"jax", "jaxlib", "chex", "numpy"}
EXTRAS = {
    **{name: {"matplotlib"} for name in ("paint", "panels", "plot", "text_figure")},
    **{f"adapters.{name}": {"flax"} for name in ("nnx", "linen")},
    **{f"adapters.{name}": {name} for name in ("equinox", "haiku", "keras")},
}


def imports(module: str):
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            if node.module in ("jattn", "jattn.adapters", "jattn.blocks", "jattn.tpu"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


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
