"""Random schedules against a model: requests arrive, share prefixes, stop, are cancelled, expire and fail.

The model knows nothing of blocks. It says which tokens a request may have (those of the fake engine's formula), why it
ended, who may run before whom, and which prefixes somebody has computed before. ``MINICACHE_SCHEDULES=10000`` runs
more of them.
"""

import dataclasses
import os

import numpy as np
from fake_engine import VOCAB, FakeEngine, expected_logits, small_build
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_llm import smallest_budget

from minicache_trt.config import KvCacheConfig
from minicache_trt.runtime.generation import Generation
from minicache_trt.runtime.request import RequestOptions, SamplingParams
from minicache_trt.runtime.runner import Runner

SCHEDULES = int(os.environ.get("MINICACHE_SCHEDULES", "200"))


class Plan:
    """What happens when: a random schedule of one seed."""

    def __init__(self, seed):
        self.random = random = np.random.default_rng(seed)
        batch = int(random.integers(1, 6))
        self.build = small_build(
            max_batch_size=batch,
            max_num_tokens=int(random.integers(batch, 300)),
            window=int(random.choice([1, 64, 100])),
            quantum=int(random.choice([64, 128, 256])),
            max_seq_len=int(random.choice([200, 330, 400])),
        )
        self.engine = FakeEngine(self.build, str(random.choice(["minicache", "full"])))
        self.scarcity = float(random.choice([1, 1, 1.3, 2, 0]))
        self.reuse = bool(random.random() < 0.9)
        self.failures = float(random.choice([0, 0, 0.05]))
        self.cancels = float(random.choice([0, 0.01, 0.05]))
        self.documents = [random.integers(0, VOCAB, self.build.max_seq_len).tolist() for _ in range(2)]
        count = int(random.integers(1, 14))
        self.arrivals = sorted(int(random.integers(0, random.choice([1, 1, 60, 500]))) for _ in range(count))

    def runner(self, clock):
        budget = int(smallest_budget(self.engine) * self.scarcity) or None
        return Runner(self.engine, KvCacheConfig(budget, enable_block_reuse=self.reuse), clock)

    def prompt(self, finished):
        """A new text, a document's beginning with a new end, a finished request's tokens and more, or its blocks."""
        random, most = self.random, self.build.max_seq_len
        kind = random.choice(["new", "document", "document", "turn", "turn", "again"])
        shared = []
        if kind == "document":
            shared = self.documents[random.integers(2)][: int(random.integers(1, most))]
        elif kind != "new" and finished:
            shared = finished[random.integers(len(finished))].sequence.token_ids
            if kind == "again" and len(shared) >= 64:
                return shared[: min(len(shared), most) // 64 * 64]
        new = random.integers(0, VOCAB, random.integers(1, random.choice([8, 150]))).tolist()
        return (shared + new)[: most - 1]

    def request(self, index, now, finished):
        random = self.random
        options = RequestOptions(
            priority=int(random.choice([0, 0, 1, -1])),
            cache_salt=random.choice([None, None, "a"]),
            deadline=now + int(random.integers(1, 80)) if random.random() < 0.2 else None,
            reuse=bool(random.random() < 0.9),
        )
        stops = random.integers(0, VOCAB, 2).tolist() if random.random() < 0.3 else None
        params = SamplingParams(max_tokens=int(random.integers(1, 200)), temperature=0, stop_token_ids=stops)
        prompt = self.prompt(finished)
        return Generation(str(index), None, prompt, params, self.build.max_seq_len, (), None, options), params


def common(first, second):
    """Length of the common beginning of two lists."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(np.array(first[:length]) != np.array(second[:length]))
    return int(differs[0]) if len(differs) else length


class Model:
    """What is true of every request, whatever the schedule."""

    def __init__(self, plan):
        self.plan = plan
        self.params = {}
        self.cancelled = set()
        self.failed = set()
        self.submitted = []

    def submit(self, job, params):
        self.submitted.append(job)
        self.params[job] = params

    def check_hits(self, job):
        """Nothing is found that no request of the same salt has had, the last token never."""
        sequence, options = job.sequence, job.sequence.options
        found = sequence.num_cached_tokens or 0
        assert found % 64 == 0
        if not found:
            return
        assert options.reuse and self.plan.reuse and found < sequence.num_tokens
        peers = [
            other.sequence.token_ids
            for other in self.submitted
            if other is not job
            and other.sequence.options.reuse
            and other.sequence.options.cache_salt == options.cache_salt
        ]
        assert max(common(sequence.token_ids, peer) for peer in peers) >= found

    def check_end(self, job, now):
        sequence, params = job.sequence, self.params[job]
        output, deadline = sequence.output_token_ids, sequence.options.deadline
        logits = expected_logits(
            sequence.token_ids, sequence.prompt_len, self.plan.build, self.plan.engine.plan.compresses
        )
        assert output == logits.argmax(-1)[sequence.prompt_len - 1 : -1].tolist()
        stops = [token in (params.stop_token_ids or []) for token in output]
        limit = min(params.max_tokens, self.plan.build.max_seq_len - sequence.prompt_len)
        assert not any(stops[:-1]) and len(output) <= limit
        reason = "stop" if stops and stops[-1] else "length" if len(output) == limit else None
        if reason is None:
            assert job.finish_reason in {"abort", "timeout", "error"}
            assert (job.finish_reason == "abort") == (job in self.cancelled)
            assert (job.finish_reason == "error") == (job in self.failed)
            assert job.finish_reason != "timeout" or deadline <= now
        else:
            assert job.finish_reason == reason
        completion = job.output().outputs[0]
        assert (completion.token_ids, completion.finish_reason) == (output, job.finish_reason)


def check_order(scheduler, before, first):
    """Rank decides who is admitted, who gives way and who always advances."""
    for group in (scheduler.running, scheduler.waiting):
        assert [s.rank for s in group] == sorted(s.rank for s in group)
    was_running, was_waiting = before
    still = [s for s in scheduler.waiting if s in was_waiting]
    admitted = [s for s in scheduler.running if s not in was_running]
    assert not still or all(s.rank < still[0].rank for s in admitted), "somebody overtook the first of those waiting"
    preempted = [s for s in scheduler.waiting if s in was_running]
    kept = [s for s in scheduler.running if s in was_running]
    assert not preempted or all(s.rank < preempted[0].rank for s in kept), "not the last was preempted"
    if first is not None:
        sequence, computed = first
        assert sequence not in preempted and sequence.num_computed > computed, "the first did not advance"


class Broken(Exception):
    pass


def run_step(plan, runner, model, now):
    """One step, possibly one that raises; returns the jobs that ended in it."""
    scheduler = runner.scheduler
    due = {job for job in model.submitted if not job.finished and (job.sequence.options.deadline or now + 1) <= now}
    survivors = [s for s in scheduler.running if s not in {job.sequence for job in due}]
    first = (survivors[0], survivors[0].num_computed) if survivors and not due else None
    before = set(scheduler.running), set(scheduler.waiting)
    fails = plan.random.random() < plan.failures
    operation = plan.random.choice(["decode", "compress"])
    if fails:
        setattr(plan.engine, operation, broken)
    try:
        updates = runner.step()
    except Broken:
        model.failed |= {job for job in model.submitted if job.sequence in set(scheduler.running)}
        updates = runner.fail_running("broken")
        assert not scheduler.running and {update.job for update in updates} == model.failed & {u.job for u in updates}
    else:
        ended = {update.job.sequence for update in updates if update.finished}
        if first and first[0] in ended:
            first = None
        check_order(scheduler, before, first)
    finally:
        plan.engine.__dict__.pop(operation, None)
    ended = [update.job for update in updates if update.finished]
    assert all(job.finished for job in due), "a deadline passed unnoticed"
    return ended


def broken(*_):
    raise Broken


def simulate(seed):
    plan = Plan(seed)
    now = 0
    runner = plan.runner(lambda: now)
    runner.claim()
    model, finished, limit = Model(plan), [], 0
    while plan.arrivals or runner.has_work:
        while plan.arrivals and (plan.arrivals[0] <= now or not runner.has_work):
            plan.arrivals.pop(0)
            job, params = plan.request(len(model.submitted), now, finished)
            model.submit(job, params)
            runner.add(job)
            limit += job.sequence.max_len + 1
        live = [job for job in model.submitted if not job.finished]
        ended = []
        if live and plan.random.random() < plan.cancels:
            victim = live[plan.random.integers(len(live))]
            model.cancelled.add(victim)
            assert runner.cancel(victim).finished and runner.cancel(victim) is None
            ended.append(victim)
        if runner.has_work:
            ended += run_step(plan, runner, model, now)
        runner.check_integrity()
        for job in ended:
            model.check_end(job, now)
            finished.append(job)
        for job in live:
            model.check_hits(job)
        now += 1
        assert now <= limit + 100, "no progress"
    assert sorted(map(id, finished)) == sorted(map(id, model.submitted)), "every request ends, once"
    check_idle(runner)
    return runner.statistics


def check_idle(runner):
    runner.check_integrity()
    for pool in (runner.cache.full_pool, runner.cache.compressed_pool):
        assert pool.num_used == 0
        pool.forget_all()
        pool.check_integrity()
        assert pool.num_evictable == 0 and pool.num_free == pool.num_blocks - 1


@settings(max_examples=SCHEDULES, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_schedule_obeys_the_model(seed):
    statistics = simulate(seed)
    for name in ("hit_tokens", "preemptions", "demotions", "evictions"):
        event(f"{name}: {getattr(statistics, name) > 0}")


def test_the_schedules_reach_everything():
    """What the property above is about does happen."""
    totals = {}
    for seed in range(25):
        for name, value in dataclasses.asdict(simulate(seed)).items():
            totals[name] = totals.get(name, 0) + value
    assert all(totals[name] > 0 for name in ("hit_tokens", "preemptions", "demotions", "evictions"))
