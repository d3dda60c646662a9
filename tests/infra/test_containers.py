"""Images, the compose file, the MLflow server's start, and the table in infra/README.md."""

import configparser
import re
import subprocess
import sys

import pytest

from tests.infra.manifests import INFRA, ROOT, load_yaml

COMPOSE = load_yaml("compose.yaml")
TEXT = (INFRA / "compose.yaml").read_text()
DOCKERFILES = sorted(path for path in INFRA.rglob("Dockerfile*") if path.suffix != ".dockerignore")


def test_every_file_is_named_in_the_readme():
    text = (INFRA / "README.md").read_text()
    files = {str(path.relative_to(INFRA)) for path in INFRA.rglob("*") if path.is_file()} - {"README.md"}
    named = set(re.findall(r"`([\w./-]+/[\w.-]+|compose\.yaml|[A-Z]+\.md)`", text.split("## ")[0]))
    assert files and files == named


def test_no_secret_has_a_default_and_all_are_named_in_the_readme():
    variables = re.findall(r"(?<!\$)\$\{(\w+)([^}]*)\}", TEXT)
    assert variables and all(rest.startswith(":?") for _, rest in variables)
    readme = (INFRA / "README.md").read_text()
    assert all(f"`{name}`" in readme for name, _ in variables)
    assert not re.findall(r"(?<![$\w])\$\w", TEXT), "a variable without braces would be empty where it is unset"
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|TOKEN|SECRET|_KEY$", name) or value.startswith("${"), name


def test_ports_are_of_the_loopback_interface():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4 and all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_have_what_they_name(name):
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", service["image"]), "pinned by a version"
    if "build" in service:
        context = INFRA / service["build"]["context"]
        assert (context / service["build"].get("dockerfile", "Dockerfile")).is_file()
    else:
        assert not service["image"].startswith("refalign")
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (INFRA / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert set(service.get("depends_on", [])) <= set(COMPOSE["services"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_images_are_pinned_and_not_root(path):
    text = path.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2 and all(re.fullmatch(r"python:\d+\.\d+\.\d+-[\w-]+", base) for base in bases)
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["10001"]
    context = path.parent if path.parent.name == "mlflow" else ROOT
    copied = [line.split()[1:-1] for line in re.findall(r"^(COPY (?!--from).*)", text, re.MULTILINE)]
    assert copied and all((context / source).exists() for sources in copied for source in sources)
    for tool in re.findall(r"pip install[^\n]*", text):
        assert all("==" in word for word in re.findall(r"\"?[a-z][\w\[\]]*[^\s]*", tool.split("--no-cache-dir")[1]))


def test_images_share_versions_with_the_project():
    pinned = dict(re.findall(r'"(mlflow|boto3)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    text = (INFRA / "mlflow/Dockerfile").read_text()
    assert {name: re.search(rf"\b{name}(?:\[auth\])?==([\d.]+)", text)[1] for name in pinned} == pinned


def test_the_image_builds_see_what_they_copy():
    for kind in ("cpu", "gpu"):
        seen = (INFRA / f"docker/Dockerfile.{kind}.dockerignore").read_text()
        text = (INFRA / f"docker/Dockerfile.{kind}").read_text()
        copied = {source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for source in line.split()}
        assert seen.startswith("*\n") and copied == set(re.findall(r"^!(\S+)", seen, re.MULTILINE))


@pytest.mark.parametrize("script", ["mlflow/start.sh", "postgres/init.sh"])
def test_scripts_are_shell(script):
    subprocess.run(["sh", "-n", str(INFRA / script)], check=True)
    assert (INFRA / script).stat().st_mode & 0o100


def test_the_server_does_not_start_without_its_secrets():
    done = subprocess.run(["sh", str(INFRA / "mlflow/start.sh")], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode != 0 and "PGPASSWORD" in done.stderr


def test_the_server_is_started_with_flags_that_it_knows():
    text = (INFRA / "mlflow/start.sh").read_text()
    code = "from mlflow.cli import server; print(*[flag for option in server.params for flag in option.opts])"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split()
    flags = re.findall(r" (--[a-z-]+)", text.split("exec mlflow server")[1])
    assert {"--allowed-hosts", "--app-name"} <= set(flags) <= set(known)
    assert "basic-auth" in text and "password" not in text.split("exec")[1].lower()


def test_users_are_kept_in_a_database_of_their_own():
    settings = configparser.ConfigParser()
    settings.read(INFRA / "mlflow/basic_auth.ini")
    databases = re.findall(r"CREATE DATABASE (\w+)", (INFRA / "postgres/init.sh").read_text())
    assert settings["mlflow"]["database_uri"].rpartition("/")[2] in databases
    assert re.search(r"--backend-store-uri \S+/(\w+)", (INFRA / "mlflow/start.sh").read_text())[1] in databases
    assert "admin_password" not in settings["mlflow"]
