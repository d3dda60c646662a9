"""Nothing that data says becomes markup, and no password that was typed comes out again."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from refalign.cli import run_command
from refalign.config import apply_overrides
from refalign.config.presets import toy, toy_tiny
from refalign.errors import ArtifactError, BackendUnavailable, ConfigError
from refalign.evaluation.report import make_page
from refalign.evaluation.report.curation import make_curation_report
from refalign.io.untrusted import hide_secrets, holds_password
from refalign.tracking.model_card import Provenance, make_model_card
from tests.evaluation.make_run import make_shards, make_subjects

HOSTILE = "</td></figcaption></pre>\"'><img src=x onerror=alert(1)><script>alert(2)</script>[a](javascript:alert(3))"
ROOT = Path(__file__).resolve().parents[2]


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def check_harmless(page, scripts):
    elements = Elements(page).found
    assert sum(tag == "script" for tag, _ in elements) == scripts
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert not [values for tag, values in elements if tag == "img" and not values["src"].startswith("data:")]
    assert "onerror=alert" in page and "&lt;script&gt;" in page, "it is there to be read"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps and summary whose every text from outside is hostile: names, groups, classes, licences, reasons, sample keys."""
    output = tmp_path_factory.mktemp("run")
    key = "<img src=x onerror=alert(1)><script>"
    steps = {"subjects": make_subjects(output, [HOSTILE], HOSTILE), "shards": make_shards(output, {"train": [key]}, HOSTILE)}
    path = steps["subjects"].folder / "manifest.json"
    terms = {"licenses": {HOSTILE: 1}, "consents": {HOSTILE: 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | terms))
    level = {"planned": 2, "written": 0, "filtered": {HOSTILE: 1}, "quarantined": {HOSTILE: 1}}
    outcome = {"level": "video", "item": f"{HOSTILE}.mp4", "reason": HOSTILE, "message": f"{HOSTILE}.mp4: {HOSTILE}"}
    summary = {
        "videos": 2, "clips": 1, "subjects": 1, "counts": {"subjects.video": level, HOSTILE: level}, "outcomes": [outcome],
        "filtered": {HOSTILE: 1}, "quarantined": {HOSTILE: 1}, "command": HOSTILE, "output": HOSTILE, "digest": HOSTILE,
        "seconds": {HOSTILE: 1.0}, "config": {HOSTILE: {HOSTILE: HOSTILE}}, "untrained": HOSTILE,
    }  # fmt: skip
    return output, steps, summary


def test_the_report_shows_hostile_texts_as_texts(run):
    _, steps, summary = run
    check_harmless(make_page(summary, steps), scripts=1)


def test_the_curation_report_shows_hostile_texts_as_texts(run):
    output, steps, summary = run
    path = make_curation_report(summary, output=output, steps=steps)
    check_harmless(path.read_text(), scripts=0)


def test_the_model_card_shows_hostile_texts_as_texts():
    config = toy().model_copy(update={"tracking": toy().tracking.model_copy(update={"model_name": HOSTILE})})
    provenance = Provenance(
        licenses={f"{HOSTILE}-nc": 3}, consents={HOSTILE: 3}, shard_digest="d", fingerprint="f", code=HOSTILE,
        folders={"train": "train-f"}, command=f"uv run pipelines/full.py --input 'a\n\n{HOSTILE}'",
    )  # fmt: skip
    card = make_model_card(config, provenance, {HOSTILE: HOSTILE}, note=f"{HOSTILE}\n\n{HOSTILE}")
    rendered = [line for line in card.splitlines() if not line.startswith("    ")]  # the rest is code, shown as it is
    assert set(re.findall(r"<[^>]*>", "\n".join(rendered))) == {"<details>", "<summary>", "</summary>", "</details>"}
    assert "](" not in "\n".join(rendered) and card.count("&lt;script>") >= 6


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@mlflow/x", "https://...@mlflow/x"),
        ("--set tracking.uri=http://token@host", "--set tracking.uri=http://...@host"),
        ("s3://key:hunter2@bucket/a and s3://k:hunter2@b", "s3://...@bucket/a and s3://...@b"),
        ("postgresql://me:hun@ter2@db/mlflow", "postgresql://...@db/mlflow"),
        ("https://s/a.mp4?X-Amz-Signature=hunter2&b=1", "https://s/a.mp4?X-Amz-Signature=...&b=1"),
        ("https://hub/a?token=hunter2", "https://hub/a?token=..."),
        ("s3://bucket/a@b.mp4, me@example.org", "s3://bucket/a@b.mp4, me@example.org"),
    ],
)
def test_secrets_in_uris_are_left_out(text, shown):
    assert hide_secrets(text) == shown


