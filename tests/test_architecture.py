"""The shape of the source: no import circles, short files, few parameters, no names compared.

Everything is read, nothing is imported: these tests know files, not behaviour.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastlstm"
LONGEST_FILE = 400  # lines
MOST_PARAMETERS = 10  # self included
LONGEST_README = 1000  # words

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(folder: str, *endings: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in endings)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


# --- imports ---------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """fastlstm/kernels/__init__.py is fastlstm.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, but for those that only a type checker sees."""
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in unseen
    ]


def imported(name: str, is_package: bool, tree: ast.AST, modules: set[str]) -> set[str]:
    """What module `name` imports of `modules`; `from . import x` is x where x is one."""
    found: set[str] = set()
    for node in runtime_imports(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
            base = ".".join([*parents, *base.split(".")]).rstrip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found.add(inner if inner in modules else base)
    return (found & modules) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules each of which reaches all others of its group."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for module in graph[ahead.pop()] - seen:
                seen.add(module)
                ahead.append(module)
        return seen

    reached = {module: reach(module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[m] if m in reached[other]))
        for m in graph
        if m in reached[m]
    }
    return [list(group) for group in sorted(groups)]


def test_imports_have_no_circle() -> None:
    """Imports within functions count too: a circle that is hidden there is one all the same."""
    paths = {module_name(path): path for path in sources("fastlstm", ".py")}
    graph = {
        name: imported(name, path.name == "__init__.py", parsed(path), set(paths))
        for name, path in paths.items()
    }
    found = circles(graph)
    assert not found, "\n".join(map(" <-> ".join, found))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import b", {"p.b"}),
        ("from .b import anything", {"p.b"}),
        ("def f():\n from p.b import g", {"p.b"}),
        ("import p.b as b", {"p.b"}),
        ("from .. import other", set()),
        ("if TYPE_CHECKING:\n from . import b", set()),
        ("if typing.TYPE_CHECKING:\n pass\nelse:\n from . import b", {"p.b"}),
        ("from . import version", {"p"}),
    ],
)
def test_every_kind_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert imported("p.a", False, ast.parse(source), {"p", "p.a", "p.b"}) == expected


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]


# --- sizes -----------------------------------------------------------------------------------


def test_files_are_short() -> None:
    paths = [
        *sources("fastlstm", ".py"),
        *sources("csrc", ".h", ".inc", ".cpp", ".cu"),
        *sources("benchmarks", ".py"),
    ]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    found = [f"{path}: {n} lines" for path, n in lengths.items() if n > LONGEST_FILE]
    assert not found, "\n".join(found)


def parameters(function: Function) -> int:
    a = function.args
    named = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
    return named + (a.vararg is not None) + (a.kwarg is not None)


def from_operators(tree: ast.Module) -> set[str]:
    """Names that a file imports from where the schemas are: what they decorate is an operator."""
    return {
        alias.asname or alias.name
        for node in runtime_imports(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module or "").rpartition(".")[2] in ("operators", "ops", "library")
    } | {"operators", "ops", "library"}


def is_prescribed(path: Path, function: Function, operators: set[str]) -> bool:
    """Whether others say what the parameters are.

    The schema of an operator, for its implementation; the launch, for a kernel; and nn.LSTM, for
    the constructors of the modules and the functions of `fastlstm.functional`.
    """
    for decorator in function.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        words = ast.unparse(called).split(".")
        if words in (["triton", "jit"], ["gluon", "jit"]) or operators & set(words):
            return True
    place = path.relative_to(ROOT).parts
    if function.name == "__init__":
        return place[:2] in (("fastlstm", "modules"), ("fastlstm", "modules.py"))
    return place == ("fastlstm", "functional.py") and function.name in ("lstm", "rnn")


def test_functions_have_few_parameters() -> None:
    """What belongs together is one object: State, Saved, Incoming, Gradients."""
    found = []
    for path in [*sources("fastlstm", ".py"), *sources("benchmarks", ".py")]:
        tree = parsed(path)
        operators = from_operators(tree)
        for node in ast.walk(tree):
            if not isinstance(node, Function) or is_prescribed(path, node, operators):
                continue
            if parameters(node) > MOST_PARAMETERS:
                found.append(f"{path.relative_to(ROOT)}: {node.name} has {parameters(node)}")
    assert not found, "\n".join(found)


# --- backends --------------------------------------------------------------------------------

BACKENDS = {"cpu", "torch", "triton", "cuda", "onnx", "reference"}
DEVICES = {"cpu", "cuda"}  # the types of torch.device: comparing those is another thing
ABOUT_BACKENDS = re.compile(r"backend|kernel|choice|chosen|wanted|\bname\b|_name\b", re.IGNORECASE)
ABOUT_DEVICES = re.compile(r"device|\.type\b", re.IGNORECASE)


def names_in(node: ast.AST) -> set[str]:
    """The backends that an expression spells out, alone or in a tuple, list or set."""
    nodes = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return BACKENDS & {n.value for n in nodes if isinstance(n, ast.Constant) and n.value != ""}


def decides(names: set[str], asked: ast.AST) -> bool:
    """Whether code that holds `asked` against `names` asks which backend it has to do with."""
    text = ast.unparse(asked)
    if not names or (names <= DEVICES and ABOUT_DEVICES.search(text)):
        return False
    return bool(names - DEVICES) or ABOUT_BACKENDS.search(text) is not None


def compared_names(tree: ast.AST) -> Iterator[tuple[int, set[str]]]:
    """Lines that compare the name of a backend, look it up, or keep a table by such names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for side, other in zip(sides, [*sides[1:], sides[-2]], strict=True):
                if decides(names_in(side), other):
                    yield node.lineno, names_in(side)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                values = {n.value for n in ast.walk(case.pattern) if isinstance(n, ast.MatchValue)}
                names = set().union(*map(names_in, values))
                if decides(names, node.subject):
                    yield case.pattern.lineno, names
        elif isinstance(node, ast.Subscript):
            if names_in(node.slice) and ABOUT_BACKENDS.search(ast.unparse(node.value)):
                yield node.lineno, names_in(node.slice)
        elif isinstance(node, ast.Dict):
            names = set().union(*(names_in(key) for key in node.keys if key is not None))
            if len(names) > 1 and not names <= DEVICES:
                yield node.lineno, names


