"""How much an account may ask for at a time: pure state behind an injected clock, owned by the event loop.

What is not limited leaves no trace here, and neither does an account that has been idle for as long as its allowance
takes to fill up: there are never more entries than a small multiple of the accounts that are active.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from protos.errors import Reason, Refusal
from teacher_service.terms import Terms

LONGEST_SPREAD_SECONDS = 60.0
SMALLEST_SWEEP = 64  # accounts
_UNLIMITED = nullcontext()


class _Account:
    def __init__(self, now: float) -> None:
        self.streams = 0
        self.outstanding_pictures = 0
        self.spent_pictures = 0.0  # of the allowance, as of `at`; falls with time
        self.at = now
        self.refused_until = 0.0  # the last moment that a refused batch was told to come again
        self.full_again_at = now


class Limits:
    """Rates, open streams and outstanding pictures of every account on this server, and its streams as a whole.

    Args:
        burst_pictures: an allowance holds one second's worth, or this many where that is more: the largest batch.
            No batch takes more than a full one.
        max_streams: open streams over all accounts.
        clock: seconds, monotonic.
    """

    def __init__(self, *, burst_pictures: int, max_streams: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst_pictures = burst_pictures
        self._max_streams = max_streams
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = SMALLEST_SWEEP
        self.streams = 0
        """Open now."""

    def batch(self, name: str, terms: Terms, picture_count: int) -> AbstractContextManager[None]:
        """The time that a batch is under way. Refusal: TOO_MANY_OUTSTANDING, RATE_LIMITED; those use nothing up."""
        if terms.max_outstanding_pictures is None and terms.pictures_per_second is None:
            return _UNLIMITED
        return self._limited_batch(name, terms, picture_count)

    @contextmanager
    def _limited_batch(self, name: str, terms: Terms, picture_count: int) -> Iterator[None]:
        account = self._account(name)
        most = terms.max_outstanding_pictures
        if most is not None and account.outstanding_pictures + picture_count > most:
            raise Refusal.of(
                Reason.TOO_MANY_OUTSTANDING,
                limit=most,
                requested=picture_count,
                outstanding=account.outstanding_pictures,
            )
        if terms.pictures_per_second is not None:
            self._spend(account, terms.pictures_per_second, picture_count)
        account.outstanding_pictures += picture_count
        try:
            yield
        finally:
            account.outstanding_pictures -= picture_count

    @contextmanager
    def stream(self, name: str, terms: Terms | None) -> Iterator[None]:
        """The time that a stream is open; without ``terms`` it takes no place of the account's.

        Refusal: TOO_MANY_STREAMS.
        """
        if self.streams >= self._max_streams:
            raise Refusal.of(Reason.TOO_MANY_STREAMS, whose="all accounts together", limit=self._max_streams)
        account = self._account(name)
        places = 0 if terms is None else 1
        if terms is not None and terms.max_streams is not None and account.streams >= terms.max_streams:
            raise Refusal.of(Reason.TOO_MANY_STREAMS, whose="the account", limit=terms.max_streams)
        self.streams += 1
        account.streams += places
        try:
            yield
        finally:
            self.streams -= 1
            account.streams -= places

    def _spend(self, account: _Account, rate: float, picture_count: int) -> None:
        """Takes from the allowance. Refusal RATE_LIMITED with the wait until it holds enough."""
        now = self._clock()
        full = max(rate, self._burst_pictures)
        # More than an allowance ever holds can only be a repeat of what a server with larger batches was paid for: a
        # full one lets it in.
        count = min(picture_count, full)
        spent = max(0.0, account.spent_pictures - rate * (now - account.at))
        lacking = spent + count - full
        if lacking > 1e-6:  # what rounding leaves must not cost a round trip
            # Batches refused together are told to come one after the other: of those that came at the same time all
            # but one would have travelled in vain.
            wait = lacking / rate
            if account.refused_until > now:
                spread = account.refused_until + count / rate - now
                wait = max(wait, min(spread, LONGEST_SPREAD_SECONDS))
            account.refused_until = now + wait
            raise Refusal.of(Reason.RATE_LIMITED, limit=f"{rate:g}", wait=f"{wait:.1f}").after(wait)
        account.spent_pictures, account.at = spent + count, now
        account.full_again_at = now + account.spent_pictures / rate

    def _account(self, name: str) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._forget_the_idle()
            account = self._accounts[name] = _Account(self._clock())
        return account

    def _forget_the_idle(self) -> None:
        now = self._clock()
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.streams or account.outstanding_pictures or account.full_again_at > now
        }
        self._sweep_at = max(SMALLEST_SWEEP, 2 * len(self._accounts))
