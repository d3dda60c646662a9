"""The import table of ARCHITECTURE.md, held by the code."""

import ast
from pathlib import Path

import pytest
from house import ROOMS, find_circles, find_sources, iter_functions, iter_imports, make_graph, measure

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"errors", "geometry", "io.untrusted"},
    {"config", "io.tables", "pipeline.outcomes"},
    {"io.storage"},
    {"io.writing", "pipeline.places"},
    {"pipeline.steps", "io.images", "pipeline.signals"},
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
    {"pipeline.stage"},
    {"shards.reader", "shards.sample", "shards.writer"},
    {"estimates"},
    {"shards", "tracking", "generation"},
    {"curation", "training", "evaluation"},
    {"toy"},
    {"stages"},
    {"run", "cli", "takedown"},
]
ONLY_IN = {
    "av": {"io.looks", "io.decoding", "io.video", "io.images"},
    "ray": {"pipeline.telemetry", "pipeline.ray_data", "pipeline.ray_start", "training.launch"},
    "mlflow": {"tracking"},
    "diffusers": {"models", "generation"},
    "transformers": {"models", "generation"},
    "ultralytics": {"models.yolo"},
    "jinja2": {"evaluation.report", "tracking.model_card"},
    "matplotlib": {"evaluation.report"},
}
CORE = ("objective", "models.wan", "models.projector", "training.loop", "training.step", "training.batch", "shards.reader")
NOT_IN_CORE = {"ray", "mlflow", "av", "pyarrow", "ultralytics", "webdataset"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "refalign").with_suffix("").parts).removesuffix(".__init__") or "__init__"


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
    for name, path in find_sources("refalign", "workshop", "pipelines", "dags").items():
        lines = path.read_text().count("\n")
        assert lines <= 400, f"{name} has {lines} lines"
        for function, length in iter_functions(path):
            assert length <= 60, f"{name}: {function} has {length} lines"


def test_no_file_imports_itself_through_others():
    assert find_circles(make_graph(find_sources(*ROOMS))) == []


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert find_circles(graph) == [["a", "b", "c"]]


def test_few_modules_lie_at_the_root():
    assert sum("." not in name for name in SOURCES if name not in PACKAGES) <= 5


def test_few_values_are_untyped():
    figures = measure()
    assert figures["dict[str, Any]"] <= 60 and figures["Any"] <= 200, figures


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
