import torch

from edge_agent.pixels import normalise, quantise

BYTES = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16)


def test_bytes_survive_the_way_there_and_back() -> None:
    assert quantise(normalise(BYTES)).equal(BYTES)
    assert quantise(normalise(BYTES)).dtype == torch.uint8


def test_scale_runs_from_minus_one_to_one() -> None:
    torch.testing.assert_close(normalise(BYTES), (BYTES.float() / 255 - 0.5) / 0.5)
    assert normalise(BYTES).min().item() == -1.0
    assert normalise(BYTES).max().item() == 1.0


def test_values_between_bytes_go_to_the_nearest_and_outside_to_the_end() -> None:
    values = torch.tensor([-7.0, -1.0, 0.6 / 127.5 - 1.0, 0.4 / 127.5 - 1.0, 1.0, 7.0])
    assert quantise(values).tolist() == [0, 0, 1, 0, 255, 255]
