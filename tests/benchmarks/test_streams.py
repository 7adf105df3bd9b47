"""Streams: the same pictures in another order, and severities that come and go."""

import numpy as np
import torch

from benchmarks.datasets import Labelled
from benchmarks.streams import by_class, returning, shuffled


def pictures(count: int = 60) -> Labelled:
    rng = np.random.default_rng(0)
    return Labelled(rng.integers(0, 256, (count, 1, 32, 32), np.uint8), rng.integers(0, 4, count))


def test_unshifted_stream_is_the_pictures_themselves_each_with_its_class() -> None:
    shown = pictures()
    stream = shuffled(shown, count=60)
    order_N = np.random.default_rng(0).permutation(60)
    assert stream.labels_N.tolist() == shown.labels_N[order_N].tolist() != shown.labels_N.tolist()
    assert np.array_equal(stream.images_NCHW.numpy(), shown.images_NCHW[order_N])
    assert stream.severities_N.tolist() == [0] * 60


def test_stream_is_the_same_for_the_same_seed_and_its_beginning_that_of_a_longer_one() -> None:
    first, again = (shuffled(pictures(), "gaussian_noise", 3, count=40) for _ in range(2))
    assert torch.equal(first.images_NCHW, again.images_NCHW) and first.severities_N.tolist() == [3] * 40
    assert shuffled(pictures(), count=10).labels_N.tolist() == first.labels_N[:10].tolist()
    other = shuffled(pictures(), "gaussian_noise", 3, count=40, seed=1)
    assert other.labels_N.tolist() != first.labels_N.tolist()


def test_stream_by_class_has_the_same_pictures_one_class_after_the_other() -> None:
    stream = shuffled(pictures(), "occlusion", 5, count=60)
    ordered = by_class(stream)
    assert ordered.labels_N.tolist() == sorted(stream.labels_N.tolist())
    for k in range(4):
        assert torch.equal(ordered.images_NCHW[ordered.labels_N == k], stream.images_NCHW[stream.labels_N == k])


def test_returning_stream_begins_and_ends_unshifted_and_is_worst_in_the_middle() -> None:
    stream, plain = returning(pictures(), "brightness", count=55), shuffled(pictures(), count=55)
    steps = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0]
    assert stream.severities_N.tolist() == [severity for severity in steps for _ in range(5)]
    assert torch.equal(stream.labels_N, plain.labels_N)
    same_N = (stream.images_NCHW == plain.images_NCHW).flatten(1).all(dim=1)
    assert torch.equal(same_N, stream.severities_N == 0)
    brighter_N = (stream.images_NCHW.float() - plain.images_NCHW.float()).mean(dim=(1, 2, 3))
    means = [brighter_N[stream.severities_N == severity].mean().item() for severity in range(6)]
    assert means == sorted(means)


def test_returning_stream_of_any_length_has_every_severity_up_and_down() -> None:
    for count in (11, 53, 60):
        severities = returning(pictures(), "contrast", count=count).severities_N.tolist()
        assert len(severities) == count and sorted(set(severities)) == list(range(6))
        assert severities[0] == severities[-1] == 0
