import re
import tomllib

from edge_agent.config import KServeConfig, RunConfig, build_config
from edge_agent.manual import commented_defaults


def test_a_file_of_all_settings_sets_none_and_uncommented_sets_every_one_to_its_default() -> None:
    text = commented_defaults()
    assert build_config(tomllib.loads(text), {"images": "folder"}) == RunConfig(images="folder")
    own, of_kserve = re.sub(r"^#(?! )", "", text, flags=re.MULTILINE).split("[teacher]\n")
    found = build_config(tomllib.loads(own.replace('images = ""', 'images = "folder"')))
    assert found == RunConfig(images="folder")
    assert tomllib.loads(of_kserve).keys() == {"address", *KServeConfig.__dataclass_fields__}


def test_every_setting_is_explained() -> None:
    lines = commented_defaults().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"#\w+ = ", line)]
    assert len(settings) > 70
    assert all(lines[i - 1].startswith("# ") or lines[i].startswith("#address") for i in settings)
