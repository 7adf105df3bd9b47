import tomllib

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import (
    ConfigError,
    DistillConfig,
    RunConfig,
    as_layers,
    build_config,
    idle_settings,
    in_use,
    parse_setting,
)

K = {"address": "kserve://127.0.0.1:8001/m"}


def test_later_layers_win_and_sections_are_merged():
    config = build_config(
        {"images": "a", "budget": 5, "distill": {"passes": 2, "momentum": 0.5}},
        {"budget": 7},
        {"distill": {"passes": 3}},
    )
    assert (config.images, config.budget, config.distill.passes, config.distill.momentum) == ("a", 7, 3, 0.5)
    assert config.distill.learning_rate == DistillConfig().learning_rate


def test_resolved_config_reads_back_as_itself():
    config = build_config(
        {"images": "digits", "distill": {"passes": 9, "image_weight": 0}, "deprivatize": {"generator": "mixes"}}
    )
    assert build_config(tomllib.loads(tomli_w.dumps(as_layers(config)))) == config


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"images": "a", "bugdet": 5}, "bugdet"),
        ({"images": "a", "distill": {"pases": 5}}, r"distill\.pases"),
        ({"images": "a", "budget": "many"}, "budget: expected a whole number, got 'many'"),
        ({"images": "a", "budget": 1.5}, "budget: expected a whole number, got 1.5"),
        ({"images": "a", "insecure": 1}, "insecure: expected true or false, got 1"),
        ({"images": "a", "distill": 3}, r"expected a section \[distill\]"),
        ({"images": "a", "budget": 0}, "budget: expected 1 or more, got 0"),
        ({"images": "a", "image_size": 30}, "image_size: expected 8 to 128"),
        ({"images": "a", "distill": {"passes": 0}}, r"distill\.passes: expected 1 or more"),
        ({"images": "a", "run_dir": ""}, "run_dir: expected a folder, got ''"),
        ({"images": "a", "distill": {"batch_count": 0}}, r"distill\.batch_count: expected 2 or more"),
        ({"images": "a", "distill": {"momentum": 0.0}}, r"distill\.momentum: expected above 0"),
        ({"images": "a", "distill": {"learning_rate": float("nan")}}, r"distill\.learning_rate: expected above 0"),
        ({"images": "a", "distill": {"temperature": 0.0}}, r"distill\.temperature: expected above 0"),
        ({"images": "a", "distill": {"local_weight": -1}}, r"distill\.local_weight: expected 0 or more"),
        (
            {"images": "a", "distill": {"local_start_fraction": 1}},
            r"distill\.local_start_fraction: .*below 1, got 1\.0",
        ),
        ({"images": "a", "distill": {"local_batch_count": 1}}, r"distill\.local_batch_count: expected 2 or more"),
        ({"images": "a", "deprivatize": {"noise_count": -1}}, r"deprivatize\.noise_count: expected 0 or more"),
        (
            {"images": "a", "deprivatize": {"generator": "vae"}},
            r"deprivatize\.generator: expected gan or diffusion or mixes",
        ),
        ({"images": "a", "deprivatize": {"mix_regions": 0}}, r"deprivatize\.mix_regions: expected 2 to 32"),
        ({"images": "a", "deprivatize": {"drawing_steps": 1}}, r"deprivatize\.drawing_steps: expected 2 to 1000"),
        (
            {"images": "a", "deprivatize": {"generator": "diffusion"}},
            r"distill\.image_weight: expected 0 with .*diffusion, .*give that, or gan, got 1\.0",
        ),
        ({"images": "a", "deprivatize": {"mix_noise": -0.1}}, r"deprivatize\.mix_noise: expected 0 or more"),
        (
            {"images": "a", "deprivatize": {"generator": "mixes"}},
            r"distill\.image_weight: expected 0 with .*mixes, .*give that, or gan, got 1\.0",
        ),
        (
            {"images": "a", "deprivatize": {"generator": "mixes", "im_queries": 5}, "distill": {"image_weight": 0}},
            r"deprivatize\.im_queries: expected 0 with .*mixes, .*got 5",
        ),
        ({"images": "a", "adapt": {"strength": 101}}, r"adapt\.strength: expected 0 to 100"),
        ({"images": "a", "adapt": {"strength": -0.5}}, r"adapt\.strength: expected 0 to 100"),
        ({"images": "a", "adapt": {"recent_count": -1}}, r"adapt\.recent_count: expected 0 to 100000"),
        ({"images": "a", "adapt": {"recent_count": 100_001}}, r"adapt\.recent_count: expected 0 to 100000"),
        ({"images": "a", "adapt": {"memory_bytes": 2**23}}, r"adapt\.memory_bytes: expected 65536 to 4000000"),
        ({"images": "a", "teacher": {"layuot": "NCHW"}}, r"teacher\.layuot"),
        ({"images": "a", "teacher": 5}, "teacher: expected text, got 5"),
        ({"images": "a", "teacher": {"address": 5}}, "teacher: expected text, got 5"),
        ({"images": "a", "teacher": {"layout": "NCHW"}}, r"expected an address kserve://HOST:PORT/MODEL"),
        ({"images": "a", "kserve": {}}, r"expected the section \[teacher\]"),
        ({"images": "a", "teacher": K | {"layout": "CHW"}}, r"teacher\.layout: expected NCHW or NHWC, got 'CHW'"),
        ({"images": "a", "teacher": K | {"mean": "0.5"}}, r"teacher\.mean: expected a number or a list of numbers"),
        ({"images": "a", "teacher": K | {"mean": [0.5, 0.5]}}, r"teacher\.mean: expected 1 or 3 numbers"),
        ({"images": "a", "teacher": K | {"std": [0.0]}}, r"teacher\.std: expected 1 or 3 above 0"),
        ({"images": "a", "teacher": K | {"mean": float("nan")}}, r"teacher\.mean"),
        ({"images": "a", "teacher": K | {"scale": -1}}, r"teacher\.scale"),
        ({"images": "a", "teacher": K | {"scale": float("inf")}}, r"teacher\.scale"),
        ({"images": "a", "teacher": K | {"channels": 4}}, r"teacher\.channels: expected 1 or 3"),
        ({"images": "a", "teacher": K | {"height": -1}}, r"teacher\.height"),
        ({"images": "a", "teacher": K | {"width": -1}}, r"teacher\.width"),
        ({"images": "a", "teacher": K | {"classes": 1}}, r"teacher\.classes: expected 2 or more"),
        ({"images": "a", "teacher": K | {"output_kind": "scores"}}, r"teacher\.output_kind: expected logits"),
        ({}, "--images"),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_names_it(layer, said):
    with pytest.raises(ConfigError, match=said) as error:
        build_config(layer)
    assert "\n" not in str(error.value)


