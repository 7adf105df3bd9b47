import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_agent.data import DataError, LocalImages, load_local_images
from edge_agent.splits import digits_part, training_part


def load(source: object, *, channels: int = 3, height: int = 8, width: int = 8, **more: Any) -> LocalImages:
    more = {"data_root": None, "limit": None, "seed": 0} | more
    return load_local_images(str(source), channels=channels, height=height, width=width, **more)


def noise(i: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """70 pictures that come back pixel for pixel, named so that they sort after what the tests add."""
    path = tmp_path / "pictures"
    (path / "m" / "deep").mkdir(parents=True)
    for i in range(70):
        Image.fromarray(noise(i)).save(path / "m" / ("deep" if i < 35 else ".") / f"{i:03}.png")
    return path


def first(folder: Path, picture: Image.Image, name: str = "a.png", **how: Any) -> np.ndarray:
    """Return how one more picture, the first by name, is read: (C, H, W)."""
    save = how.pop("save", {})
    picture.save(folder / name, **save)
    images = load(folder, **how)
    assert not images.skipped and len(images.images_NCHW) == 71
    picture_CHW: np.ndarray = images.images_NCHW[0]
    return picture_CHW


def test_a_folder_is_read_whole_in_sorted_order_and_pixel_for_pixel(folder: Path) -> None:
    images = load(folder)
    by_name = [noise(i) for i in range(35, 70)] + [noise(i) for i in range(35)]  # a folder's files, then its folders
    assert np.array_equal(images.images_NCHW, np.stack(by_name).transpose(0, 3, 1, 2))
    assert images.images_NCHW.dtype == np.uint8
    assert images.source == str(folder) and images.skipped == ()


def test_the_digest_follows_the_pixels_alone(folder: Path, tmp_path: Path) -> None:
    digest = load(folder).digest
    folder.rename(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert load(folder).digest == digest and len(digest) == 64
    Image.fromarray(noise(0) ^ 1).save(folder / "m" / "deep" / "000.png")
    assert load(folder).digest != digest


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_every_kind_of_png_becomes_colour_over_white(
    mode: str, value: Any, expected: tuple[int, ...], folder: Path
) -> None:
    assert first(folder, Image.new(mode, (8, 8), value))[:, 4, 4].tolist() == list(expected)


@pytest.mark.parametrize(("transparency", "expected"), [(None, [9, 8, 7]), (0, [255, 255, 255])])
def test_a_palette_is_looked_up_and_may_be_transparent(
    transparency: int | None, expected: list[int], folder: Path
) -> None:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([9, 8, 7, 1, 2, 3])
    save = {} if transparency is None else {"transparency": transparency}
    assert first(folder, picture, save=save)[:, 0, 0].tolist() == expected


def test_colour_becomes_grey_by_luminance(folder: Path) -> None:
    grey = first(folder, Image.new("RGB", (8, 8), (255, 0, 0)), channels=1)
    assert grey.shape == (1, 8, 8) and (grey == 76).all()  # 0.299 x 255


@pytest.mark.parametrize(("name", "mode"), [("a.bmp", "RGB"), ("a.gif", "L"), ("a.jpg", "CMYK"), ("a.jpeg", "L")])
def test_other_formats_are_read(name: str, mode: str, folder: Path) -> None:
    picture = Image.new("RGB", (8, 8), (128, 128, 128)).convert(mode)
    assert np.abs(first(folder, picture, name).astype(int) - 128).max() <= 2


@pytest.mark.parametrize("name", ["a.tiff", "a.webp", "a.ppm"])
def test_lossless_formats_come_back_pixel_for_pixel(name: str, folder: Path) -> None:
    read = first(folder, Image.fromarray(noise(1)), name, save={"lossless": True} if name.endswith("webp") else {})
    assert np.array_equal(read, noise(1).transpose(2, 0, 1))


def test_exif_orientation_is_followed(folder: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.paste((200, 200, 200), (0, 0, 8, 4))  # light above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is stored above is shown at the right
    read = first(folder, picture, save={"exif": exif})
    assert (read[:, :, 4:] == 200).all() and (read[:, :, :4] == 0).all()


def test_the_centre_of_the_longer_side_is_kept(folder: Path) -> None:
    picture = Image.new("RGB", (32, 8), (255, 0, 0))
    picture.paste((0, 200, 0), (12, 0, 20, 8))
    assert (first(folder, picture) == np.reshape([0, 200, 0], (3, 1, 1))).all()


def test_shrinking_averages_instead_of_skipping_pixels(folder: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    read = first(folder, Image.fromarray(stripes))
    assert np.abs(read.astype(int) - 100).max() <= 12


def test_a_large_jpeg_is_read_nearly_as_its_exact_reduction(folder: Path) -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[:, None, None], (1024, 1024, 3)).copy())
    read = first(folder, picture, "a.jpg", save={"quality": 95}).astype(int)
    assert np.abs(read - ramp.reshape(8, 128).mean(axis=1)[None, :, None]).max() <= 12


def test_pictures_fit_a_size_that_is_not_square(folder: Path) -> None:
    assert load(folder, channels=1, height=12, width=20).images_NCHW.shape == (70, 1, 12, 20)


def test_what_cannot_be_read_is_named_and_skipped(folder: Path) -> None:
    whole = (folder / "m" / "040.png").read_bytes()
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "broken" / "empty.jpg").write_bytes(b"")
    (folder / "broken" / "notes.txt").write_text("hello")
    (folder / "broken" / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "broken" / "pipe.png")
    Image.new("F", (8, 8)).save(folder / "broken" / "float.tiff")
    images = load(folder)
    assert len(images.images_NCHW) == 70
    why = dict(images.skipped)
    assert list(why) == [
        f"broken/{name}" for name in ("cut.png", "empty.jpg", "float.tiff", "gone.png", "notes.txt", "pipe.png")
    ]
    assert why["broken/notes.txt"] == why["broken/empty.jpg"] == "not a picture"
    assert why["broken/pipe.png"] == why["broken/gone.png"] == "no plain file"
    assert "truncated" in why["broken/cut.png"]
    assert not any("\n" in reason for reason in why.values())


def test_a_jpeg_cut_short_is_skipped(folder: Path) -> None:
    Image.fromarray(noise(1, 64, 64)).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert [name for name, _ in load(folder).skipped] == ["cut.jpg"]


def test_a_decompression_bomb_is_skipped(folder: Path) -> None:
    Image.new("1", (16_000, 16_000)).save(folder / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(folder / "warned.png")
    assert (folder / "bomb.png").stat().st_size < 100_000
    skipped = dict(load(folder).skipped)
    assert list(skipped) == ["bomb.png", "warned.png"]
    assert all("DecompressionBomb" in reason for reason in skipped.values())


def test_a_format_that_starts_programs_is_not_opened(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "a.eps")
    assert load(folder).skipped == (("a.eps", "not a picture"),)


def test_hidden_files_and_folders_are_no_part_of_it(folder: Path) -> None:
    (folder / ".thumbnails").mkdir()
    Image.fromarray(noise(1)).save(folder / ".thumbnails" / "a.png")
    Image.fromarray(noise(1)).save(folder / ".a.png")
    (folder / ".DS_Store").write_bytes(b"x")
    assert load(folder).digest == load(folder / "m").digest
    assert load(folder).skipped == ()


def test_a_loop_of_links_is_harmless(folder: Path) -> None:
    (folder / "m" / "loop").symlink_to(folder, target_is_directory=True)
    assert len(load(folder).images_NCHW) == 70


def test_a_link_to_the_folder_itself_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert load(tmp_path / "link").digest == load(folder).digest


def test_too_few_pictures_are_refused_with_the_counts(folder: Path) -> None:
    for i in range(63, 70):
        (folder / "m" / f"{i:03}.png").write_text("gone")
    with pytest.raises(DataError) as refused:
        load(folder)
    assert str(refused.value) == (
        f"expected at least 64 usable pictures in {folder}, found 63 and skipped 7 (first: m/063.png: not a picture)"
    )


def test_an_empty_folder_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found 0 and skipped 0$"):
        load(tmp_path)
    with pytest.raises(DataError, match="expected digits, mnist, cifar10 or a folder of pictures, got 'cifar11'"):
        load("cifar11")


@pytest.mark.parametrize(("more", "said"), [({"limit": 63}, "at least 64"), ({"channels": 2}, "got 2")])
def test_impossible_wishes_are_refused(more: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(DataError, match=said):
        load(folder, **more)


def test_a_limit_chooses_by_seed_and_keeps_the_order(folder: Path) -> None:
    (folder / "m" / "bad.png").write_text("x")
    everything = [picture.tobytes() for picture in load(folder).images_NCHW]
    chosen = [picture.tobytes() for picture in load(folder, limit=64).images_NCHW]
    assert len(chosen) == 64 and chosen == [picture for picture in everything if picture in chosen]
    assert load(folder, limit=64).digest == load(folder, limit=64).digest != load(folder, limit=64, seed=1).digest
    assert len(load(folder, limit=1000).images_NCHW) == 70


def test_other_files_than_those_chosen_change_nothing_when_they_come_or_go(folder: Path) -> None:
    """Or a run that has paid for answers could not go on."""
    chosen = load(folder, limit=64)
    kept = {picture.tobytes() for picture in chosen.images_NCHW}
    for i in range(30):
        (folder / f"{i}.txt").write_text("no picture")
        (folder / "m" / "deep" / f"{i}.jpg.part").write_bytes(b"")
    others = [i for i in range(70) if noise(i).transpose(2, 0, 1).tobytes() not in kept]
    for i in others[:3]:
        (folder / "m" / ("deep" if i < 35 else ".") / f"{i:03}.png").unlink()
    assert load(folder, limit=64).digest == chosen.digest


def test_who_wants_another_size_is_told_the_very_same_pictures(folder: Path) -> None:
    told: list[np.ndarray] = []
    load(folder, limit=64, also=(20, 30, told.append))
    at_that_size = load(folder, limit=64, height=20, width=30).images_NCHW
    assert sorted(image.tobytes() for image in told) == sorted(image.tobytes() for image in at_that_size)


def test_digits_are_the_device_part_alone() -> None:
    from sklearn.datasets import load_digits

    images = load("digits", channels=1)
    device = [picture for i, picture in enumerate(load_digits().images) if digits_part(i) == "device"]
    assert np.array_equal(images.images_NCHW[:, 0], np.rint(np.stack(device) * 255 / 16))
    assert images.images_NCHW.max() == 255 and len(images.images_NCHW) == 444


def test_digits_grow_to_the_size_asked() -> None:
    small, large = load("digits", channels=1).images_NCHW, load("digits", height=32, width=32).images_NCHW
    assert large.shape == (444, 3, 32, 32)
    assert np.array_equal(large[:, 0], large[:, 2])
    means = large[:, 0].reshape(444, 8, 4, 8, 4).mean(axis=(2, 4))
    assert np.abs(means - small[:, 0]).mean() < 20


def test_digits_and_folders_do_not_import_torch(folder: Path) -> None:
    code = (
        "import sys; from edge_agent.data import load_local_images as load\n"
        "for source in sys.argv[1:]:\n"
        "    load(source, channels=1, height=8, width=8, data_root=None, limit=None, seed=0)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, "digits", str(folder)], check=False).returncode == 0


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training files of MNIST in shape: picture i says i in its first two pixels, all others are 7."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.full((60_000, 28, 28), 7, np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.divmod(np.arange(60_000), 256)
    (raw / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 60_000, 28, 28) + pixels.tobytes())
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 60_000) + bytes(60_000))
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"")
    return root


