import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| `([\w/]+\.py)::(\w+)` \| `([\w/]+\.py)::(\w+)` \|")


def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_equation_table_names_functions_and_tests_that_exist():
    text = (ROOT / "README.md").read_text()
    rows = ROW.findall(text)
    assert len(rows) >= 13
    for source, function, test_file, test in rows:
        assert function in names_in(source), f"{source} has no {function}"
        assert test in names_in(test_file), f"{test_file} has no {test}"


def test_every_public_equation_is_in_the_table():
    listed = {(source, function) for source, function, _, _ in ROW.findall((ROOT / "README.md").read_text())}
    helpers = {"shift_sigmas", "make_inference_sigmas"}  # parts of make_training_schedule's row
    for path in (ROOT / "refalign" / "objective").glob("*.py"):
        public = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        source = str(path.relative_to(ROOT))
        assert {name for name in public if not name.startswith("_")} - helpers <= {
            name for file, name in listed if file == source
        }