def test_address_and_section_of_a_teacher_come_together_and_read_back():
    section = {"address": "kserve://h:1/m", "layout": "NHWC", "mean": 0.5, "std": [1, 2, 3], "scale": 1}
    config = build_config(
        {"images": "a", "teacher": section}, {"teacher": "kserve://h:2/m"}, {"teacher": {"scale": 255}}
    )
    assert (config.teacher, config.kserve.layout, config.kserve.scale) == ("kserve://h:2/m", "NHWC", 255.0)
    assert (config.kserve.mean, config.kserve.std) == ((0.5,), (1.0, 2.0, 3.0))
    assert build_config(tomllib.loads(tomli_w.dumps(as_layers(config)))) == config
    plain = build_config({"images": "a"})
    assert as_layers(plain)["teacher"] == "127.0.0.1:50051" and "kserve" not in as_layers(plain)


def test_a_whole_number_is_fine_where_a_real_one_is_wanted():
    config = build_config({"images": "a", "wait_seconds": 5})
    assert config.wait_seconds == 5.0 and isinstance(config.wait_seconds, float)


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("distill.passes=20", {"distill": {"passes": 20}}),
        ("seed=3", {"seed": 3}),
        ("student=resnet20", {"student": "resnet20"}),
        ("adapt.strength=0.5", {"adapt": {"strength": 0.5}}),
        ("insecure=true", {"insecure": True}),
        ("teacher.std=[1, 2.5, 3]", {"teacher": {"std": [1, 2.5, 3]}}),
    ],
)
def test_settings_are_read_as_toml_or_else_as_text(text, layer):
    assert parse_setting(text) == layer


