"""The settings of the three phases: frozen, keyword-only, built once at the entry; leaves get plain values."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DeprivatizeConfig:
    """Phase 1: learn to make pictures like the local ones. Asks the teacher nothing, but for `im_queries`."""

    generator: str = "gan"
    """gan, diffusion (`networks.diffusion`), or mixes: an autoencoder's latents of local pictures, mixed
    (`networks.mixes`)."""
    steps: int = 1500
    """Optimiser steps of the generator; a GAN's discriminator takes as many, that of mixes two thirds of them."""
    batch_count: int = 64
    """Real pictures a step, of a GAN as many synthetic ones."""
    generator_width: int = 32
    """Channels of the generator's layers at the full side of the picture; others have twice or four times as many."""
    discriminator_width: int = 32
    """Channels of the discriminator's first layers; the deepest have twice or four times as many."""
    noise_count: int = 54
    """Free numbers of a latent, beside one a class. 0 is the paper's generator."""
    generator_learning_rate: float = 4e-4
    """Step size of Adam for the generator; it falls to 0 along a half cosine, of diffusion after a short rise."""
    discriminator_learning_rate: float = 4e-4
    """Step size of Adam for the discriminator; it falls to 0 along a half cosine."""
    ema_decay: float = 0.995
    """Share of the averaged generator that survives a step; about 1 / (1 - decay) steps are averaged, a ninth of all
    so far at most."""
    recolour_strength: float = 0.2
    """Largest change of brightness and contrast that the discriminator sees; 1 is half the range."""
    shift_fraction: float = 0.125
    """Largest shift that the discriminator sees, as a fraction of the side."""
    cutout_fraction: float = 0.0
    """Side of the square hidden from the discriminator, as a fraction of the picture's side."""
    mirror: bool = False
    """Whether local pictures also count mirrored: right for most photographs, wrong for digits and letters."""
    loss: str = "hinge"
    """hinge, or bce: the paper's logarithms, the generator's in the form that does not saturate."""
    im_queries: int = 0
    """Most queries spent on the paper's information maximisation, in the last steps; 0: off."""
    im_weight: float = 0.5
    """What the teacher's confidence in a picture adds to its weight of 1 in the generator's loss (paper: alpha)."""
    latent_channels: int = 16
    """Of mixes: numbers that say what a patch of a picture looks like; fewer blur more."""
    mix_pictures: int = 2
    """Of mixes: local pictures in each, of as many regions each, or one more; as many as it has regions at most."""
    mix_regions: int = 2
    """Of mixes: regions along each side; each is of one local picture."""
    mix_noise: float = 0.3
    """Of mixes: noise on the latents, in standard deviations."""
    drawing_steps: int = 12
    """Of diffusion: passes through the network a picture."""