def test_the_name_of_a_database_user_is_no_secret():
    assert not holds_password("postgresql+psycopg://mlflow@postgres/mlflow")
    assert apply_overrides(toy(), ["tracking.uri=postgresql://mlflow@db/x"]).tracking.uri == "postgresql://mlflow@db/x"


@pytest.mark.parametrize("error", [ConfigError("https://me:hunter2@host: no"), KeyboardInterrupt()])
def test_the_command_line_repeats_no_password(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipelines/full.py", "--set", "tracking.uri=https://me:hunter2@host"])

    def work():
        raise error

    assert run_command(work)
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err and "...@host" in said.err


def test_a_command_with_a_password_leaves_it_nowhere(tmp_path):
    arguments = ["--output", str(tmp_path / "out"), "--set", "tracking.uri=https://me:hunter2@host"]
    done = subprocess.run(
        [sys.executable, "pipelines/full.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr and not list(tmp_path.rglob("*"))


def test_a_server_that_is_asked_is_named_without_its_password():
    from refalign.tracking.client import check_server

    with pytest.raises(BackendUnavailable) as caught:
        check_server("http://me:hunter2@127.0.0.1:9")
    assert "127.0.0.1:9" in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """URI of MLflow, and the folder of a registered model in its store."""
    from refalign.tracking.registry import digest_weights, register_model, resolve_model
    from refalign.tracking.run import TrackedRun

    config = toy_tiny()
    tracked = TrackedRun.open(config, output=tmp_path_factory.mktemp("served"), fingerprint="a" * 12)
    export = Path(config.models.base)
    tags = {"refalign.weights": digest_weights(export)}
    register_model(tracked, config, key="toy", export_folder=export, card="card", tags=tags)
    folder = resolve_model("models:/refalign@challenger", tracked.uri)
    return tracked.uri, next(parent for parent in folder.parents if (parent / "MLmodel").is_file()), folder


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _describe(change):
    return lambda model, export: (model / "MLmodel").write_text(change((model / "MLmodel").read_text()))


TAMPERED = {
    "weights of another": (
        lambda model, export: _flip(sorted((export / "transformer").glob("*.safetensors"))[0]),
        "was registered with .* they were changed since",
    ),
    "weights that were added": (
        lambda model, export: shutil.copy(sorted((export / "vae").glob("*.safetensors"))[0], export / "more.safetensors"),
        "they were changed since",
    ),
    "description that leads outside": (
        _describe(lambda text: re.sub(r"path: artifacts/\S+", "path: ../../../..", text)),
        "names weights outside of it",
    ),
    "description with a Python tag": (
        _describe(lambda text: "x: !!python/object/apply:os.system ['touch CANARY']\n" + text),
        "describes no model of refalign",
    ),
    "description that is a list": (_describe(lambda text: "[]"), "describes no model of refalign"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_registered_model_that_was_changed_is_refused(registered, name, tmp_path, monkeypatch):
    from refalign.tracking.registry import resolve_model

    uri, model, export = registered
    tamper, words = TAMPERED[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "before")
    try:
        tamper(model, export)
        with pytest.raises(ArtifactError, match=words):
            resolve_model("models:/refalign@challenger", uri)
        assert not (tmp_path / "CANARY").exists()
    finally:
        shutil.rmtree(model)
        shutil.copytree(tmp_path / "before", model)
    assert resolve_model("models:/refalign@challenger", uri) == export


@pytest.mark.parametrize("source", ["models:/../../etc/1", "models:/..%2F..%2Fetc@a", "models:/a'%20or%20'1@a", "models:/@a"])
def test_a_model_name_is_no_path_and_no_query(registered, source):
    from refalign.tracking.registry import resolve_model

    with pytest.raises((ArtifactError, BackendUnavailable), match="not in the registry|expected models:/|MLflow at"):
        resolve_model(source, registered[0])
