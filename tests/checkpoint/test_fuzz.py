"""A short run of the fuzzer in fuzz.py, with hypothesis choosing the damage."""

import logging
import random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from checkpoint import fuzz


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    logging.disable(logging.WARNING)
    yield fuzz.Target(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.NOTSET)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False))
def test_opening_damaged_folders(target, rng):
    target.attempt(rng, deep=0.0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False))
def test_loading_damaged_folders(target, rng):
    target.attempt(rng, deep=1.0)


def test_the_fuzzer_sees_both_outcomes(target, seed):
    before = target.outcomes.copy()
    for i in range(100):
        target.attempt(random.Random(seed + i), deep=0.0)
    found = target.outcomes - before
    assert found["refused"] > 20 and found["read"] > 5
