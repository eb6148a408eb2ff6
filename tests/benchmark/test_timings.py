"""Steps recovered from tokens, rates, ratios and the order of contenders."""

from __future__ import annotations

import pytest

from minicache_trt.benchmark.timings import Ratio, Timings, alternate


def test_one_sequence() -> None:
    timings = Timings.from_events(10.0, [("a", 11.0), ("a", 11.5), ("a", 12.25)], 1)
    assert timings.first_tokens == (1.0,) and timings.steps == (0.5, 0.75)
    assert timings.prefill_rate(context=20) == 20.0
    assert timings.decode_rate == pytest.approx(2 / 1.25)


def test_steps_that_prefill_others_are_not_decode_steps() -> None:
    """b is prefilled while a already decodes, and goes on when a has ended."""
    events = [("a", 2.0), ("a", 4.0), ("b", 4.125), ("a", 5.0), ("b", 5.125), ("b", 5.5), ("a", 5.625), ("b", 7.0)]
    timings = Timings.from_events(1.0, events, 2)
    assert timings.first_tokens == (1.0, 3.125)
    assert timings.steps == (1.0, 0.5)
    assert timings.time_to_first_token == pytest.approx((1.0 + 3.125) / 2)
    assert timings.prefill_rate(context=50) == pytest.approx(100 / 3.125)
    assert timings.decode_rate == pytest.approx(4 / 1.5)


def test_sequences_that_never_decode_together() -> None:
    assert Timings.from_events(0.0, [("a", 1.0), ("a", 2.0), ("b", 3.0), ("b", 4.0)], 2).steps == ()


def test_stamps() -> None:
    timings = Timings.from_stamps(1.0, [3.0, 3.5, 4.5], 4)
    assert timings.first_tokens == (2.0,) * 4 and timings.steps == (0.5, 1.0)
    assert timings.decode_rate == pytest.approx(8 / 1.5)


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    seen: list[tuple[int, int]] = []

    def contender(name: str) -> int:
        calls.append(name)
        return len(calls)

    samples = alternate(
        {"a": lambda: contender("a"), "b": lambda: contender("b")},
        3,
        lambda done, samples: seen.append((done, len(samples["b"]))),
    )
    assert calls == ["a", "b"] * 3
    assert samples == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_ratio_is_taken_within_a_round() -> None:
    ratio = Ratio.of([2.0, 9.0, 8.0], [1.0, 3.0, 8.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00-3.00)"
