import itertools

import pytest
import torch

from networks.diffusion import DATA_DEVIATION, HIGHEST_LEVEL, LOWEST_LEVEL, Diffusion, _Attention, drawing_levels


@pytest.mark.parametrize("side", [8, 12, 16, 28, 32, 36, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_have_the_asked_shape_and_scale(side: int, channels: int) -> None:
    diffusion = Diffusion(side=side, channels=channels, width=4, drawing_steps=2).eval()
    torch.nn.init.normal_(diffusion.network.conv_out.weight, std=100.0)
    latents_NL, images_NCHW = diffusion.sample(3, rng=torch.Generator().manual_seed(0))
    assert latents_NL.shape == (3, diffusion.latent_count) == (3, 0)
    assert images_NCHW.shape == (3, channels, side, side)
    assert images_NCHW.abs().max() == 1.0


@pytest.mark.parametrize("side", [4, 30, 132])
def test_side_that_cannot_be_halved_twice_or_is_out_of_range_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"got {side}"):
        Diffusion(side=side, channels=1, width=4, drawing_steps=2)


def test_levels_fall_from_the_highest_to_the_lowest() -> None:
    levels = drawing_levels(12)
    assert (levels[0], levels[-1]) == (pytest.approx(HIGHEST_LEVEL), pytest.approx(LOWEST_LEVEL))
    assert all(level > lower for level, lower in itertools.pairwise(levels))


def fresh(drawing_steps: int, mean: float = 0.0) -> Diffusion:
    """With the weights that it has before the first step: the exact denoiser of normal pixels, of a mean perhaps."""

    class Normal(Diffusion):
        def forward(self, noisy_NCHW: torch.Tensor, level_N: torch.Tensor) -> torch.Tensor:
            return mean + super().forward(noisy_NCHW - mean, level_N)

    return Normal(side=8, channels=1, width=4, drawing_steps=drawing_steps).eval()


def test_fresh_weights_expect_what_normal_pixels_of_the_assumed_deviation_ask_for() -> None:
    noisy_NCHW, level_N = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])
    expected_NCHW = noisy_NCHW * (DATA_DEVIATION**2 / (DATA_DEVIATION**2 + level_N.square()))[:, None, None, None]
    torch.testing.assert_close(fresh(2)(noisy_NCHW, level_N), expected_NCHW)


@torch.no_grad()
def test_an_exact_denoiser_draws_from_its_distribution_and_more_steps_come_nearer() -> None:
    """Of normal pixels the way from noise to picture is known: x falls as the root of variance + level squared."""

    def furthest(drawing_steps: int) -> float:
        _, images_NCHW = fresh(drawing_steps, mean=0.25).sample(500, rng=torch.Generator().manual_seed(1))
        noise_NCHW = HIGHEST_LEVEL * torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        whole = (DATA_DEVIATION**2 + HIGHEST_LEVEL**2) ** 0.5
        exact_NCHW = 0.25 + (noise_NCHW - 0.25) * DATA_DEVIATION / whole
        return float((images_NCHW - exact_NCHW.clamp(-1, 1)).abs().max())

    errors = [furthest(steps) for steps in (12, 24, 48)]
    assert errors[0] < 0.15 and errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_a_picture_takes_as_many_passes_as_it_says() -> None:
    levels: list[float] = []
    diffusion = fresh(5)
    diffusion.register_forward_pre_hook(lambda _, given: levels.append(float(given[1][0])))
    diffusion.sample(1, rng=torch.Generator().manual_seed(0))
    assert levels == pytest.approx(drawing_levels(5))


def test_noise_of_another_stream_is_another_picture_and_of_the_same_the_same() -> None:
    diffusion = fresh(3)
    first, again, other = (diffusion.sample(2, rng=torch.Generator().manual_seed(seed))[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_arguments_build_a_network_that_takes_the_same_weights() -> None:
    diffusion = Diffusion(side=12, channels=3, width=4, drawing_steps=2).eval()
    torch.nn.init.normal_(diffusion.network.conv_out.weight)
    twin = Diffusion(**diffusion.arguments).eval()
    noisy_NCHW, level_N = torch.randn(2, 3, 12, 12), torch.tensor([0.5, 2.0])
    assert not torch.equal(twin(noisy_NCHW, level_N), diffusion(noisy_NCHW, level_N))
    twin.load_state_dict(diffusion.state_dict())
    assert torch.equal(twin(noisy_NCHW, level_N), diffusion(noisy_NCHW, level_N))


def test_the_level_matters_to_the_network() -> None:
    diffusion = Diffusion(side=8, channels=1, width=8, drawing_steps=2).eval()
    for module in (diffusion.network.conv_out, diffusion.network.fine_up.conv2):
        torch.nn.init.normal_(module.weight)
    images_NCHW = torch.randn(1, 1, 8, 8)
    network = diffusion.network
    assert not torch.equal(network(images_NCHW, torch.tensor([0.1])), network(images_NCHW, torch.tensor([0.3])))


@pytest.mark.parametrize("side", [3, 16, 17])
def test_attention_is_the_published_one_for_few_places_and_for_many(side: int) -> None:
    torch.manual_seed(0)
    attention = _Attention(8)
    torch.nn.init.normal_(attention.answer.weight)
    x_NFHW = torch.randn(2, 8, side, side)
    expected_NFHW = torch.empty_like(x_NFHW)
    for picture in range(2):
        asked_3FP = attention.ask(attention.norm(x_NFHW[picture : picture + 1]))[0].view(3, 8, -1)
        heard = []
        for head in range(4):
            query_DP, key_DP, value_DP = asked_3FP[:, 2 * head : 2 * head + 2]
            heard.append(value_DP @ (query_DP.T @ key_DP / 2**0.5).softmax(dim=1).T)
        heard_FHW = torch.cat(heard).view(8, side, side)
        expected_NFHW[picture] = x_NFHW[picture] + attention.answer(heard_FHW[None])[0]
    torch.testing.assert_close(attention(x_NFHW), expected_NFHW)
