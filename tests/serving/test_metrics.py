"""Metrics add up to what clients were told; audits see what compression does."""

from itertools import pairwise

import pytest

from minicache_trt.serving.audit import divergence
from minicache_trt.serving.recording import Recording
from minicache_trt.serving.uncompressed import uncompressed_runner
from tests.runtime.fake_engine import Gate
from tests.serving.live import WAIT, Live, fake_llm
from tests.serving.test_lifecycle import LONG, Calls, in_background, settled

PROMPT = "def main(argv):\n    "


def test_metrics_add_up(serve):
    live = serve(fake_llm(max_batch_size=2))
    answers = [
        live.http.post(
            "/v1/completions", json={"prompt": [5] * length, "max_tokens": 20, "n": n, "seed": length}
        ).json()
        for length, n in ((150, 1), (150, 2), (10, 3))
    ]
    live.http.post("/v1/completions", json={"prompt": [999]})
    settled(live)
    usage = [answer["usage"] for answer in answers]
    generated = sum(item["completion_tokens"] for item in usage)
    reasons = [choice["finish_reason"] for answer in answers for choice in answer["choices"]]
    metrics = live.metrics()

    def value(name, **labels):
        return metrics[name, tuple(sorted(labels.items()))]

    for reason in ("stop", "length", "abort", "timeout", "error"):
        assert value("requests_finished_total", reason=reason) == reasons.count(reason)
    assert value("prompt_tokens_total") == 150 * 3 + 10 * 3
    assert value("generation_tokens_total") == value("request_generation_tokens_sum") == generated
    assert value("time_to_first_token_seconds_count") == value("e2e_request_latency_seconds_count") == 6
    assert value("inter_token_latency_seconds_count") == generated - 6
    assert value("request_queue_time_seconds_count") == 6
    waited, first = value("request_queue_time_seconds_sum"), value("time_to_first_token_seconds_sum")
    assert 0 <= waited < first <= value("e2e_request_latency_seconds_sum")
    spent = first + value("inter_token_latency_seconds_sum")
    assert spent == pytest.approx(value("e2e_request_latency_seconds_sum"), rel=0.05, abs=0.01)
    assert value("prefix_cache_hits_total") == 256 and value("prefix_cache_queries_total") >= 480
    assert value("demoted_blocks_total") > 0
    for tier in ("full", "compressed"):
        usage = getattr(live.llm.load, tier)
        states = {state: value("kv_cache_blocks", tier=tier, state=state) for state in ("used", "reusable", "free")}
        assert states["used"] == 0 and states["reusable"] == usage.reusable and sum(states.values()) == usage.total
        assert value("kv_cache_usage_ratio", tier=tier) == 0
    sizes, model = live.llm.cache_sizes, live.llm.engine.model
    assert value("kv_cache_bytes", tier="full") + value("kv_cache_bytes", tier="compressed") == sizes.num_bytes
    tokens = 64 * (sizes.full_blocks - 1 + sizes.compressed_blocks - 1)
    sixteen_bit = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    assert value("kv_cache_compression_ratio", of="allocated") == pytest.approx(tokens * sixteen_bit / sizes.num_bytes)
    whole = sixteen_bit * 64 / sizes.compressed_block_bytes
    assert value("kv_cache_compression_ratio", of="compressed_tier") == pytest.approx(whole)


def test_metrics_of_what_runs_and_waits(serve):
    live = serve(fake_llm(max_batch_size=1))
    gate, submit = Gate(live.llm.engine, 3), Calls(live.service, "submit")
    answers = [in_background(live.http.post, "/v1/completions", json={**LONG, "max_tokens": 5}) for _ in range(3)]
    assert gate.reached.wait(WAIT)
    submit.wait(3)
    live.llm._loop._changed.acquire()  # what was submitted is added between steps, so count it where it waits
    submitted = len(live.llm._loop._commands)
    live.llm._loop._changed.release()
    metrics = live.metrics()
    assert metrics["requests_running", ()] == 1 and metrics["requests_waiting", ()] + submitted == 2
    assert metrics["kv_cache_blocks", (("state", "used"), ("tier", "full"))] == 1
    gate.opened.set()
    assert all(answer().status_code == 200 for answer in answers)