def owned(path: Path) -> set[str]:
    """The backend whose own file or folder this is: kernels/cpu.py, kernels/triton/..."""
    place = path.relative_to(PACKAGE).with_suffix("").parts
    return {place[1]} & BACKENDS if place[0] == "kernels" and len(place) > 1 else set()


def test_only_a_backend_knows_its_name() -> None:
    """Everyone else asks the object that it has registered."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {', '.join(sorted(names - owned(path)))}"
        for path in sources("fastlstm", ".py")
        for line, names in compared_names(parsed(path))
        if names - owned(path)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ('backend == "cpu"', True),
        ('"triton" != anything', True),
        ('call.kernels in ("cpu", "cuda")', True),
        ('name not in {"reference"}', True),
        ('backend is "onnx"', True),
        ('KERNELS["cuda"]', True),
        ('table = {"cpu": 1, "triton": 2}', True),
        ('match name:\n case "cpu" | "auto":\n  pass', True),
        ('x.device.type == "cuda"', False),
        ('x.device.type in ("cpu", "cuda")', False),
        ('device_type != "cpu"', False),
        ('torch.device("cpu")', False),
        ('find_spec("triton") is None', False),
        ('register(name="cpu")', False),
        ('kind == "LSTM"', False),
        ('cache["cpu"]', False),
        ('sizes = {"cpu": 1, "cuda": 2}', False),
    ],
)
def test_comparisons_of_backends_are_told_from_others(source: str, is_one: bool) -> None:
    assert bool(list(compared_names(ast.parse(source)))) == is_one


# --- README ----------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Markdown without blocks of code, tables and comments."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))


def test_readme_is_read_in_minutes() -> None:
    words = [w for w in prose((ROOT / "README.md").read_text()).split() if re.search(r"\w", w)]
    assert len(words) <= LONGEST_README
