"""The size and shape of the code: lines, longest files and functions, untyped values, modules at the root, import circles.

uv run benchmarks/house.py
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("refalign", "workshop", "benchmarks", "pipelines", "dags")


def find_sources(*rooms: str) -> dict[str, Path]:
    """Module name to file; a package is its ``__init__.py``."""
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def iter_imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the import stands; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def make_graph(sources: dict[str, Path]) -> dict[str, set[str]]:
    """File to the files that it imports. A script of ``benchmarks/`` names its neighbours without the folder."""
    beside = {name.rpartition(".")[2]: name for name in sources if name.startswith("benchmarks.")}
    graph: dict[str, set[str]] = {}
    for name, path in sources.items():
        found = {beside.get(each, each) for each in iter_imports(path)}
        # Of ``from package import module`` the module counts, not the package that holds it.
        named = {each for each in found if each in sources and each != name}
        packages = {each for each in named if any(other.startswith(f"{each}.") for other in named)}
        graph[name] = named - {each for each in packages if sources[each].stat().st_size == 0}
    return graph


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, directly or through others."""
    reached = {name: _reach(graph, name) for name in graph}
    circles = {frozenset({name, *(other for other in reached[name] if name in reached[other])}) for name in graph}
    return sorted(sorted(circle) for circle in circles if len(circle) > 1)


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def iter_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def measure() -> dict[str, int]:
    """All figures; those that name no folder are of ``refalign/``."""
    library = find_sources("refalign")
    texts = {name: path.read_text() for name, path in library.items()}
    lines = {name: text.count("\n") for name, text in texts.items()}
    return {
        "lines": sum(lines.values()),
        "lines of workshop/": sum(path.read_text().count("\n") for path in find_sources("workshop").values()),
        "longest file": max(lines.values()),
        "longest function": max(length for path in library.values() for _, length in iter_functions(path)),
        "dict[str, Any]": sum(text.count("dict[str, Any]") for text in texts.values()),
        "Any": sum(len(re.findall(r"\bAny\b", text)) for text in texts.values()),
        "modules at the root": sum(name.count(".") == 1 and path.name != "__init__.py" for name, path in library.items()),
        "circles": len(find_circles(make_graph(find_sources(*ROOMS)))),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
    for circle in find_circles(make_graph(find_sources(*ROOMS))):
        print("circle:", ", ".join(circle))