_MIXES_OWN = ("latent_channels", "mix_pictures", "mix_regions", "mix_noise")
_ADVERSARIAL = (
    "discriminator_width",
    "noise_count",
    "discriminator_learning_rate",
    "recolour_strength",
    "shift_fraction",
    "cutout_fraction",
    "loss",
    "im_queries",
    "im_weight",
)
NO_MATTER: dict[str, tuple[str, ...]] = {
    "gan": ("generator", "drawing_steps", *_MIXES_OWN),  # it was what it is before there was another
    "diffusion": (*_ADVERSARIAL, *_MIXES_OWN),
    "mixes": ("drawing_steps",),
}
"""Kind of generator -> settings of `DeprivatizeConfig` that its pictures do not depend on. Of a GAN and of mixes not
all: folders of former versions name the rest (`_MIXES_IGNORE`)."""
_MIXES_IGNORE = ("noise_count", "recolour_strength", "shift_fraction", "cutout_fraction")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Phase 2: train the student on the answers that were paid for."""

    passes: int = 25
    """Times that the pool is gone through, each time with other views of its pictures."""
    batch_count: int = 64
    """Synthetic pictures a step."""
    learning_rate: float = 0.1
    """Peak step size of SGD with Nesterov momentum; rises over the first steps, then a half cosine to 0."""
    warmup_fraction: float = 0.05
    """Part of all steps over which the step size rises from 0."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    ema_decay: float = 0.995
    """Share of the averaged student that survives a step; about 1 / (1 - decay) steps are averaged, a ninth of all so
    far at most."""
    temperature: float = 1.0
    """Softens teacher and student in the divergence; its gradients are scaled back by its square. Above 1, classes
    that a top-k answer leaves out, which share evenly what is missing, weigh more than they should: with 100 classes
    or more leave it at 1."""
    label_smoothing: float = 0.1
    """Probability spread over all classes when an answer is only an index."""
    image_weight: float = 1.0
    """Weight of the image loss (mean absolute difference of pixels in -1..1) beside the divergence; 0: off."""
    image_fraction: float = 0.125
    """Part of each batch that the image loss is taken on: it costs a pass through the generator."""
    shift_px: int = 1
    """Largest shift of the student's view, in pixels each way."""
    mirror: bool = False
    """Whether the student also sees pictures mirrored: right for most photographs, wrong for digits and letters."""
    mosaic_fraction: float = 0.0
    """Of a pool of mixes: part of each batch that is seen as mosaics of the local pictures themselves. 0: none."""
    assistant: str = ""
    """A larger network that learns from the answers first, and then tells the student of local pictures, which stay
    on the device, what it thinks the teacher would say; empty: none."""
    assistant_passes: int = 15
    """Times that the assistant goes through the pool."""
    assistant_generations: int = 1
    """How many assistants are trained in turn, each but the first taught by the one before it, too."""
    assistant_weight: float = 1.0
    """Weight of the divergence from the assistant's answers beside that from the teacher's."""
    balance_answers: bool = False
    """Whether probabilities are shifted so that the pool names all classes alike: for pictures so strange to the
    teacher that it calls most of them by few names, and local pictures of which no class is rare."""
    balance_pictures: bool = False
    """Whether pictures are seen the more often the fewer are called as they are: for a generator that seldom makes
    some classes, and local pictures of which none is rare."""
    local_weight: float = 0.0
    """Weight of the loss on local pictures beside the divergence; they stay on the device. 0: off."""
    local_start_fraction: float = 0.5
    """Part of all steps before local pictures take part: a student that knows little labels them wrongly for good."""
    local_batch_count: int = 64
    """Local pictures a step, of either weight."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Phase 3: follow what the camera's pictures become, with forward passes only."""

    memory_count: int = 1000
    """Most synthetic pictures remembered, split evenly over the classes that the teacher named."""
    memory_bytes: int = 3_500_000
    """Most bytes that the memory takes, before any compression; the student's statistics it takes anyway."""
    recent_count: int = 256
    """Pictures of the stream whose features and answers are remembered."""
    neighbour_count: int = 5
    """Nearest neighbours that each picture listens to: of its batch, of the recent and of the synthetic ones."""
    strength: float = 5.0
    """The most, in nats, that neighbours can move the log-odds between two classes; 0: they are not listened to."""
    iterations: int = 30
    """Most rounds of propagation; it stops before when nothing moves."""


