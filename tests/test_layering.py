"""The shape of the source, read without importing it: who may import whom, what nobody may do."""

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = ("jaxengine.pallas_kernels", "jaxengine.models", "jaxengine")  # from the bottom up
HOST_ONLY = (
    "arguments",
    "ebnf",
    "grammar",
    "json_schemas",
    "lark",
    "matcher",
    "pages",
    "prefix_tree",
    "request",
    "sampling_params",
    "sampling_values",
    "scheduler",
    "step_plan",
    "server_args",
    "sessions",
    "sglang_arguments",
    "structural_tags",
    "turns",
)


def _sources() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module; the links inside `jaxengine` are not followed."""
    for path in sorted((ROOT / "jaxengine").rglob("*.py")):
        if not {"models", "pallas_kernels"} & set(path.relative_to(ROOT).parts):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for folder in ("models", "pallas_kernels"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"jaxengine.{folder}.{path.stem}", path


MODULES = {name.removesuffix(".__init__"): path for name, path in _sources()}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def _imports(module: str) -> frozenset[str]:
    """Everything the module names in an import statement, wherever it stands."""
    found = set[str]()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return frozenset(found)


def _reached(module: str) -> set[str]:
    """What the module imports, itself or through modules of ours."""
    seen, todo = set[str](), [module]
    while todo:
        new = _imports(todo.pop()) - seen
        seen |= new
        todo += [name for name in new if name in MODULES]
    return seen


def _rank(module: str) -> int:
    inside = (module == rank or module.startswith(rank + ".") for rank in RANKS)
    return list(inside).index(True)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    ours = {name for name in _imports(module) if name.split(".")[0] == "jaxengine"}
    upward = {name for name in ours if _rank(name) > _rank(module)}
    assert not upward, f"{module} imports {upward}, which stand above it"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: _imports(module) & MODULES.keys() - {module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules of a cycle


@pytest.mark.parametrize("name", HOST_ONLY)
def test_what_plans_on_the_host_reaches_no_jax(name: str) -> None:
    reached = {module.split(".")[0] for module in _reached(f"jaxengine.{name}")}
    assert not reached & {"jax", "jaxlib", "flax", "jaxtyping"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_torch_or_unpickles(module: str) -> None:
    forbidden = {"torch", "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not forbidden & {name.split(".")[0] for name in _imports(module)}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"jaxengine.config"}))
def test_only_config_reads_the_environment(module: str) -> None:
    names = {node.attr for node in ast.walk(_tree(module)) if isinstance(node, ast.Attribute)}
    assert not names & {"environ", "environb", "getenv", "putenv"}


@pytest.mark.parametrize("module", MODULES)
def test_no_call_trusts_code_or_pickles_that_come_with_a_file(module: str) -> None:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            value = node.value
            assert isinstance(value, ast.Constant) and value.value is False, (
                f"{module}:{value.lineno} passes {node.arg}"
            )