@given(st.text().filter(lambda text: "=" not in text))
def test_setting_without_a_value_is_refused(text):
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        parse_setting(text)


def test_a_setting_of_a_former_version_is_read_where_it_was_off():
    former = {"images": "digits", "distill": {"attributed_weight": 0.0, "passes": 3}}
    assert build_config(former) == build_config({"images": "digits", "distill": {"passes": 3}})
    with pytest.raises(ConfigError, match=r"distill\.attributed_weight: expected one of"):
        build_config({"images": "digits", "distill": {"attributed_weight": 1.0}})


def test_a_switch_that_is_off_is_none_of_what_the_student_depends_on():
    plain = in_use(DistillConfig(), mixes=False)
    others = DistillConfig(local_batch_count=7, mosaic_fraction=0.25, assistant_passes=3, assistant_weight=2.0)
    assert in_use(others, mixes=False) == plain
    assert plain["passes"] == DistillConfig().passes and not {"balance_answers", "balance_pictures"} & plain.keys()
    assert in_use(others, mixes=True) == plain | {"mosaic_fraction": 0.25}
    assisted = {"assistant": "resnet20", "assistant_passes": 3, "assistant_weight": 2.0, "local_batch_count": 7}
    assert in_use(DistillConfig(**assisted), mixes=False) == plain | assisted
    for name in ("balance_answers", "balance_pictures"):
        assert in_use(DistillConfig(**{name: True}), mixes=False) == plain | {name: True}
    used = in_use(DistillConfig(local_weight=2.0, local_batch_count=7), mixes=False)
    assert used == plain | {"local_weight": 2.0, "local_start_fraction": 0.5, "local_batch_count": 7}


def test_settings_that_change_nothing_are_named():
    diffusion = {"deprivatize": {"generator": "diffusion", "noise_count": 10}, "distill": {"image_weight": 0.0}}
    idle = {"mosaic_fraction": 0.5, "assistant_passes": 7, "local_batch_count": 8}
    config = build_config({"images": "x"}, diffusion, {"distill": idle})
    assert idle_settings(config) == [
        "deprivatize.noise_count",
        "distill.assistant_passes",
        "distill.local_batch_count",
        "distill.mosaic_fraction",
    ]
    useful = {"deprivatize": {"generator": "mixes"}, "distill": {"assistant": "resnet20"}}
    useful["distill"]["image_weight"] = 0.0
    assert idle_settings(build_config({"images": "x"}, {"distill": idle}, useful)) == []
    assert idle_settings(build_config({"images": "x", "deprivatize": {"drawing_steps": 9}})) == [
        "deprivatize.drawing_steps"
    ]
    mixes = {"deprivatize": {"generator": "mixes", "noise_count": 9, "loss": "bce"}}
    of_nothing = {"deprivatize": {"im_weight": 0.1}, "distill": {"image_weight": 0.0, "image_fraction": 0.5}}
    assert idle_settings(build_config({"images": "x"}, mixes, of_nothing)) == [
        "deprivatize.im_weight",
        "deprivatize.noise_count",
        "distill.image_fraction",
    ]


def test_every_setting_is_documented():
    import ast
    import inspect

    import edge_agent.config as module

    tree = ast.parse(inspect.getsource(module))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and field.target.id not in ("deprivatize", "distill", "adapt"):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{field.target.id}"
    assert RunConfig(images="a").budget == 50_000
