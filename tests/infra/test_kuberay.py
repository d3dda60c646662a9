"""The KubeRay manifests: valid by the CRD's schema, able to run what they start, and closed to strangers."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tests.infra.manifests import apply_defaults, load_run, load_yaml, make_strict

CLUSTER, JOB = load_yaml("kuberay/cluster.yaml"), load_yaml("kuberay/job.yaml")
RESOURCES = {"RayCluster": CLUSTER, "RayJob": JOB}
SPECS = {"RayCluster": CLUSTER["spec"], "RayJob": JOB["spec"]["rayClusterSpec"]}


@pytest.fixture(scope="module")
def schemas():
    """The schemas of KubeRay's custom resources, from the folder that `REFALIGN_CRD_SCHEMAS` names."""
    folder = os.environ.get("REFALIGN_CRD_SCHEMAS")
    if not folder:
        pytest.skip("REFALIGN_CRD_SCHEMAS is not set")
    names = {"RayCluster": "rayclusters.v1.schema.json", "RayJob": "rayjobs.v1.schema.json"}
    return {kind: json.loads((Path(folder) / name).read_text()) for kind, name in names.items()}


def find_errors(resource, schema):
    found = Draft202012Validator(make_strict(schema)).iter_errors(apply_defaults(resource, schema))
    return ["{}: {}".format("/".join(map(str, error.absolute_path)), error.message) for error in found]


def iter_pods(kind):
    for group in [SPECS[kind]["headGroupSpec"], *SPECS[kind]["workerGroupSpecs"]]:
        yield group.get("groupName", "head"), group["template"]
    if kind == "RayJob":
        yield "submitter", JOB["spec"]["submitterPodTemplate"]


PODS = [(kind, name, pod) for kind in RESOURCES for name, pod in iter_pods(kind)]
POD_IDS = [f"{kind}-{name}" for kind, name, _ in PODS]


@pytest.mark.parametrize("kind", RESOURCES)
def test_manifests_are_valid_by_the_schema(schemas, kind):
    assert RESOURCES[kind]["apiVersion"] == "ray.io/v1" and RESOURCES[kind]["kind"] == kind
    assert find_errors(RESOURCES[kind], schemas[kind]) == []


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ((), {"specs": {}}, "'specs' was unexpected"),
        (("metadata",), {"lables": {}}, "'lables' was unexpected"),
        (("spec",), {"enableAutoscaling": True}, "'enableAutoscaling' was unexpected"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), {"img": "a"}, "'img' was unexpected"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 0), {"hostIp": "a"}, "'hostIp' was unexpected"),
        (("spec",), {"headGroupSpec": None}, "'headGroupSpec' is a required property"),
        (("spec", "workerGroupSpecs", 0), {"groupName": None}, "'groupName' is a required property"),
        (("spec", "authOptions"), {"mode": "open"}, "'open' is not one of"),
        (("spec", "workerGroupSpecs", 1), {"maxReplicas": "1"}, "'1' is not of type 'integer'"),
    ],
)
def test_wrong_manifests_are_refused(schemas, path, change, said):
    wrong = copy.deepcopy(CLUSTER)
    place = wrong
    for step in path:
        place = place[step]
    place.update(change)
    for name in [name for name, value in change.items() if value is None]:
        del place[name]
    errors = find_errors(wrong, schemas["RayCluster"])
    assert len(errors) == 1 and said in errors[0]


def test_quantities_may_be_numbers_or_text(schemas):
    resource = copy.deepcopy(CLUSTER)
    limits = resource["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["cpu"] = 4
    assert find_errors(resource, schemas["RayCluster"]) == []
    limits["cpu"] = [4]
    assert find_errors(resource, schemas["RayCluster"])


def test_defaults_are_applied_before_validation(schemas):
    """Groups name no `numOfHosts`; the schema's default stands in."""
    filled = apply_defaults(CLUSTER, schemas["RayCluster"])
    assert [group["numOfHosts"] for group in filled["spec"]["workerGroupSpecs"]] == [1, 1]
    assert "numOfHosts" not in CLUSTER["spec"]["workerGroupSpecs"][0]


@pytest.mark.parametrize("kind", RESOURCES)
def test_ray_asks_for_a_token_and_kueue_decides(kind):
    assert SPECS[kind]["authOptions"]["mode"] == "token"
    assert RESOURCES[kind]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    from ray import __version__

    assert SPECS[kind]["rayVersion"] == __version__


@pytest.mark.parametrize(("kind", "name", "pod"), PODS, ids=POD_IDS)
def test_pods_are_not_root_and_have_limits(kind, name, pod):
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["securityContext"]["runAsUser"] > 0
    for container in pod["spec"]["containers"]:
        context = container["securityContext"]
        assert context["runAsNonRoot"] and context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(container["resources"]["requests"])
        assert re.fullmatch(r"refalign:\d+\.\d+\.\d+-(cpu|gpu)", container["image"])
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == container["image"].endswith("-gpu")


@pytest.mark.parametrize(("kind", "name", "pod"), PODS, ids=POD_IDS)
def test_secrets_come_by_reference(kind, name, pod):
    for container in pod["spec"]["containers"]:
        for variable in container.get("env", []):
            assert "value" not in variable or not re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", variable["name"])
        assert all("secretRef" in source for source in container.get("envFrom", []))
    assert set(SPECS["RayCluster"]["gcsFaultToleranceOptions"]["redisPassword"]) == {"valueFrom"}


@pytest.mark.parametrize(("kind", "name", "pod"), PODS, ids=POD_IDS)
def test_the_network_policy_covers_every_pod(kind, name, pod):
    policy = load_yaml("kuberay/network-policy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in policy["ingress"])


def test_volumes_exist():
    claim = load_yaml("kuberay/storage.yaml")["metadata"]["name"]
    for kind, name, pod in PODS:
        if name == "submitter":
            continue
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
        assert {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]} == set(volumes), kind


def test_the_job_ends_and_is_removed():
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert 0 < spec["ttlSecondsAfterFinished"] < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["backoffLimit"] > 0


def test_the_job_fits_its_cluster():
    """Kueue admits a fixed size, so what the settings ask for must be there from the start."""
    config = load_run(JOB["spec"]["entrypoint"])
    groups = {group["groupName"]: group for group in SPECS["RayJob"]["workerGroupSpecs"]}
    sizes = {}
    for name, group in groups.items():
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        sizes[name] = [(float(limits["cpu"]), float(limits["nvidia.com/gpu"]))] * group["replicas"]
    ranks = sum(min(cpus // config.cluster.train.cpus, gpus // config.cluster.train.gpus) for cpus, gpus in sizes["train"])
    assert ranks >= config.training.parallel.ranks
    for pool in (config.cluster.subjects, config.cluster.shards):
        fitting = sum(min(cpus // pool.cpus, gpus // pool.gpus) for cpus, gpus in sizes["train"] + sizes["curate"])
        assert fitting >= pool.max_actors
    assert "enableInTreeAutoscaling" not in SPECS["RayJob"]


def test_the_cluster_grows_from_nothing():
    spec = SPECS["RayCluster"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])
