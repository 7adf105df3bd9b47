import pytest
import torch
from torch import Tensor, nn

from networks.autoencoder import Decoder, Encoder, PatchDiscriminator, latent_side
from networks.mixes import Mixes, arrange, deal, mosaic, noisy

SIDES = {8: 2, 12: 3, 16: 4, 28: 7, 32: 8, 36: 9, 64: 8, 128: 8}


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_small_and_pictures_come_back_in_shape_and_scale(side: int, channels: int) -> None:
    shape = {"side": side, "channels": channels, "width": 4, "latent_channels": 5}
    images_NCHW = 2.0 * torch.rand(3, channels, side, side) - 1.0
    latents_NZhw = Encoder(**shape)(images_NCHW)
    assert latent_side(side) == SIDES[side]
    assert latents_NZhw.shape == (3, 5, SIDES[side], SIDES[side])
    back_NCHW = Decoder(**shape)(100.0 * latents_NZhw)
    assert back_NCHW.shape == images_NCHW.shape and back_NCHW.abs().max() <= 1.0
    scores_NX, features = PatchDiscriminator(side=side, channels=channels, width=4)(images_NCHW)
    assert scores_NX.shape == (3, SIDES[side] ** 2)
    assert features[0].shape[2] == side // 2 and features[-1].shape[2] == SIDES[side]


@pytest.mark.parametrize("side", [4, 30, 132])
@pytest.mark.parametrize("network", [Encoder, Decoder])
def test_side_that_cannot_be_halved_twice_or_is_out_of_range_is_refused(side: int, network: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"got {side}"):
        network(side=side, channels=1, width=4, latent_channels=2)


def test_latents_have_the_scale_that_noise_is_measured_on() -> None:
    torch.manual_seed(0)
    latents_NZhw = Encoder(side=16, channels=3, width=4, latent_channels=5)(torch.rand(64, 3, 16, 16))
    torch.testing.assert_close(latents_NZhw.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents_NZhw.var((0, 2, 3)), torch.ones(5), atol=0.02, rtol=0)


