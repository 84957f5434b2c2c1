"""The ladder of the package: who may import whom, read from every import statement, those inside functions too."""

import ast
import pathlib

import pytest

pytestmark = pytest.mark.whole  # the cases are modules

ROOT = pathlib.Path(__file__).parents[1]
# What each package may import of the library beside itself; the modules that stand alone count as one step.
BOTTOM = {"_checks", "_numerics", "_roots", "_trees", "_version"}
LADDER = {
    "kernels": BOTTOM,
    "rows": BOTTOM | {"kernels"},
    "normalizers": BOTTOM | {"rows"},
    "attention": BOTTOM | {"kernels", "rows", "normalizers"},
    "losses": BOTTOM | {"rows", "normalizers"},
    "calibration": BOTTOM | {"rows", "normalizers"},
    "decoding": BOTTOM | {"rows", "normalizers"},
    "heads": BOTTOM | {"rows", "losses"},
    "optimizers": BOTTOM,
    "merging": BOTTOM,
    "norms": BOTTOM,
    "activations": BOTTOM,
    "flax": BOTTOM | {"rows", "norms", "activations"},
}
TOP = {"__init__", "scaling", "tune"}  # they may import everything
# Imports inside functions, each with its reason.
LATE = {
    "jaxsoft.calibration.measures": "matplotlib is optional, and slow to import",
    "jaxsoft.kernels.gpu": "Pallas' GPU backend may be missing, and must not be loaded before a kernel is used",
    "jaxsoft.normalizers.stochastic": "jax.extend imports Pallas",
}


def modules():
    for path in sorted((ROOT / "jaxsoft").rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(name):
    """`(module, imported name or None, inside a function)` of the library's imports in a module."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full in MODULES
                yield (
                    full if is_module else node.module,
                    None if is_module else alias.name,
                    id(node) in inside,
                )


def step(module):
    """The package or the lonely module of the library that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_the_ladder(name):
    if step(name) in TOP:
        return
    allowed = LADDER.get(step(name), BOTTOM) | {step(name)}
    for module, imported, _ in imports(name):
        if module == "jaxsoft":
            assert imported in BOTTOM, f"{name} imports {imported} of the whole library"
        elif module.startswith("jaxsoft."):
            assert step(module) in allowed, f"{name} imports {module}, which is not below it"


@pytest.mark.parametrize("name", MODULES)
def test_packages_meet_in_their_public_names_and_in_inner(name):
    for module, imported, _ in imports(name):
        package = step(module)
        if module.startswith("jaxsoft.") and package not in BOTTOM | {step(name)}:
            doors = {f"jaxsoft.{package}", f"jaxsoft.{package}.inner", "jaxsoft.rows.reductions"}
            assert module in doors, f"{name} imports {module}: go through {sorted(doors)}"
            assert not (imported or "").startswith("_"), f"{name} imports {module}.{imported}"


def test_inner_interfaces_hold_what_is_used():
    used = {(module, imported) for name in MODULES for module, imported, _ in imports(name)}
    for name in MODULES:
        if name.endswith(".inner"):
            names = [
                a
                for n in ast.walk(ast.parse(MODULES[name].read_text()))
                if isinstance(n, ast.ImportFrom)
                for a in n.names
            ]
            unused = [e for a in names if (name, e := a.asname or a.name) not in used]
            assert not unused, f"nobody imports {unused} from {name}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_inside_functions_have_a_reason(name):
    late = [module for module, _, inside in imports(name) if inside]
    if late:
        assert name in LATE, (
            f"{name} imports {late} inside a function: give the reason in LATE, or move it up"
        )
    else:
        assert name not in LATE, f"{name} has no import inside a function any more"


def test_no_circles():
    edges = {name: {m for m, _, _ in imports(name) if m in MODULES} for name in MODULES}
    # A package's __init__ imports its modules; a module that imports its own package's public names would be a circle.
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for module in sorted(edges[name]):
                visit(module)
            path.pop()
            done.add(name)

    for name in MODULES:
        visit(name)
