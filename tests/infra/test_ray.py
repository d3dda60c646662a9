"""The job package, the cluster launcher's file and the Slurm script."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.infra.manifests import INFRA, ROOT, load_run, load_yaml

_LARGEST_PACKAGE_BYTES = 32 * 2**20
_LARGEST_FILE_BYTES = 10 * 2**20  # above it Ray warns


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """What `ray job submit --working-dir . --runtime-env infra/ray/runtime_env.yaml` uploads."""
    from ray._private.runtime_env.packaging import create_package

    path = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(ROOT), path, include_gitignore=True, excludes=load_yaml("ray/runtime_env.yaml")["excludes"])
    return path


def test_the_runtime_environment_is_one_that_ray_knows():
    from ray.runtime_env import RuntimeEnv

    described = load_yaml("ray/runtime_env.yaml")
    assert set(RuntimeEnv(**described).to_dict()) >= {"excludes", "env_vars"}
    assert set(described) <= set(RuntimeEnv.known_fields)
    assert described["env_vars"]["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_the_package_is_small_and_holds_only_what_runs(package):
    with zipfile.ZipFile(package) as archive:
        entries = archive.infolist()
    assert package.stat().st_size < _LARGEST_PACKAGE_BYTES
    assert max(entry.file_size for entry in entries) < _LARGEST_FILE_BYTES
    assert {entry.filename.split("/")[0] for entry in entries} <= {
        "refalign", "pipelines", "pyproject.toml", "LICENSE", "NOTICE", ".gitignore",
    }  # fmt: skip


def test_the_package_runs_without_the_repository(package, tmp_path):
    """Scripts find their modules, and presets their weights, in the unpacked copy."""
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path)
    said = subprocess.run(
        [sys.executable, "pipelines/full.py", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert said.returncode == 0 and "wan2_1_1_3b" in said.stdout, said.stderr
    code = "from refalign.config.presets import toy; m = toy().models; print(m.base, m.vision_encoder, m.detector, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    folders = [Path(line) for line in found.stdout.split()]
    assert len(folders) == 3, found.stderr
    assert all(tmp_path in folder.parents and any(folder.rglob("*.safetensors")) for folder in folders)


def test_the_launcher_file_is_valid():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load_yaml("ray/cluster.yaml")
    validate_config(prepare_config(config))
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(config | {"max_worker": 1}))
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
        flags = {word.split("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert flags <= set(known_flags("start"))


def test_the_launcher_has_room_for_the_recipe():
    config = load_run("python pipelines/full.py --preset wan2_1_1_3b")
    resources = load_yaml("ray/cluster.yaml")["available_node_types"]["train"]["resources"]
    assert resources["GPU"] >= config.cluster.train.gpus * config.training.parallel.ranks
    assert resources["CPU"] >= config.cluster.train.cpus * config.training.parallel.ranks


def test_the_slurm_script_is_bash_and_its_flags_exist():
    path = INFRA / "slurm/refalign.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    example = re.search(r"# sbatch \S+ (.*)", text)
    assert example
    load_run(f"python pipelines/full.py {example[1]}")
    calls = re.findall(r"ray start ((?:[^\n&]|\\\n)*)", text.replace("\\\n", " "))
    assert len(calls) == 2
    for call in calls:
        assert {word.split("=")[0] for word in call.split() if word.startswith("--")} <= set(known_flags("start"))
    assert text.rstrip().endswith('python pipelines/full.py "$@"'), "the last command's exit code is the job's"


def known_flags(command):
    from ray.scripts.scripts import cli

    return [flag for option in cli.commands[command].params for flag in option.opts]
