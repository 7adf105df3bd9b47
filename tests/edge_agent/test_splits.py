import hashlib
from collections import Counter

import numpy as np
import pytest

from edge_agent.splits import digits_part, training_part


def test_digits_parts_are_the_published_ones() -> None:
    parts = [digits_part(i) for i in range(1797)]
    assert Counter(parts) == {"cloud": 894, "test": 459, "device": 444}
    assert hashlib.sha256(b"digits/0").digest()[0] == 42 and parts[0] == "cloud"  # 42 mod 4 = 2
    names = {0: "test", 1: "device", 2: "cloud", 3: "cloud"}
    assert parts == [names[hashlib.sha256(b"digits/%d" % i).digest()[0] % 4] for i in range(1797)]


@pytest.mark.parametrize(("dataset", "count"), [("mnist", 60_000), ("cifar10", 50_000)])
def test_training_parts_divide_the_pictures(dataset: str, count: int) -> None:
    parts = [training_part(dataset, part) for part in ("device", "development", "cloud")]  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [10_000, 5_000, count - 15_000]
    assert np.array_equal(np.concatenate(parts), np.random.default_rng(0).permutation(count))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


def test_training_parts_are_frozen() -> None:
    assert training_part("mnist", "device")[:3].tolist() == [4013, 23840, 29603]
    assert training_part("cifar10", "device")[:3].tolist() == [25461, 5892, 10377]


def test_other_data_sets_and_the_test_part_are_refused() -> None:
    with pytest.raises(ValueError, match="cloud of svhn"):
        training_part("svhn", "cloud")
    with pytest.raises(ValueError, match="test of mnist"):
        training_part("mnist", "test")