@pytest.mark.parametrize("method", ["full", "kivi2"])
def test_audit(demo_llm, demo_engines, tmp_path, method):
    llm = demo_llm(method)
    uncompressed = uncompressed_runner(llm.engine, demo_engines[method], tmp_path, 1)
    live = Live(llm, audit_rate=0.5, uncompressed=uncompressed)
    body = {"prompt": PROMPT * 8, "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    for _ in range(2):
        assert live.http.post("/v1/completions", json=body).status_code == 200
    assert live.service.auditor.wait(WAIT)
    metrics = live.metrics()
    replayed = metrics["audit_requests_total", (("outcome", "replayed"),)]
    tokens = metrics["audit_kl_divergence_nats_count", ()]
    mean = metrics["audit_kl_divergence_nats_sum", ()] / tokens
    assert replayed == 1 and tokens == 60
    kl, agreement = live.service.recent.audit()
    assert kl == pytest.approx(mean) and agreement == metrics["audit_top1_agreements_total", ()] / tokens
    if method == "full":
        assert mean < 1e-8 and agreement == 1
    else:
        assert mean > 1e-4
        assert mean == pytest.approx(expected_divergence(demo_llm, PROMPT * 8), rel=1e-3)
    live.close()


def expected_divergence(demo_llm, prompt):
    """By PyTorch, from teacher forcing on both engines along what the compressed one says."""
    import torch

    from minicache_trt.runtime.request import SamplingParams

    engines = [demo_llm(method) for method in ("full", "kivi2")]
    params = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)
    output = engines[1].generate(prompt, params)[0]
    ids, length = output.prompt_token_ids, len(output.prompt_token_ids)
    rows = [
        torch.from_numpy(engine.score([ids + output.outputs[0].token_ids], [length], length - 1)[0])
        .double()
        .log_softmax(-1)
        for engine in engines
    ]
    audited = range(0, 120, 2)
    return sum(float((rows[0][j].exp() * (rows[0][j] - rows[1][j])).sum()) for j in audited) / len(audited)


def test_an_audit_waits_for_live_requests_and_ends_with_the_server(demo_llm, demo_engines, tmp_path):
    llm = demo_llm("full")
    uncompressed = uncompressed_runner(llm.engine, demo_engines["full"], tmp_path, 1)
    live = Live(llm, audit_rate=1.0, uncompressed=uncompressed)
    live.service.admission.acquire(1)  # a request that never ends
    for _ in range(20):
        assert live.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3}).status_code == 200
    metrics = live.metrics()
    assert metrics["audit_backlog", ()] + metrics["audit_requests_total", (("outcome", "dropped"),)] >= 19
    assert metrics["audit_backlog", ()] == 16 and metrics["audit_requests_total", (("outcome", "replayed"),)] == 0
    live.service.admission.release()
    assert live.service.auditor.wait(WAIT)
    outcomes = [
        live.metrics()["audit_requests_total", (("outcome", name),)] for name in ("replayed", "dropped", "failed")
    ]
    assert sum(outcomes) == 20 and outcomes[2] == 0 and outcomes[0] >= 16
    live.close()
    assert not live.service.auditor._thread.is_alive()


def test_recordings_are_spread_over_the_output():
    import numpy as np

    for count in (1, 8, 9, 100, 1000):
        recording = Recording(8)
        for position in range(count):
            recording.add(50 + position, np.full(3, position, np.float32))
        kept = list(recording.rows)
        strides = {b - a for a, b in pairwise(kept)}
        assert kept[0] == 50 and len(strides) <= 1 and min(count, 4) <= len(kept) <= 8
        assert kept[-1] + max(strides, default=1) >= 50 + count
        assert all((row == position - 50).all() for position, row in recording.rows.items())


def test_divergence_against_torch():
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = rng.normal(0, 5, (2, 40)).astype(np.float32)
        expected = torch.nn.functional.kl_div(
            torch.from_numpy(q).double().log_softmax(-1),
            torch.from_numpy(p).double().log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        assert divergence(p, q) == pytest.approx(float(expected), abs=1e-12)
    assert divergence(p, p) == 0
