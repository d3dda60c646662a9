"""Airflow puts its folder of DAGs on the path; so do these tests."""

import sys

from tests.infra.manifests import ROOT

sys.path.insert(0, str(ROOT / "dags"))
