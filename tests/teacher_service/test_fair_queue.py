from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from teacher_service.fair_queue import FairQueue


def filled(**sizes: list[int]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for owner, items in sizes.items():
        for index, size in enumerate(items):
            queue.put(owner, f"{owner}{index}", size)
    return queue


def test_owners_take_turns_by_size() -> None:
    queue = filled(a=[4, 4, 4], b=[1] * 8)
    assert queue.size == 20
    taken = queue.take(100)
    assert taken == ["a0", "b0", "b1", "b2", "b3", "a1", "b4", "b5", "b6", "b7", "a2"]
    assert not queue and queue.size == 0 and queue.take(5) == []


def test_what_does_not_fit_lets_others_pass_and_goes_first_the_next_time() -> None:
    queue = filled(a=[3, 3], b=[2], c=[1])
    assert queue.take(4) == ["a0", "c0"]
    assert queue.take(4) == ["b0"]  # nobody's turn is lost to it
    assert queue.take(4) == ["a1"]


def test_an_item_larger_than_the_rest_allows_comes_alone() -> None:
    queue = filled(a=[9], b=[1])
    assert queue.take(4) == ["a0"]
    assert queue.take(4) == ["b0"]


def test_idling_saves_up_nothing_and_leaving_forgives_nothing() -> None:
    queue = filled(busy=[1] * 100, big=[50])
    assert len(queue.take(60)) == 11
    queue.put("big", "again", 1)  # still ahead of the other by 40
    queue.put("new", "n0", 1)
    queue.put("new", "n1", 1)
    taken = queue.take(20)
    assert "again" not in taken
    assert taken.index("n0") <= 1 and taken.index("n1") <= 3  # in turn with the busy one, not before it


def test_clocks_of_those_who_left_are_forgotten_in_time() -> None:
    queue = filled()
    for index in range(1000):
        queue.put(f"owner-{index}", "x", 3)
        assert queue.take(8) == ["x"]
    queue.put("late", "x", 1)
    assert queue.take(8) == ["x"]
    assert not queue._ahead


def test_what_is_removed_is_gone_and_its_owner_keeps_its_turn() -> None:
    queue = filled(a=[1, 1, 1], b=[1])
    assert queue.remove(lambda item: item in ("a1", "b0")) == ["a1", "b0"]
    assert queue.size == 2
    queue.put("b", "b1", 1)
    assert sorted(queue.take(9)) == ["a0", "a2", "b1"]


def test_who_was_passed_over_goes_first_though_others_have_been_given_less() -> None:
    queue: FairQueue[str] = FairQueue()
    for item, size in (("a1", 1), ("a2", 4)):
        queue.put("a", item, size)
    for owner in "bc":
        for n in range(9):
            queue.put(owner, f"{owner}{n}", 2)
    assert queue.take(6) == ["a1", "b0", "c0"]  # a's next one, of 4, does not fit, though a has been given the least
    queue.put("d", "d0", 1)
    assert queue.take(6)[0] == "a2"


@given(st.data())
def test_everything_comes_once_in_its_owners_order_and_owners_who_wait_are_served_alike(data: st.DataObject) -> None:
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    put: dict[str, int] = defaultdict(int)
    got: dict[str, list[int]] = defaultdict(list)
    served = {"a": 0, "b": 0}  # both are kept waiting all the time
    most = data.draw(st.integers(4, 12))

    def add(owner: str) -> None:
        size = data.draw(st.integers(1, 4))
        queue.put(owner, (owner, put[owner], size), size)
        put[owner] += 1

    for _ in range(data.draw(st.integers(1, 30))):
        for owner in "ab":
            while put[owner] - len(got[owner]) < 13:
                add(owner)
        for owner in data.draw(st.lists(st.sampled_from("cde"), max_size=4)):
            add(owner)
        batch = queue.take(most)
        assert 0 < sum(size for _, _, size in batch) <= most
        for owner, index, size in batch:
            got[owner].append(index)
            if owner in served:
                served[owner] += size
        # One item each, and what one was given while the other's item did not fit into the rest of a batch: once, and
        # once more for every other owner whose item came before it in the next one.
        assert abs(served["a"] - served["b"]) <= 4 + 4 + 3 * len("cde")
    while queue:
        for owner, index, _ in queue.take(most):
            got[owner].append(index)
    assert all(indices == list(range(put[owner])) for owner, indices in got.items())
