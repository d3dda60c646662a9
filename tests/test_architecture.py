"""The import table of ARCHITECTURE.md, held by the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"errors", "geometry", "io.untrusted"},
    {"config", "io.tables", "pipeline.outcomes"},
    {"io.storage"},
    {"io.writing", "pipeline.places"},
    {"pipeline.steps", "io.images"},
    {"io.colours"},
    {"io.looks"},
    {"io.decoding"},
    {"io.video", "pipeline.summary", "pipeline.tombstones", "generation.settings"},
    {"pipeline.reuse"},
    {"pipeline.retries", "pipeline.clean"},
    {"objective"},
    {"models"},
    {"pipeline.telemetry", "pipeline.ray_start"},
    {"pipeline.ray_data"},
    {"shards.reader", "shards.sample"},
    {"estimates"},
    {"shards", "tracking", "generation"},
    {"curation", "training", "evaluation"},
    {"toy", "estimates.plan"},
    {"run", "cli", "takedown"},
]
ONLY_IN = {
    "av": {"io.looks", "io.decoding", "io.video", "io.images"},
    "ray": {"pipeline.telemetry", "pipeline.ray_data", "pipeline.ray_start", "training.launch", "evaluation.launch"},
    "mlflow": {"tracking"},
    "diffusers": {"models", "generation"},
    "transformers": {"models", "generation"},
    "ultralytics": {"models.yolo"},
}
CORE = ("objective", "models.wan", "models.projector", "training.loop", "training.step", "training.batch", "shards.reader")
NOT_IN_CORE = {"ray", "mlflow", "av", "pyarrow", "ultralytics", "webdataset"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "refalign").with_suffix("").parts).removesuffix(".__init__") or "__init__"


def iter_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            if node.module == "refalign":
                yield from (f"refalign.{alias.name}" for alias in node.names)


SOURCES = {module_name(path): path for path in sorted((ROOT / "refalign").rglob("*.py"))}


PACKAGES = {name for name in SOURCES if any(other.startswith(f"{name}.") for other in SOURCES)} | {"__init__"}


def layer_of(module: str) -> int:
    """Of the longest name in the table that the module's begins with."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(index for name in names for index, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("module", [name for name in SOURCES if name not in PACKAGES])
def test_imports_point_down(module):
    for imported in iter_imports(SOURCES[module]):
        if not imported.startswith("refalign."):
            continue
        target = imported.removeprefix("refalign.")
        if target in PACKAGES and target not in {name for rooms in LAYERS for name in rooms}:
            continue  # of ``from refalign.io import storage``, the module is looked at
        assert layer_of(target) <= layer_of(module), f"{module} imports {target}, which lies above it"


@pytest.mark.parametrize("package", ONLY_IN)
def test_each_large_library_has_its_rooms(package):
    users = {name for name, path in SOURCES.items() if package in {imported.split(".")[0] for imported in iter_imports(path)}}
    strangers = {name for name in users if not any(name == room or name.startswith(f"{room}.") for room in ONLY_IN[package])}
    assert users and not strangers


def test_files_and_functions_stay_small():
    for path in [*SOURCES.values(), *(ROOT / "pipelines").glob("*.py"), *(ROOT / "dags").glob("*.py")]:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_the_training_core_needs_few_packages():
    """Follows imports from the core's files, at module level, to everything they would load."""
    todo, seen = [name for name in SOURCES if name.startswith(CORE)], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        body = ast.parse(SOURCES[name].read_text()).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        for imported in (
            n
            for node in imports
            for n in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        ):
            assert imported.split(".")[0] not in NOT_IN_CORE, f"{name} loads {imported}"
            target = imported.removeprefix("refalign.")
            if imported.startswith("refalign.") and target in SOURCES:
                todo.append(target)
    assert {"models.wan", "objective.reference_alignment", "shards.reader"} <= seen
