"""Limits per minute: what may be used, what is left, and what a caller is told of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api.accounts import Account, Bucket, RateLimitedError, Sharers, Terms, format_duration


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def account(clock: Clock, num_sharers: int = 1, **limits: int) -> Account:
    terms = Terms(limits.get("requests_per_minute"), limits.get("tokens_per_minute"))
    return Account("alice", terms, Sharers(num_sharers), clock)


STEPS = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 300)), max_size=60)


@given(st.integers(1, 200), STEPS)
def test_whoever_waits_as_told_is_let_in_and_never_uses_more_than_the_limit_for_long(limit: int, steps):
    bucket, now_s, used = Bucket(limit, 0.0), 0.0, 0
    largest = max((amount for _, amount in steps), default=0)
    for pause_s, amount in steps:
        now_s += pause_s
        missing_s = bucket.missing_s(amount, now_s)
        if missing_s > 0:
            assert bucket.level(now_s) < min(amount, limit)
            now_s += missing_s + 1e-6
            assert bucket.missing_s(amount, now_s) == 0
        bucket.take(amount, now_s)
        used += amount
        # A minute's worth at first, what came since, and the debt that one large request may make.
        assert used <= limit + limit * now_s / 60 + largest + 1e-6
        assert bucket.level(now_s) <= limit


def test_requests_are_refused_when_a_minutes_worth_is_used_and_let_in_as_it_comes_back() -> None:
    clock = Clock()
    alice = account(clock, requests_per_minute=2)
    alice.take_request()
    alice.take_request()
    with pytest.raises(RateLimitedError) as refused:
        alice.take_request()
    assert (refused.value.unit, refused.value.retry_after_s) == ("requests", 30)
    assert "'alice' may use 2 requests per minute; 0 are left and 1 were asked for" in str(refused.value)
    clock.now_s += 30
    alice.take_request()


def test_a_refused_request_does_not_count() -> None:
    clock = Clock()
    alice = account(clock, requests_per_minute=1)
    alice.take_request()
    for _ in range(100):
        with pytest.raises(RateLimitedError):
            alice.take_request()
    clock.now_s += 60
    alice.take_request()


def test_generated_tokens_may_make_a_debt_that_is_waited_for() -> None:
    clock = Clock()
    alice = account(clock, tokens_per_minute=60)
    alice.check_tokens(50)
    alice.take_tokens(50)
    alice.take_tokens(100)
    with pytest.raises(RateLimitedError) as refused:
        alice.check_tokens(1)
    assert refused.value.retry_after_s == pytest.approx(91)
    assert alice.headers()["x-ratelimit-remaining-tokens"] == "0"


def test_a_prompt_that_is_longer_than_the_limit_is_let_in_when_nothing_was_used() -> None:
    alice = account(Clock(), tokens_per_minute=60)
    alice.check_tokens(1000)
    alice.take_tokens(1)
    with pytest.raises(RateLimitedError):
        alice.check_tokens(1000)


def test_the_headers_are_openais_and_only_for_limits_that_there_are() -> None:
    clock = Clock()
    alice = account(clock, requests_per_minute=10, tokens_per_minute=600)
    alice.take_request()
    alice.take_tokens(61)
    assert alice.headers() == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "6s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "539",
        "x-ratelimit-reset-tokens": "6.1s",
    }
    assert account(clock).headers() == {}


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
def test_replicas_that_share_a_limit_let_in_no_more_than_it_together(num_replicas: int) -> None:
    clock = Clock()
    replicas = [account(clock, num_replicas, requests_per_minute=10) for _ in range(num_replicas)]
    num_let_in = 0
    for _ in range(100):
        for replica in replicas:
            try:
                replica.take_request()
            except RateLimitedError:
                continue
            num_let_in += 1
    assert num_let_in == 10


def test_other_terms_keep_what_was_used() -> None:
    clock = Clock()
    alice = account(clock, requests_per_minute=10, tokens_per_minute=100)
    for _ in range(4):
        alice.take_request()
    alice.change(Terms(requests_per_minute=20))
    assert alice.headers()["x-ratelimit-remaining-requests"] == "16"
    assert "x-ratelimit-limit-tokens" not in alice.headers()
    alice.change(Terms(requests_per_minute=2))
    with pytest.raises(RateLimitedError):
        alice.take_request()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (61.5, "1m1.5s"),
    ],
)
def test_durations_look_like_openais(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
