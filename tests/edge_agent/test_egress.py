import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.egress import EgressDoor, PrivatePictureStopped
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
