"""The house: which module may import which, and how its statements are written."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACES = ("crf", "kmeans", "stego", "cli")
# What each storey may import of ours, beside modules of its own
BELOW = {
    "crf": set(),
    "kmeans": set(),
    "stego_parts": {"crf", "kmeans"},
    "stego": {"crf", "kmeans", "stego_parts"},
    "cli_parts": {"crf", "kmeans", "stego_parts", "stego"},
    "cli": {"stego_parts", "stego", "cli_parts"},
}
PACKED = 5  # assignments a, b = x, y per 1,000 lines, at most
LONGEST_FUNCTION = 50  # lines
LONGEST_MODULE = {"stego": 650}  # lines, where it is not 500


def module_names() -> list[str]:
    parts = [
        f"{path.parent.name}.{path.stem}" for path in ROOT.glob("*_parts/*.py") if path.stem != "__init__"
    ]
    return sorted([*FACES, *parts])


def source(module: str) -> str:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()


def imports(module: str) -> set[str]:
    """All that a module imports, at its top and inside its functions, by dotted names."""
    names = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def our_imports(module: str) -> set[str]:
    return (imports(module) & set(module_names())) - {module}


def storey(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", module_names())
def test_imports_point_down_the_storeys(module):
    reached = {storey(name) for name in our_imports(module)}
    assert reached - {storey(module)} <= BELOW[storey(module)]


def test_imports_make_no_circle():
    list(TopologicalSorter({module: our_imports(module) for module in module_names()}).static_order())


@pytest.mark.parametrize("module", module_names())
def test_only_the_command_line_knows_click(module):
    assert "click" not in imports(module) or storey(module) in ("cli", "cli_parts")


def is_packed(node) -> bool:
    """Whether it is a, b = x, y; a swap and the unpacking of one value are none."""
    if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)):
        return False
    if not isinstance(node.value, ast.Tuple):
        return False
    left = {ast.unparse(each) for each in node.targets[0].elts}
    right = {ast.unparse(each) for each in node.value.elts}
    return left != right


def test_one_statement_says_one_thing():
    texts = [source(module) for module in module_names()]
    lines = sum(text.count("\n") for text in texts)
    packed = sum(is_packed(node) for text in texts for node in ast.walk(ast.parse(text)))
    assert 1000 * packed / lines < PACKED


@pytest.mark.parametrize("module", module_names())
def test_modules_and_functions_fit_in_a_head(module):
    assert source(module).count("\n") <= LONGEST_MODULE.get(module, 500)
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