def test_every_layer_of_the_discriminator_has_spectral_norm_one() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(side=8, channels=1, width=4)
    with torch.no_grad():
        for _ in range(50):  # each pass takes one more step of the power iteration
            discriminator(torch.randn(1, 1, 8, 8))
    layers = [layer for layer in discriminator.eval().modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 5
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        assert norm.item() == pytest.approx(1.0, abs=0.05)


# --- mixing ---


def dealt(*, pictures: int, regions: int, count: int = 500, side: int = 8) -> Tensor:
    """Mixed latents (N, Z, h, w) whose numbers say of which picture they are."""
    dealt_NR = deal(count, pictures=pictures, regions=regions, rng=chance())
    return arrange(dealt_NR[:, :, None, None, None].float().expand(-1, -1, 2, side, side), cells=side)


@pytest.mark.parametrize(("pictures", "regions"), [(1, 1), (2, 2), (2, 4), (3, 2), (3, 8), (2, 1)])
def test_each_picture_gets_its_part_of_the_regions(pictures: int, regions: int) -> None:
    mixed_NZhw = dealt(pictures=pictures, regions=regions)
    assert torch.equal(mixed_NZhw[:, 0], mixed_NZhw[:, 1]), "all channels of a place are of one picture"
    cells_NRR = mixed_NZhw[:, 0, :: 8 // regions, :: 8 // regions]
    enlarged_NHW = cells_NRR.repeat_interleave(8 // regions, 1).repeat_interleave(8 // regions, 2)
    assert torch.equal(enlarged_NHW, mixed_NZhw[:, 0]), "a region is of one picture"
    counts_NP = torch.stack([(cells_NRR == p).sum((1, 2)) for p in range(pictures)], 1)
    assert counts_NP.max() - counts_NP.min() <= 1
    if 1 < pictures <= regions**2:
        assert len(cells_NRR.flatten(1).unique(dim=0)) > 1, "not always the same ones"


def test_regions_of_a_latent_that_they_do_not_divide_are_nearly_equal() -> None:
    mixed_NZhw = dealt(pictures=2, regions=2, side=7)
    shares_N = mixed_NZhw[:, 0].mean((1, 2))
    assert (3 * 7 / 49 <= shares_N).all() and (shares_N <= 4 * 7 / 49).all()


def test_noise_has_the_asked_strength() -> None:
    mixed_NZhw = noisy(torch.zeros(500, 2, 8, 8), noise=0.3, rng=chance())
    assert mixed_NZhw.std().item() == pytest.approx(0.3, rel=0.02)
    assert mixed_NZhw.mean().item() == pytest.approx(0.0, abs=0.01)


def mixes(**changes: int | float) -> Mixes:
    torch.manual_seed(0)
    given: dict[str, int | float] = {"picture_count": 20, "view_count": 2, "mix_pictures": 2, "mix_regions": 2}
    shape: dict[str, int | float] = {"side": 8, "channels": 1, "width": 4, "latent_channels": 3, "mix_noise": 0.1}
    made = Mixes(**(shape | given | changes))  # type: ignore[arg-type]
    made.latents_VMZhw.normal_()
    return made.eval().requires_grad_(False)


def test_the_same_chance_makes_the_same_pictures() -> None:
    made = mixes()
    plan_NR, images_NCHW = made.sample(9, rng=chance(1))
    assert plan_NR.shape == (9, made.latent_count) == (9, 4)
    assert images_NCHW.shape == (9, 1, 8, 8) and images_NCHW.abs().max() <= 1.0
    assert torch.equal(made.sample(9, rng=chance(1))[1], images_NCHW)
    assert not torch.equal(made.sample(9, rng=chance(2))[1], images_NCHW)


def test_a_mix_is_of_different_pictures_of_all_there_are_in_all_views() -> None:
    made = mixes(mix_noise=0.0, mix_regions=1, mix_pictures=1)
    made.latents_VMZhw[:] = torch.arange(40.0).view(2, 20, 1, 1, 1)
    assert made.draw(2000, rng=chance())[1][:, 0, 0, 0].unique().tolist() == list(range(40))
    made = mixes(mix_noise=0.0)
    made.latents_VMZhw[:] = torch.arange(20.0).view(1, 20, 1, 1, 1)
    two_NX = made.draw(500, rng=chance())[1][:, 0].flatten(1)
    assert (two_NX.amin(1) < two_NX.amax(1)).all(), "never twice the same"


@pytest.mark.parametrize(("side", "regions"), [(8, 2), (12, 2), (28, 2), (28, 4), (32, 3)])
def test_a_mosaic_of_the_pictures_themselves_is_cut_where_the_mix_was(side: int, regions: int) -> None:
    made = mixes(side=side, mix_regions=regions, mix_noise=0.0)
    # A pixel says whose it is, and in which patch of that picture: those of a mirrored one count backwards.
    patches = torch.arange(latent_side(side)).repeat_interleave(side // latent_side(side))
    images_MCHW = 100 * torch.arange(20)[:, None, None, None] + patches.expand(20, 1, side, side)
    views = torch.stack([images_MCHW, images_MCHW.flip(-1)])
    made.latents_VMZhw.copy_(views[..., :: side // latent_side(side), :: side // latent_side(side)])
    plan_NR, latents_NZhw = made.draw(200, rng=chance())
    enlarged_NHW = latents_NZhw[:, 0].repeat_interleave(side // latent_side(side), 1)
    enlarged_NHW = enlarged_NHW.repeat_interleave(side // latent_side(side), 2)
    assert torch.equal(mosaic(plan_NR, images_MCHW)[:, 0], enlarged_NHW.long())
    assert (plan_NR >= 20).any() and (plan_NR < 20).any(), "mirrored and not"


def test_arguments_build_mixes_that_take_the_same_weights_and_latents() -> None:
    made, twin = mixes(), Mixes(**mixes().arguments).eval()  # type: ignore[arg-type]
    assert made.latents_VMZhw.dtype == torch.float16
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin.sample(3, rng=chance())[1], made.sample(3, rng=chance())[1])
