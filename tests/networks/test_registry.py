import pytest
import torch

from networks.registry import CLASSIFIERS, build, fitting


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as refused:
        build("resnet57", class_count=10, channels=3)
    text = str(refused.value)
    assert "'resnet57'" in text and "\n" not in text and all(name in text for name in CLASSIFIERS)


@pytest.mark.parametrize(
    ("class_count", "channels", "got"), [(1, 3, "at least 2 classes, got 1"), (10, 2, "channels, got 2")]
)
def test_impossible_counts_are_refused(class_count: int, channels: int, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        build("resnet8", class_count=class_count, channels=channels)


@pytest.mark.parametrize("name", ["resnet8", "resnet8_pad", "resnet110", "vgg11", "vgg13", "mobilenet"])
@pytest.mark.parametrize(("class_count", "channels"), [(2, 1), (100, 3)])
def test_weights_fit_their_own_architecture_and_no_other(name: str, class_count: int, channels: int) -> None:
    with torch.device("meta"):
        weights = build(name, class_count=class_count, channels=channels).state_dict()
    assert fitting(weights) == [name]


def test_weights_of_the_public_cifar_resnet56_are_recognised_by_shape() -> None:
    norm = {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1}
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (16, 3, 3, 3),
        "linear.weight": (10, 64),
        "linear.bias": (10,),
    }
    norms = {"bn1": 16}
    width_in = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(9):
            shapes[f"layer{stage}.{block}.conv1.weight"] = (width, width_in, 3, 3)
            shapes[f"layer{stage}.{block}.conv2.weight"] = (width, width, 3, 3)
            norms |= {f"layer{stage}.{block}.bn1": width, f"layer{stage}.{block}.bn2": width}
            width_in = width
    for name, width in norms.items():
        shapes |= {f"{name}.{part}": (width,) for part in norm} | {f"{name}.num_batches_tracked": ()}
    assert fitting({name: torch.zeros(shape) for name, shape in shapes.items()}) == ["resnet56_pad"]


def test_a_key_more_a_key_less_or_another_shape_fits_nothing() -> None:
    weights = build("resnet8", class_count=10, channels=3).state_dict()
    assert fitting(weights | {"extra": torch.zeros(1)}) == []
    assert fitting({key: value for key, value in weights.items() if key != "bn1.bias"}) == []
    assert fitting(weights | {"bn1.bias": torch.zeros(17)}) == []
    assert fitting({}) == []
    assert fitting(weights | {"linear.weight": torch.zeros(64)}) == []


def test_looking_for_fits_draws_no_random_numbers() -> None:
    weights = build("vgg11", class_count=10, channels=3).state_dict()
    before = torch.get_rng_state()
    fitting(weights)
    assert torch.equal(torch.get_rng_state(), before)
