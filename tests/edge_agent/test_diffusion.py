import torch

from edge_agent.config import DeprivatizeConfig
from edge_agent.diffusion import train_diffusion
from edge_agent.pixels import quantise
from tests.edge_agent.phase_parts import Keep, silent


def test_it_draws_both_kinds_of_pictures_and_none_between() -> None:
    shades_N = torch.tensor([30, 220], dtype=torch.uint8).repeat(32)
    learnt = train_diffusion(
        shades_N.view(-1, 1, 1, 1).repeat(1, 1, 8, 8),
        config=DeprivatizeConfig(
            generator="diffusion",
            steps=200,
            batch_count=32,
            generator_width=8,
            generator_learning_rate=1e-2,
            ema_decay=0.9999,  # as long as this, yet it is to forget the untrained weights
        ),
        seed=0,
        device=torch.device("cpu"),
        checkpoint=Keep(),
        progress=silent,
    )
    _, images_NCHW = learnt.sample(100, rng=torch.Generator().manual_seed(0))
    drawn_N = quantise(images_NCHW).float().mean((1, 2, 3))
    dark_N, bright_N = (drawn_N - 30).abs() < 30, (drawn_N - 220).abs() < 30
    assert min(int(dark_N.sum()), int(bright_N.sum())) > 20
    assert int((dark_N | bright_N).sum()) > 90
