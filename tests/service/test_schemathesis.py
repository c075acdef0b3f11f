"""Generated requests for every operation that the description of the interface names: none makes the server fail."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.service.live import recipe, serving

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = 12


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    body = recipe(inputs)
    with serving(tmp_path_factory.mktemp("home"), roots=[inputs]) as running:
        running.body = body
        yield running


@pytest.fixture(scope="module")
def description(live):
    return live.server.app.openapi()


def test_no_request_makes_the_server_fail(live, description):
    job = live.job(live.body)
    schema = schemathesis.openapi.from_dict(description)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    tried = 0
    for operation in operations:
        if operation.path == "/v1/events":  # its answer has no end
            continue
        tried += _try(live, operation, job.id)
    assert tried > 10 * EXAMPLES / 2


def _try(live, operation, job: str) -> int:
    answered = 0

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.explicit, Phase.generate],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def attempt(case) -> None:
        nonlocal answered
        if "id" in (case.path_parameters or {}) and answered % 2:
            case.path_parameters["id"] = job  # a job that exists
        answer = case.call(base_url=live.url, headers=live.bearer)
        answered += 1
        assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.text}"
        if answer.status_code >= 400:
            assert answer.json()["error"]

    given(case=operation.as_strategy())(attempt)()
    return answered
