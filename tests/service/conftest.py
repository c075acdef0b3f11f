"""A server per test file, with one folder of inputs and a recipe that may be submitted to it; a Slurm cluster."""

from __future__ import annotations

import pytest

from tests.service.live import recipe, serving
from tests.service.slurm_cluster import Cluster, missing


@pytest.fixture(scope="module")
def cluster():
    if reason := missing():
        pytest.skip(f"Slurm: {reason}")
    with Cluster() as made:
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def body(inputs):
    return recipe(inputs)


@pytest.fixture(scope="module")
def live(tmp_path_factory, inputs, body):
    with serving(tmp_path_factory.mktemp("home"), roots=[inputs]) as running:
        yield running