@dataclass(frozen=True, kw_only=True)
class KServeConfig:
    """How pictures and answers travel to and from a KServe V2 server: section ``[teacher]``.

    Needed only where the server's metadata leaves it open; empty or 0: not given.
    """

    input: str = ""
    """Name of the tensor that takes the pictures."""
    layout: str = ""
    """NCHW or NHWC."""
    channels: int = 0
    """1 (grey) or 3 (RGB)."""
    height: int = 0
    """Rows of a picture."""
    width: int = 0
    """Columns of a picture."""
    scale: float = 0.0
    """What a white pixel becomes before mean and std: 255 or 1, as a rule. A black one is 0."""
    mean: tuple[float, ...] = ()
    """Taken off, on the scale above: a number for all channels, or one a channel."""
    std: tuple[float, ...] = ()
    """Divided by, after the mean: a number for all channels, or one a channel."""
    output: str = ""
    """Name of the tensor that holds the answers."""
    output_kind: str = ""
    """logits, probabilities or labels."""
    classes: int = 0
    """How many classes there are."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: what ``run.toml`` holds, with the flags of ``edge-agent run`` on top."""

    images: str
    """A folder of pictures, or digits, mnist or cifar10."""
    teacher: str = "127.0.0.1:50051"
    """HOST:PORT, or kserve://HOST:PORT/MODEL[/VERSION]; kserves:// for TLS."""
    student: str = "resnet8"
    """Architecture of the small model."""
    budget: int = 50_000
    """Most pictures this run folder may be charged for, over all phases and resumes."""
    run_dir: str = "runs/mekd"
    """The run folder."""
    seed: int = 0
    """Of every random choice."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data: str = ""
    """Where mnist and cifar10 lie, or are downloaded to."""
    local_pictures: int = 0
    """Most local pictures used, chosen by the seed; 0: all."""
    image_size: int = 64
    """Largest side of the generator's pictures where the teacher's are larger than 128, or no squares of a side that
    is divisible by 4; else it is theirs."""
    batch_pictures: int = 128
    """Pictures in one request."""
    image_encoding: str = "auto"
    """How pictures travel: raw, png (lossless), jpeg, webp; auto: png where that is small, else jpeg."""
    image_quality: int = 95
    """Of jpeg and webp, 1 to 100; of auto the most."""
    held_out_fraction: float = 0.02
    """Part of the answers kept out of training, to measure agreement on."""
    wait_seconds: float = 600.0
    """How long the teacher may be away."""
    tls_ca: str = ""
    """Authority of the teacher's certificate, PEM."""
    tls_cert: str = ""
    """This device's own certificate, for a teacher that wants one, PEM; without a key it says whose account it is."""
    tls_key: str = ""
    """Its private key, PEM."""
    insecure: bool = False
    """Let the key travel unencrypted beyond loopback."""
    deprivatize: DeprivatizeConfig = DeprivatizeConfig()
    distill: DistillConfig = DistillConfig()
    adapt: AdaptConfig = AdaptConfig()
    kserve: KServeConfig = KServeConfig()
    """Section ``[teacher]``, where the address may stand too, as ``address``."""


class ConfigError(Exception):
    """A configuration that cannot be meant, in one line: where, expected, got."""


PHASES = ("deprivatize", "distill", "adapt")
PRESETS = ("photographs",)
"""Settings by name, each a file in presets."""
IMAGE_ENCODINGS = ("auto", "raw", "png", "jpeg", "webp")
REMOVED = {"distill": {"attributed_weight": 0.0}}
"""Settings of former versions, and what switched them off: a run.toml of those says so, and is still good."""
SECTIONS: dict[str, type] = {"deprivatize": DeprivatizeConfig, "distill": DistillConfig, "adapt": AdaptConfig}


def build_config(*layers: Mapping[str, Any]) -> RunConfig:
    """One config from layers such as a TOML file and flags; later ones win, sections are merged.

    Raises ConfigError for an unknown key, a value of another type, or a missing ``images``.
    """
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    tensors: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name == "teacher" and isinstance(value, Mapping):
                tensors.update({key: entry for key, entry in value.items() if key != "address"})
                top |= {"teacher": value["address"]} if "address" in value else {}
            elif name == "kserve":
                raise ConfigError("kserve: expected the section [teacher], got this one")
            elif name in SECTIONS:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{name}: expected a section [{name}], got {value!r}")
                former = REMOVED.get(name, {})
                sections[name].update({key: entry for key, entry in value.items() if former.get(key) != entry})
            else:
                top[name] = value
    if not top.get("images"):
        raise ConfigError("images: expected a folder of pictures, or digits, mnist or cifar10; give --images")
    built = {name: _section(SECTIONS[name], values, f"{name}.") for name, values in sections.items()}
    built["kserve"] = _section(KServeConfig, tensors, "teacher.")
    config: RunConfig = _section(RunConfig, top | built, "")
    _check_ranges(config)
    _check_text("", as_layers(config))
    return config