@pytest.mark.parametrize("below", ["", "mnist"])
def test_mnist_is_its_device_part_and_padded_to_32(mnist: Path, below: str) -> None:
    images = load("mnist", channels=1, height=32, width=32, data_root=mnist / below).images_NCHW
    assert images.shape == (10_000, 1, 32, 32)
    numbers = images[:, 0, 2, 2].astype(int) * 256 + images[:, 0, 2, 3]
    assert np.array_equal(numbers, training_part("mnist", "device"))
    border = np.ones((32, 32), bool)
    border[2:30, 2:30] = False
    assert not images[:, 0, border].any() and (images[:, 0, 3:30, 2:30] == 7).all()


def test_mnist_at_its_own_size_is_untouched_and_may_be_limited(mnist: Path) -> None:
    images = load("mnist", channels=1, height=28, width=28, data_root=mnist, limit=100, seed=3).images_NCHW
    numbers = images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]
    chosen = np.sort(np.random.default_rng(3).permutation(10_000)[:100])
    assert np.array_equal(numbers, training_part("mnist", "device")[chosen])


def test_mnist_at_two_sizes_is_padded_to_32_alone(mnist: Path) -> None:
    told: list[np.ndarray] = []
    images = load("mnist", channels=1, height=28, width=28, data_root=mnist, limit=64, also=(32, 32, told.append))
    assert sorted(image[0, 2:30, 2:30].tobytes() for image in told) == sorted(
        image.tobytes() for image in images.images_NCHW
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar10-jpeg"])
def test_cifar10_may_be_a_folder_of_pictures_by_class(name: str, tmp_path: Path) -> None:
    for k in range(10):
        here = tmp_path / name / "train" / f"class{k}"
        here.mkdir(parents=True)
        Image.new("RGB", (32, 32), (k * 20, 0, 0)).save(here / "0000.png")
        for i in range(1, 5000):
            os.link(here / "0000.png", here / f"{i:04}.png")
    images = load("cifar10", data_root=tmp_path, limit=64).images_NCHW
    chosen = training_part("cifar10", "device")[np.sort(np.random.default_rng(0).permutation(10_000)[:64])]
    assert np.array_equal(images[:, 0, 0, 0], chosen // 5000 * 20)
    (tmp_path / name / "train" / "class0" / "0001.png").unlink()
    with pytest.raises(DataError, match=r"expected 50000 pictures .* got 49999"):
        load("cifar10", data_root=tmp_path, limit=64)


def test_cifar10_of_torchvision_is_its_device_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CIFAR10:
        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            assert root == tmp_path and train and download
            self.data = np.zeros((50_000, 4, 4, 3), np.uint8)
            self.data[:, :, :, 0] = (np.arange(50_000) // 256)[:, None, None]
            self.data[:, :, :, 1] = (np.arange(50_000) % 256)[:, None, None]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", CIFAR10)
    images = load("cifar10", height=4, width=4, data_root=tmp_path).images_NCHW.astype(int)
    assert np.array_equal(images[:, 0, 0, 0] * 256 + images[:, 1, 0, 0], training_part("cifar10", "device"))


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fails)
    with pytest.raises(DataError, match=f"CIFAR10 is not in {tmp_path} and cannot be downloaded: .*no network"):
        load("cifar10", data_root=tmp_path)


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_a_data_set_needs_a_data_root(source: str) -> None:
    with pytest.raises(DataError, match=f"{source}: expected a folder where it lies .* give --data or MEKD_DATA"):
        load(source)


@pytest.mark.parametrize("source", ["x" * 5000, "with\0zero"])
def test_a_path_that_the_system_refuses_to_look_at_is_one_line(source: str) -> None:
    with pytest.raises(DataError, match="expected digits, mnist, cifar10 or a folder"):
        load_local_images(source, channels=1, height=8, width=8, data_root=None, limit=None, seed=0)
