import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.classifiers import ResNet
from networks.registry import CLASSIFIERS, build

FEATURES = {"vgg11": 512, "vgg13": 512, "mobilenet": 1024}


@pytest.mark.parametrize(
    ("name", "channels", "height", "width"),
    [
        (name, 1, 8, 12)
        for name in CLASSIFIERS
        if not name.startswith(("resnet14", "resnet32", "resnet44", "resnet110"))
    ]
    + [(name, 3, 28, 128) for name in ("resnet8", "resnet8_pad", "vgg11", "mobilenet")],
)
def test_every_classifier_answers_every_supported_size(name: str, channels: int, height: int, width: int) -> None:
    net = build(name, class_count=7, channels=channels).eval()
    images = torch.rand(2, channels, height, width)
    with torch.no_grad():
        features, logits = net.features(images), net(images)
    assert features.shape == (2, FEATURES.get(name, 64))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, net.linear(features))


@pytest.mark.parametrize("name", ["resnet8", "resnet8_pad", "vgg11", "mobilenet"])
def test_a_fresh_classifier_tells_pictures_apart_and_passes_gradients_to_its_first_layer(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, class_count=4, channels=3)
    images = torch.randn(8, 3, 32, 32)
    logits = net(images)
    assert logits.std(dim=0).min() > 1e-3
    F.cross_entropy(logits, torch.arange(8) % 4).backward()
    gradient = net.get_parameter("conv1.weight").grad
    assert gradient is not None and gradient.norm() > 1e-3


# Hand counts. ResNet-n, without shortcuts: He et al. 2015, table 6, gives 0.27 M and 0.85 M for 20 and 56.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20_pad", 269_722),
        ("resnet56_pad", 853_018),
        # two shortcuts more: 16*32 + 2*32 and 32*64 + 2*64
        ("resnet20", 269_722 + 576 + 2_176),
        # VGG11: 9,220,480 in eight convolutions, two hidden layers of 512*512 + 512, 512*10 + 10
        ("vgg11", 9_220_480 + 2 * 262_656 + 5_130),
        ("mobilenet", 3_217_226),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    with torch.device("meta"):
        net = build(name, class_count=10, channels=3)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


def test_padded_shortcut_takes_every_second_pixel_between_zero_channels() -> None:
    net = ResNet(8, class_count=2, channels=3, pad_shortcut=True)
    x = torch.rand(2, 16, 8, 8)
    y: Tensor = net.layer2[0].shortcut(x)  # type: ignore[operator,union-attr]
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4) and not y[:, :8].any() and not y[:, 24:].any()


def test_padded_resnet_has_the_keys_of_the_public_weights() -> None:
    keys = {"conv1.weight", "linear.weight", "linear.bias"}
    norms = ["bn1"]
    for stage in (1, 2, 3):
        keys |= {f"layer{stage}.{block}.conv{i}.weight" for block in range(9) for i in (1, 2)}
        norms += [f"layer{stage}.{block}.bn{i}" for block in range(9) for i in (1, 2)]
    for norm in norms:
        keys |= {
            f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
    assert set(build("resnet56_pad", class_count=10, channels=3).state_dict()) == keys


@pytest.mark.parametrize("depth", [2, 7, 9])
def test_a_depth_that_is_no_resnet_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"got {depth}$"):
        ResNet(depth, class_count=10, channels=3)


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("vgg11", 8), ("vgg13", 10), ("mobilenet", 27)]
    + [(f"resnet{depth}_pad", depth - 1) for depth in (8, 14, 20, 32, 44, 56, 110)]
    + [(f"resnet{depth}", depth - 1 + 2) for depth in (8, 14, 20, 32, 44, 56, 110)],  # two shortcuts more
)
def test_depth_is_the_named_one(name: str, convolutions: int) -> None:
    with torch.device("meta"):
        net = build(name, class_count=10, channels=3)
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.modules()) == convolutions


def test_mobilenets_strided_depthwise_convolutions_alone_keep_float32_in_low_precision() -> None:
    torch.manual_seed(1)
    net = build("mobilenet", class_count=10, channels=3).eval()
    kinds: dict[tuple[int, ...], set[torch.dtype]] = {(1, 1): set(), (2, 2): set()}
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.register_forward_hook(
                lambda layer, _, found_NCHW: kinds[layer.stride].add(found_NCHW.dtype)  # type: ignore[index]
            )
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low_NK = net(images).float()
    assert kinds == {(1, 1): {torch.bfloat16}, (2, 2): {torch.float32}}
    with torch.no_grad():
        logits_NK = net(images)
    assert (low_NK - logits_NK).norm() < 0.02 * logits_NK.norm()
