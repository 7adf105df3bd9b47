import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.egress import CopiesStopped, CopyGate, EgressDoor, PrivatePictureStopped
from protos import codec
from protos.mekd.v1.teacher_inference_pb2 import Batch

RNG = np.random.default_rng(0)
LOCAL = RNG.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
OTHERS = RNG.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)


def message(images_NCHW) -> Batch:
    return Batch(batch_id="a", images=codec.encode_images(images_NCHW))


def test_pictures_that_are_not_local_pass():
    door = EgressDoor(LOCAL)
    door.check(message(OTHERS))
    assert door.matches(message(OTHERS)) == 0


@given(places=st.sets(st.integers(0, 19), min_size=1))
def test_every_local_picture_among_others_is_counted_and_stops_the_batch(places):
    mixed = OTHERS.copy()
    for place in places:
        mixed[place] = LOCAL[place]
    door = EgressDoor(LOCAL)
    assert door.matches(message(mixed)) == len(places)
    with pytest.raises(PrivatePictureStopped, match=f"^{len(places)} of 20 "):
        door.check(message(mixed))


def test_one_changed_pixel_makes_another_picture():
    changed = LOCAL[:1].copy()
    changed[0, 0, 0, 0] ^= 1
    assert EgressDoor(LOCAL).matches(message(changed)) == 0


def test_a_view_with_other_strides_is_the_same_picture():
    turned = np.ascontiguousarray(LOCAL.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert EgressDoor(turned).matches(message(LOCAL)) == 20


def test_gate_drops_near_copies_and_their_mirror_images_and_nothing_else():
    noisy = np.clip(LOCAL.astype(np.int16) + RNG.integers(-3, 4, LOCAL.shape), 0, 255).astype(np.uint8)
    gate = CopyGate(torch.from_numpy(LOCAL), 5.0)
    assert EgressDoor(LOCAL).matches(message(noisy)) == 0, "no hash knows them"
    for copies in (LOCAL, noisy, noisy[..., ::-1].copy()):
        assert not gate.passing(torch.from_numpy(copies)).any()
    assert gate.passing(torch.from_numpy(OTHERS)).all()
    assert (gate.seen, gate.dropped) == (80, 60)


def test_gate_compares_without_rounding():
    at = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    gate = CopyGate(torch.full((1, 1, 8, 8), 103, dtype=torch.uint8), 3.0)
    assert gate.passing(at).all(), "at the threshold is not nearer"
    assert not gate.passing(at + 1).any()


@pytest.mark.parametrize(("dropped", "stops"), [(20, False), (21, True)])
def test_more_than_one_in_a_hundred_stops_the_run(dropped, stops):
    gate = CopyGate(torch.from_numpy(LOCAL), 12.34, seen=2000, dropped=dropped)
    if not stops:
        return gate.check()
    with pytest.raises(
        CopiesStopped, match=r"^21 of 2000 .*within 12\.3 grey levels.* expected 1% at most"
    ) as stopped:
        gate.check()
    assert stopped.value.exit_code == 2 and "\n" not in str(stopped.value)
