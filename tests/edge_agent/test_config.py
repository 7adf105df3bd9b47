import tomllib

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import ConfigError, DistillConfig, RunConfig, as_layers, build_config, parse_setting


def test_later_layers_win_and_sections_are_merged():
    config = build_config(
        {"images": "a", "budget": 5, "distill": {"passes": 2, "momentum": 0.5}},
        {"budget": 7},
        {"distill": {"passes": 3}},
    )
    assert (config.images, config.budget, config.distill.passes, config.distill.momentum) == ("a", 7, 3, 0.5)
    assert config.distill.learning_rate == DistillConfig().learning_rate


def test_resolved_config_reads_back_as_itself():
    config = build_config({"images": "digits", "distill": {"passes": 9}})
    assert build_config(tomllib.loads(tomli_w.dumps(as_layers(config)))) == config


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"images": "a", "bugdet": 5}, "bugdet"),
        ({"images": "a", "distill": {"pases": 5}}, r"distill\.pases"),
        ({"images": "a", "budget": "many"}, "budget: expected a value of type int, got 'many'"),
        ({"images": "a", "budget": 1.5}, "budget: expected a value of type int"),
        ({"images": "a", "insecure": 1}, "insecure: expected a value of type bool"),
        ({"images": "a", "distill": 3}, r"expected a section \[distill\]"),
        ({"images": "a", "budget": 0}, "budget: expected 1 or more, got 0"),
        ({"images": "a", "image_size": 30}, "image_size: expected 8 to 128"),
        ({"images": "a", "distill": {"passes": 0}}, r"distill\.passes: expected 1 or more"),
        ({"images": "a", "run_dir": ""}, "run_dir: expected a folder, got ''"),
        ({"images": "a", "distill": {"batch_count": 0}}, r"distill\.batch_count: expected 2 or more"),
        ({"images": "a", "distill": {"momentum": 0.0}}, r"distill\.momentum: expected above 0"),
        ({"images": "a", "distill": {"learning_rate": float("nan")}}, r"distill\.learning_rate: expected above 0"),
        ({"images": "a", "distill": {"temperature": 0.0}}, r"distill\.temperature: expected above 0"),
        ({"images": "a", "deprivatize": {"noise_count": -1}}, r"deprivatize\.noise_count: expected 0 or more"),
        ({"images": "a", "adapt": {"strength": 2.0}}, r"adapt\.strength: expected 0 to below 2"),
        ({"images": "a", "adapt": {"memory_bytes": 2**23}}, r"adapt\.memory_bytes: expected 65536 to 4000000"),
        ({}, "--images"),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_names_it(layer, said):
    with pytest.raises(ConfigError, match=said) as error:
        build_config(layer)
    assert "\n" not in str(error.value)


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
    ],
)
def test_settings_are_read_as_toml_or_else_as_text(text, layer):
    assert parse_setting(text) == layer


@given(st.text().filter(lambda text: "=" not in text))
def test_setting_without_a_value_is_refused(text):
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        parse_setting(text)


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
