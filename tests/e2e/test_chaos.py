"""The short form of ``benchmarks/chaos_curation.py``: three kills on a cluster of two raylets, and nothing shows."""

from chaos_curation import run_chaos


def test_killed_curation_ends_with_the_same_bytes(tmp_path):
    figures = run_chaos(tmp_path, kills=3, videos=6, seed=1)
    assert figures["kills"] == 3 and figures["identical"] and figures["files_compared"] > 15
