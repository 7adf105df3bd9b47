"""Counters in Triton's words: what adds up, and what stays bounded."""

from teacher_service.batcher import EngineCall
from teacher_service.statistics import Parts, Statistics


def parts(*, decode: float = 0.0, wait: float = 0.0, output: float = 0.0) -> Parts:
    found = Parts()
    found.input, found.wait, found.output = decode, wait, output
    return found


def test_what_a_batch_took_is_split_without_rest() -> None:
    statistics = Statistics(max_accounts=1)
    statistics.engine_seconds = 0.25
    statistics.batch_done("a", "charged", 8, 1.0, parts(decode=0.125, wait=0.5, output=0.0625))
    for found in (statistics.account("a"), statistics.total):
        split = (found.compute_input, found.queue, found.compute_infer, found.compute_output, found.cache_miss)
        assert [part.ns for part in split] == [125_000_000, 250_000_000, 250_000_000, 62_500_000, 312_500_000]
        assert {part.count for part in split} == {1} and found.success.ns == 1_000_000_000


def test_an_engine_call_of_others_is_never_counted_as_more_than_the_wait() -> None:
    statistics = Statistics(max_accounts=1)
    statistics.engine_seconds = 9.0
    statistics.batch_done("a", "charged", 8, 1.0, parts(wait=0.5))
    assert (statistics.total.queue.ns, statistics.total.compute_infer.ns) == (0, 500_000_000)


def test_the_server_counts_engine_calls_and_an_account_its_own_batches() -> None:
    statistics = Statistics(max_accounts=2)
    statistics.engine_call(EngineCall(5, 0.5, (0.25, 0.125)))
    for name, count in (("a", 3), ("b", 2)):
        statistics.batch_done(name, "charged", count, 1.0, parts(wait=1.0))
    assert statistics.total.execution_count == 1 and list(statistics.total.batches) == [5]
    assert [statistics.account(name).execution_count for name in "ab"] == [1, 1]
    assert [list(statistics.account(name).batches) for name in "ab"] == [[3], [2]]
    assert statistics.total.inference_count == 5


def test_accounts_are_bounded_and_the_longest_idle_is_forgotten() -> None:
    statistics = Statistics(max_accounts=2)
    for name in ("a", "b", "a", "c"):
        statistics.batch_done(name, "replayed", 1, 0.5, parts())
    assert [statistics.account(name).inference_count for name in "abc"] == [2, 0, 1]
    assert statistics.total.inference_count == 4 and statistics.total.cache_hit.count == 4
    statistics.account("unknown").success.add(1.0)  # what is told of nobody is kept by nobody
    assert statistics.account("unknown").success.count == 0


def test_what_was_not_answered_is_a_failure_and_nothing_else() -> None:
    statistics = Statistics(max_accounts=1)
    statistics.batch_done("a", "budget_exhausted", 2**40, 0.5, parts(wait=0.25))
    found = statistics.total
    assert (found.fail.count, found.success.count, found.inference_count, found.last_inference_ms) == (1, 0, 0, 0)
    assert found.queue.count == 0 and found.batches == {}
