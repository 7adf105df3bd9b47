import pytest
import torch
from torch import nn

from networks.gan import Discriminator, Generator


@pytest.mark.parametrize("side", [8, 12, 16, 28, 32, 36, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_have_the_asked_shape_and_scale(side: int, channels: int) -> None:
    generator = Generator(class_count=10, noise_count=6, side=side, channels=channels, width=4)
    images_NCHW = generator(100.0 * torch.randn(3, 16))
    assert images_NCHW.shape == (3, channels, side, side)
    assert images_NCHW.abs().max() <= 1.0
    assert Discriminator(side=side, channels=channels, width=4)(images_NCHW).shape == (3,)


@pytest.mark.parametrize("side", [4, 30, 132])
def test_side_that_cannot_be_halved_twice_or_is_out_of_range_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"got {side}"):
        Generator(class_count=10, noise_count=0, side=side, channels=1, width=4)
    with pytest.raises(ValueError, match=f"got {side}"):
        Discriminator(side=side, channels=1, width=4)


def test_arguments_build_a_generator_that_takes_the_same_weights() -> None:
    generator = Generator(class_count=5, noise_count=3, side=12, channels=3, width=4).eval()
    twin = Generator(**generator.arguments).eval()
    latents_NL = torch.randn(2, 8)
    assert not torch.equal(twin(latents_NL), generator(latents_NL))
    twin.load_state_dict(generator.state_dict())
    assert torch.equal(twin(latents_NL), generator(latents_NL))


def test_without_noise_the_latent_is_the_class_axes_alone() -> None:
    # The paper's generator: 10 latent numbers, 128, 128 and 64 channels on a picture of side 32.
    generator = Generator(class_count=10, noise_count=0, side=32, channels=1, width=64)
    assert generator(torch.randn(2, 10)).shape == (2, 1, 32, 32)
    # Its own layers hold 312,705 numbers; ours leave out the two biases that a batch norm takes off again.
    assert sum(p.numel() for p in generator.parameters()) == 312_705 - 128 - 64


def test_score_of_a_picture_does_not_depend_on_its_neighbours() -> None:
    discriminator = Discriminator(side=8, channels=1, width=4).eval()
    images_NCHW = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(discriminator(images_NCHW)[:1], discriminator(images_NCHW[:1]))


def test_every_layer_of_the_discriminator_has_spectral_norm_one() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(side=8, channels=1, width=4)
    with torch.no_grad():
        for _ in range(50):  # each pass takes one more step of the power iteration
            discriminator(torch.randn(1, 1, 8, 8))
    discriminator.eval()
    layers = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 5
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        assert norm.item() == pytest.approx(1.0, abs=0.02)
