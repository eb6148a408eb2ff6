"""Requests made from the server's own schema: whatever they say, the server answers and does not fail."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.serving.live import Live, fake_llm
from tests.serving.test_lifecycle import settled

EXAMPLES, MANY = 8, 1000


@pytest.fixture(scope="module")
def live():
    server = Live(fake_llm(max_seq_len=200, max_batch_size=4))
    yield server
    server.close()


@pytest.fixture
def api(live):
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def run(api, live, examples):
    tested = 0
    for result in api.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            if isinstance(case.body, dict):
                for field in ("max_tokens", "max_completion_tokens"):
                    if isinstance(case.body.get(field), int):
                        case.body[field] %= 30
            response = case.call(timeout=60)
            assert response.status_code < 500, (case.body, response.text)
            if "application/json" in str(response.headers.get("content-type")):
                json.loads(response.text)

        check()
        tested += 1
    assert tested >= 10
    settled(live)


def test_no_request_makes_the_server_fail(api, live):
    run(api, live, EXAMPLES)


@pytest.mark.long
def test_no_request_makes_the_server_fail_in_many(api, live):
    run(api, live, MANY)
