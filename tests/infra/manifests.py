"""What the tests of infra/ share: YAML files, and a Kubernetes API server's idea of a valid resource."""

import copy
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
_METADATA = {"type": "object", "properties": {name: {} for name in ("name", "namespace", "labels", "annotations")}}


def load_yaml(name):
    """A file of infra/."""
    return yaml.safe_load((INFRA / name).read_text())


def make_strict(schema):
    """An OpenAPI schema of a CRD as JSON schema that refuses fields it does not name."""
    return _strict(schema | {"properties": schema["properties"] | {"metadata": _METADATA}})


def _strict(schema):
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if "properties" in schema:
        out["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        out.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = _strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def apply_defaults(value, schema):
    """``value`` with the schema's defaults filled in, as the API server does before it validates."""
    if isinstance(value, list):
        return [apply_defaults(each, schema.get("items", {})) for each in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    rest = schema.get("additionalProperties")
    absent = {
        name: copy.deepcopy(each["default"]) for name, each in properties.items() if "default" in each and name not in value
    }
    return {
        name: apply_defaults(each, properties.get(name, rest if isinstance(rest, dict) else {}))
        for name, each in (value | absent).items()
    }


def find_script(entrypoint):
    """The script that a ``python .../pipelines/x.py --flags`` command runs, relative to the repository, and its flags."""
    words = shlex.split(entrypoint)
    at = next(index for index, word in enumerate(words) if "pipelines/" in word)
    return words[at][words[at].index("pipelines/") :], words[at + 1 :]


def load_run(entrypoint):
    """The config that the command's flags describe; an unknown flag or setting is an error."""
    from refalign.cli import load_config, make_parser

    script, flags = find_script(entrypoint)
    assert (ROOT / script).is_file(), script
    return load_config(make_parser("").parse_args(flags))[0]
