"""The runbook quotes what the software prints, and the threat model names tests and files that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK, SECURITY = ((ROOT / "infra" / name).read_text() for name in ("RUNBOOK.md", "SECURITY.md"))
QUOTES = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", RUNBOOK)


def read_texts():
    """All texts of the sources, the values in them left out."""
    for path in (ROOT / "refalign").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def texts():
    return " ".join("\0\n".join(read_texts()).split(" "))


def test_every_quoted_message_is_one_that_is_printed(texts):
    assert len(QUOTES) >= 30
    assert not [quote for quote in QUOTES if quote not in texts]


def test_quotes_that_nobody_prints_are_found_out(texts):
    assert "everything is on fire" not in texts and "finish it first" in texts


@pytest.mark.parametrize("text", [RUNBOOK, SECURITY], ids=["runbook", "security"])
def test_files_and_settings_that_are_named_exist(text):
    from refalign.config import apply_overrides
    from refalign.config.presets import load_preset

    for name in re.findall(r"`((?:refalign|pipelines|tests|infra)/[\w/]+(?:\.py)?)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((\w+\.md)\)", text):
        assert (ROOT / "infra" / name).exists(), name
    for setting in re.findall(r"--set ([\w.]+=[^\s`]+)", text):
        apply_overrides(load_preset("wan2_1_1_3b"), [setting])
    for setting in re.findall(r"`((?:training|tracking|storage|curation|cluster|evaluation)\.[\w.]+)`", text):
        node = load_preset("toy")
        for part in setting.split("."):
            node = getattr(node, part)


def test_commands_of_the_runbook_know_their_flags():
    from refalign.estimates.plan import Assumptions

    for command, rest in re.findall(r"(pipelines/\w+\.py)((?:[^\n`])*)", RUNBOOK):
        source = (ROOT / command).read_text() + (ROOT / "refalign" / "cli.py").read_text()
        known = set(re.findall(r'"(--[a-z][\w-]*)"', source))
        if command == "pipelines/plan.py":
            known |= {field.alias for field in Assumptions.model_fields.values()}
        for flag in re.findall(r"--[a-z][\w-]*", rest):
            assert flag in known, f"{command} {flag}"


def test_both_fit_on_their_pages():
    """A page is about 4,000 characters of prose; of tables more."""
    assert len(SECURITY.splitlines()) <= 70 and len(RUNBOOK.splitlines()) <= 80