def as_layers(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, as ``run.toml`` holds it and ``build_config`` reads it."""
    layers = asdict(config)
    del layers["kserve"]
    given = given_settings(config.kserve)
    if given:  # TOML has no place for a section beside a value of the same name
        layers["teacher"] = {"address": config.teacher, **given}
    return layers


def given_settings(tensors: KServeConfig) -> dict[str, Any]:
    """The entries of ``[teacher]`` that were given, as plain values."""
    named = asdict(tensors).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in named if value}


def generator_in_use(config: DeprivatizeConfig) -> dict[str, Any]:
    """The settings that decide what phase 1 makes, as plain values."""
    return {name: value for name, value in asdict(config).items() if name not in NO_MATTER[config.generator]}


def in_use(config: DistillConfig, *, mixes: bool) -> dict[str, Any]:
    """The settings that the student depends on, as plain values; `mixes`: whether it learns from such.

    Without those of a switch that is off, so that a student trained before there was such a switch is not trained
    again.
    """
    off = {name for name in ("balance_answers", "balance_pictures") if not getattr(config, name)}
    if not mixes or config.mosaic_fraction == 0:
        off.add("mosaic_fraction")
    if not config.assistant:
        off |= {"assistant", "assistant_passes", "assistant_generations", "assistant_weight"}
    if config.assistant_generations == 1:
        off.add("assistant_generations")
    if config.local_weight == 0:
        off |= {"local_weight", "local_start_fraction"} | (set() if config.assistant else {"local_batch_count"})
    return {name: value for name, value in asdict(config).items() if name not in off}


def idle_settings(config: RunConfig) -> list[str]:
    """The settings that are not at their defaults and yet change nothing, by their full names."""
    kind = config.deprivatize.generator
    used = in_use(config.distill, mixes=kind == "mixes")
    generators = {*NO_MATTER[kind], *(_MIXES_IGNORE if kind == "mixes" else ())}
    if config.deprivatize.im_queries == 0:
        generators.add("im_weight")
    students = {field.name for field in fields(DistillConfig)} - used.keys()
    if config.distill.image_weight == 0:
        students.add("image_fraction")
    found = []
    for section, idle in (("deprivatize", generators - {"generator"}), ("distill", students)):
        own = getattr(config, section)
        found += [f"{section}.{name}" for name in sorted(idle) if getattr(own, name) != getattr(type(own)(), name)]
    return found


def preset_layer(name: str) -> dict[str, Any]:
    """One of `PRESETS`, as a layer."""
    return tomllib.loads((resources.files("edge_agent") / "presets" / f"{name}.toml").read_text("utf-8"))


def differing(config: RunConfig, layer: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings in a layer of sections that the config has other values of, by their full names."""
    return [
        f"{section}.{name}"
        for section, values in layer.items()
        for name, value in values.items()
        if getattr(getattr(config, section), name) != value
    ]


def parse_setting(text: str) -> dict[str, Any]:
    """``distill.passes=20`` as a layer. The value is TOML; bare words are text. Raises ConfigError."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set: expected NAME=VALUE, for example distill.passes=20; got {text!r}")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    section, dot, key = name.strip().rpartition(".")
    return {section: {key: parsed}} if dot else {key: parsed}


def _section(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    for name, value in values.items():
        if name not in known:
            names = ", ".join(each for each in known if each != "kserve")  # that one is a section, [teacher]
            raise ConfigError(f"{prefix}{name}: expected one of {names}; got an unknown name")
        wanted = known[name].type
        if wanted == _NUMBERS:
            if not _are_numbers(value):
                raise ConfigError(f"{prefix}{name}: expected a number or a list of numbers, got {value!r}")
            continue
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"{prefix}{name}: expected {_KINDS_OF_VALUES[wanted]}, got {value!r}")
    return kind(**{name: _as_kept(value, known[name].type) for name, value in values.items()})


_NUMBERS = tuple[float, ...]
_KINDS_OF_VALUES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _are_numbers(value: Any) -> bool:
    return all(type(number) in (int, float) for number in (value if isinstance(value, list | tuple) else (value,)))


def _as_kept(value: Any, wanted: Any) -> Any:
    """A whole number is fine where a real one is wanted, and one number where there may be several."""
    if wanted == _NUMBERS:
        return tuple(float(number) for number in (value if isinstance(value, list | tuple) else (value,)))
    return float(value) if wanted is float else value


def _check_ranges(config: RunConfig) -> None:
    first, distill, adapt = config.deprivatize, config.distill, config.adapt
    _check_kserve(config)
    gan = first.generator == "gan"
    without = (
        f"0 with deprivatize.generator = {first.generator}, which makes no picture of an answer; give that, or gan"
    )
    for name, fine, expected in (
        ("run_dir", config.run_dir != "", "a folder"),
        ("budget", config.budget >= 1, "1 or more"),
        ("batch_pictures", config.batch_pictures >= 1, "1 or more"),
        ("image_encoding", config.image_encoding in IMAGE_ENCODINGS, " or ".join(IMAGE_ENCODINGS)),
        ("image_quality", 1 <= config.image_quality <= 100, "1 to 100"),
        ("local_pictures", config.local_pictures >= 0, "0 (all) or more"),
        ("image_size", 8 <= config.image_size <= 128 and config.image_size % 4 == 0, "8 to 128, divisible by 4"),
        ("held_out_fraction", 0 <= config.held_out_fraction <= 0.5, "0 to 0.5"),
        ("wait_seconds", config.wait_seconds >= 0, "0 or more"),
        ("tls_cert", bool(config.tls_cert) == bool(config.tls_key), "it and tls_key, or neither"),
        ("tls_cert", not config.tls_cert or bool(config.tls_ca) or "://" in config.teacher, "tls_ca with it"),
        ("seed", 0 <= config.seed < 2**31, "0 to 2147483647"),
        ("deprivatize.generator", first.generator in NO_MATTER, " or ".join(NO_MATTER)),
        ("deprivatize.latent_channels", first.latent_channels >= 1, "1 or more"),
        ("deprivatize.mix_regions", 2 <= first.mix_regions <= 32, "2 to 32"),
        ("deprivatize.mix_pictures", 2 <= first.mix_pictures <= 64, "2 to 64"),
        ("deprivatize.mix_noise", 0 <= first.mix_noise < math.inf, "0 or more"),
        ("deprivatize.drawing_steps", 2 <= first.drawing_steps <= 1000, "2 to 1000"),
        ("distill.image_weight", gan or distill.image_weight == 0, without),
        ("deprivatize.im_queries", gan or first.im_queries == 0, without),
        ("deprivatize.steps", first.steps >= 1, "1 or more"),
        ("deprivatize.batch_count", first.batch_count >= 2, "2 or more"),
        ("deprivatize.generator_width", first.generator_width >= 1, "1 or more"),
        ("deprivatize.discriminator_width", first.discriminator_width >= 1, "1 or more"),
        ("deprivatize.noise_count", first.noise_count >= 0, "0 or more"),
        ("deprivatize.generator_learning_rate", 0 < first.generator_learning_rate <= 1, "above 0, to 1"),
        (
            "deprivatize.discriminator_learning_rate",
            0 < first.discriminator_learning_rate <= 1,
            "above 0, to 1",
        ),
        ("deprivatize.ema_decay", 0 <= first.ema_decay < 1, "0 to below 1"),
        ("deprivatize.recolour_strength", 0 <= first.recolour_strength <= 1, "0 to 1"),
        ("deprivatize.shift_fraction", 0 <= first.shift_fraction <= 1, "0 to 1"),
        ("deprivatize.loss", first.loss in ("hinge", "bce"), "hinge or bce"),
        ("deprivatize.im_queries", first.im_queries >= 0, "0 or more"),
        ("deprivatize.im_weight", 0 <= first.im_weight < math.inf, "0 or more"),
        ("deprivatize.cutout_fraction", 0 <= first.cutout_fraction <= 1, "0 to 1"),
        ("distill.passes", distill.passes >= 1, "1 or more"),
        ("distill.batch_count", distill.batch_count >= 2, "2 or more"),
        ("distill.learning_rate", 0 < distill.learning_rate <= 10, "above 0, to 10"),
        ("distill.warmup_fraction", 0 <= distill.warmup_fraction < 1, "0 to below 1"),
        ("distill.momentum", 0 < distill.momentum < 1, "above 0, below 1"),
        ("distill.weight_decay", 0 <= distill.weight_decay <= 1, "0 to 1"),
        ("distill.ema_decay", 0 <= distill.ema_decay < 1, "0 to below 1"),
        ("distill.temperature", 0 < distill.temperature <= 100, "above 0, to 100"),
        ("distill.label_smoothing", 0 <= distill.label_smoothing <= 1, "0 to 1"),
        ("distill.image_weight", 0 <= distill.image_weight < math.inf, "0 or more"),
        ("distill.image_fraction", 0 <= distill.image_fraction <= 1, "0 to 1"),
        ("distill.shift_px", 0 <= distill.shift_px <= 128, "0 to 128"),
        ("distill.mosaic_fraction", 0 <= distill.mosaic_fraction <= 1, "0 to 1"),
        ("distill.assistant_passes", distill.assistant_passes >= 1, "1 or more"),
        ("distill.assistant_generations", 1 <= distill.assistant_generations <= 10, "1 to 10"),
        ("distill.assistant_weight", 0 < distill.assistant_weight < math.inf, "above 0"),
        ("distill.local_weight", 0 <= distill.local_weight < math.inf, "0 or more"),
        ("distill.local_start_fraction", 0 <= distill.local_start_fraction < 1, "0 to below 1"),
        ("distill.local_batch_count", distill.local_batch_count >= 2, "2 or more"),
        ("adapt.memory_count", adapt.memory_count >= 1, "1 or more"),
        ("adapt.memory_bytes", 2**16 <= adapt.memory_bytes <= 4_000_000, "65536 to 4000000"),
        ("adapt.neighbour_count", adapt.neighbour_count >= 0, "0 or more"),
        ("adapt.recent_count", 0 <= adapt.recent_count <= 100_000, "0 to 100000"),
        ("adapt.strength", 0 <= adapt.strength <= 100, "0 to 100"),
        ("adapt.iterations", adapt.iterations >= 0, "0 or more"),
    ):
        if not fine:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _check_text(name: str, value: object) -> None:
    """A path that is not UTF-8 comes in from the command line, and cannot be written into run.toml."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_text(f"{name}.{key}" if name else key, entry)
    elif isinstance(value, str) and not _is_utf_8(value):
        raise ConfigError(f"{name}: expected text in UTF-8, got {value!r}; give the file or folder another name")


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_kserve(config: RunConfig) -> None:
    tensors = config.kserve
    if tensors != KServeConfig() and "://" not in config.teacher:
        raise ConfigError(
            f"teacher: expected an address kserve://HOST:PORT/MODEL with a section [teacher], got {config.teacher!r}"
        )
    for name, fine, expected in (
        ("layout", tensors.layout in ("", "NCHW", "NHWC"), "NCHW or NHWC"),
        ("channels", tensors.channels in (0, 1, 3), "1 or 3"),
        ("height", tensors.height >= 0, "1 or more"),
        ("width", tensors.width >= 0, "1 or more"),
        ("scale", 0 <= tensors.scale < math.inf, "a number above 0, 255 or 1 as a rule"),
        ("mean", len(tensors.mean) in (0, 1, 3) and all(map(math.isfinite, tensors.mean)), "1 or 3 numbers"),
        ("std", len(tensors.std) in (0, 1, 3) and all(0 < s < math.inf for s in tensors.std), "1 or 3 above 0"),
        (
            "output_kind",
            tensors.output_kind in ("", "logits", "probabilities", "labels"),
            "logits, probabilities or labels",
        ),
        ("classes", tensors.classes == 0 or tensors.classes >= 2, "2 or more"),
    ):
        if not fine:
            raise ConfigError(f"teacher.{name}: expected {expected}, got {getattr(tensors, name)!r}")
