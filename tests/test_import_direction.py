"""Imports point one way: each package imports only from those above it, and no modules import each other in a circle.

An import inside a function counts like one at the top. What only a type checker reads does not close a circle.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_llfc.errors

PACKAGE = Path(hf_llfc.errors.__file__).parent

# From the foundation to the surface; a part may import from the parts before it.
ORDER = (
    "errors",
    "foundation",
    "parallel",
    "symmetry",
    "adapters",
    "checkpoints",
    "merging",
    "recipe",
    "evaluation",
    "parents",
    "diagnostics",
    "alignment",
    "calibration",
    "publishing",
    "pipeline",
    "api",
    "trainer",
    "__init__",
    "cli",
    "__main__",
)

LAZY_EXCEPTIONS = {}

# Imports that close a circle, module → module, still to be broken.
KNOWN_CIRCLES: set[tuple[str, str]] = set()

# Answering `hf-llfc --help` or refusing a recipe must not take the seconds that these libraries need to load.
LIGHT = ("hf_llfc", "hf_llfc.errors", "hf_llfc.recipe", "hf_llfc.cli")
HEAVY = {"torch", "transformers", "datasets", "evaluate", "accelerate", "sklearn", "scipy", "matplotlib", "pandas"}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to, as named in `ORDER`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(node: ast.AST, path: Path) -> list[str]:
    """The absolute names of the modules that one import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ("hf_llfc", *path.relative_to(PACKAGE).parent.parts)
        base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
    return [f"{base}.{alias.name}" for alias in node.names]


def walk_with_function(tree: ast.AST, function: str | None = None):
    """Every node with the name of the innermost function around it."""
    for child in ast.iter_child_nodes(tree):
        yield child, function
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from walk_with_function(child, inner)


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def without_type_checking(tree: ast.AST):
    """Every node but those that only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from without_type_checking(child)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: dict[str, tuple[Path, str]]) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports anywhere."""
    graph: dict[str, set[str]] = {}
    for module, (path, source) in sources.items():
        named = [name for node in without_type_checking(ast.parse(source)) for name in imported_modules(node, path)]
        targets = {name if name in sources else name.rpartition(".")[0] for name in named}
        graph[module] = {target for target in targets if target in sources and target != module}
    return graph


def package_sources() -> dict[str, tuple[Path, str]]:
    return {module_of(path): (path, path.read_text(encoding="utf-8")) for path in source_files()}


def unknown_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle that `KNOWN_CIRCLES` does not explain, or none."""
    known = {module: {target for module_, target in KNOWN_CIRCLES if module_ == module} for module in graph}
    try:
        TopologicalSorter({module: targets - known[module] for module, targets in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def wrong_imports(path: Path, source: str) -> list[str]:
    """The imports in a file that point the wrong way, as `line: part`."""
    part = part_of(path)
    rank = ORDER.index(part)
    relative = path.relative_to(PACKAGE).as_posix()
    problems = []
    for node, function in walk_with_function(ast.parse(source)):
        for module in imported_modules(node, path):
            names = module.split(".")
            if names[0] != "hf_llfc":
                continue
            target = names[1] if len(names) > 1 and names[1] in ORDER else "__init__"
            allowed = target == part or ORDER.index(target) < rank
            if not allowed and (relative, function, target) not in LAZY_EXCEPTIONS:
                problems.append(f"{relative}:{node.lineno}: {part} must not import {target}")
    return problems


def test_every_part_has_its_place():
    assert {part_of(path) for path in source_files()} <= set(ORDER)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    assert wrong_imports(path, path.read_text(encoding="utf-8")) == []


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph(package_sources())
    assert unknown_circle(graph) == []
    for module, target in KNOWN_CIRCLES:
        assert target in graph[module], f"{module} no longer imports {target}: take the exception away"


@pytest.mark.parametrize("line", ["from hf_llfc.symmetry import spec", "def load():\n    import hf_llfc.symmetry.spec"])
def test_a_circle_is_seen(line):
    sources = package_sources()
    path, source = sources["hf_llfc.symmetry.transforms"]
    sources["hf_llfc.symmetry.transforms"] = (path, f"{source}\n{line}\n")
    assert "hf_llfc.symmetry.transforms" in unknown_circle(import_graph(sources))


def test_what_only_a_type_checker_reads_is_no_circle():
    sources = package_sources()
    path, source = sources["hf_llfc.symmetry.transforms"]
    added = "if TYPE_CHECKING:\n    from hf_llfc.symmetry.spec import PermutationSpec"
    sources["hf_llfc.symmetry.transforms"] = (path, f"{source}\n{added}\n")
    assert unknown_circle(import_graph(sources)) == []


def test_the_command_line_starts_light():
    modules = ", ".join(LIGHT)
    code = f"import sys, {modules}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout.split(), answer.stderr) == (0, [], "")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("symmetry/spec.py", "from hf_llfc.adapters import spec_for"),
        ("symmetry/spec.py", "def other():\n    import hf_llfc.adapters"),
        ("symmetry/spec.py", "from ..adapters import spec_for"),
        ("merging/linear.py", "from hf_llfc import pipeline"),
        ("merging/linear.py", "import hf_llfc"),
        ("merging/linear.py", "from hf_llfc import merge"),
        ("errors.py", "from .recipe import Recipe"),
    ],
)
def test_a_wrong_import_is_seen(file, source):
    assert len(wrong_imports(PACKAGE / file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("adapters/declare.py", "def declare():\n    from hf_llfc.symmetry import PermutationSpec"),
        ("pipeline/flow.py", "from hf_llfc.merging import linear_combination"),
        ("merging/weights.py", "from . import linear\nfrom ..errors import LLFCError\nimport torch"),
        ("__main__.py", "from hf_llfc.cli import main"),
    ],
)
def test_a_right_import_is_let_through(file, source):
    assert wrong_imports(PACKAGE / file, source) == []
