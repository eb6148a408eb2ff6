import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minicache_trt.runtime.sampler import NonFiniteLogits, sample
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.runtime.step_logits import StepLogits

# Few different numbers, so that there are ties.
LARGE = float(np.float32(3e38))
numbers = st.sampled_from([-LARGE, -2.5, -1.0, -0.0, 0.0, 1.0, 2.5, LARGE, np.nan, np.inf, -np.inf])


def alone(row):
    """What sampling this row by itself gives."""
    try:
        return sample(row, SamplingParams(temperature=0), [], np.random.default_rng(0))
    except NonFiniteLogits:
        return None


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 40)), elements=numbers))
def test_rows_together_are_rows_alone(values):
    assert StepLogits(values).greedy == [alone(row) for row in values]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_among_many(bad):
    values = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
    expected = [*map(int, values.argmax(axis=1))]
    values[1, 4000] = bad
    assert StepLogits(values).greedy == [expected[0], None, expected[2]]


def test_rows_of_an_item():
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    assert StepLogits(values).last_rows(5, 2).tolist() == [[6, 7], [8, 9]]
    assert StepLogits(values).last_rows(5, 0).shape == (0, 2)
