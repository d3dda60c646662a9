"""Training on a cluster of two raylets that lose drivers, ranks and nodes; the short form of ``benchmarks/chaos_training.py``."""

import pytest
from chaos_training import copy_data, find_run, load_records, run_chaos, start, watch
from local_cluster import local_cluster

ONE_RANK = {"training.parallel.ranks": 1, "training.checkpoint.every": 2}
ELASTIC = {
    "training.parallel.ranks": 2,
    "training.parallel.min_ranks": 1,
    "training.micro_batch": 4,
    "training.checkpoint.every": 3,
    "cluster.train.cpus": 1,
}


def test_killed_training_ends_with_the_same_bytes(finished_run, tmp_path):
    output, *_ = finished_run  # an undisturbed run
    figures = run_chaos(tmp_path, kills=3, settings=ONE_RANK, undisturbed=output, seed=1)
    assert figures["killed"] == {"driver": 1, "rank": 1, "node": 1}
    assert figures["identical"] and figures["steps"] == 24 and figures["compared"] > 100


@pytest.mark.heavy  # Ray takes minutes to give up a lost node
def test_a_run_goes_on_with_fewer_ranks_where_a_node_is_lost(finished_run, tmp_path):
    undisturbed, *_ = finished_run  # one rank
    output = tmp_path / "run"
    copy_data(undisturbed, output)
    with local_cluster(tmp_path / "cluster", head_cpus=1, nodes=1) as cluster:
        driver = start("train", output, ELASTIC, cluster)
        assert watch(driver, cluster, lambda: len(load_records(output)) > 7), output.with_suffix(".log").read_text()[-3000:]
        cluster.kill_node(cluster.nodes[0])
        watch(driver, cluster, lambda: False)
        assert driver.returncode == 0, output.with_suffix(".log").read_text()[-3000:]
    assert find_run(output).name == find_run(undisturbed).name
    records, expected = load_records(output), load_records(undisturbed)
    assert [record["step"] for record in records] == list(range(25))
    ranks = [record["ranks"] for record in records[1:]]
    assert set(ranks) == {1, 2} and ranks == sorted(ranks, reverse=True)
    assert [record["samples_consumed"] for record in records] == [record["samples_consumed"] for record in expected]
    for mine, theirs in list(zip(records, expected, strict=True))[1:21]:
        assert mine["total"] == pytest.approx(theirs["total"], rel=1e-5), mine["step"]
