"""What a folder with answers is bound to, and what may still change before the first."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from edge_agent import data, privacy
from edge_agent.agent import Agent
from edge_agent.failures import RunFolderProblem
from edge_agent.journal import Batch
from edge_agent.runs import RunFolder
from tests.edge_agent.agent_parts import agent, description, plan_one


@pytest.mark.parametrize("before", ["another split", "a former version's, without one"])
def test_another_reference_than_the_paid_answers_were_bought_with_is_refused(
    tmp_path, pictures_NHW, monkeypatch, before
):
    with RunFolder(tmp_path / "run") as folder:
        agent(folder, tmp_path, description(8, 8)).prepare()
        if before == "another split":
            monkeypatch.setattr(privacy, "REFERENCE_FRACTION", 0.2)
        else:
            identity = folder.journal.fact("identity")
            folder.journal.set_facts(identity=dict(item for item in identity.items() if "reference" not in item[0]))
        agent(folder, tmp_path, description(8, 8)).prepare()  # nothing was asked yet: it may still change
        folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=1, request=b"x", latents=b""))
        agent(folder, tmp_path, description(8, 8)).prepare()
        if before == "another split":
            monkeypatch.undo()
        else:
            folder.journal.set_facts(identity=identity | {"reference pictures": None})
        with pytest.raises(RunFolderProblem, match=r"paid answers for other reference pictures: .*--run-dir"):
            agent(folder, tmp_path, description(8, 8)).prepare()


def test_a_run_whose_pictures_a_former_version_chose_otherwise_is_one_line(tmp_path, pictures_NHW, monkeypatch):
    for i in range(64):
        Image.fromarray(pictures_NHW[i] ^ 255).save(tmp_path / "pictures" / f"more-{i}.png")
    with RunFolder(tmp_path / "run") as folder:
        with monkeypatch.context() as former:
            permuted = np.random.default_rng(0).permutation(128).tolist()
            former.setattr(data, "_by_hash", lambda *_: permuted)
            agent(folder, tmp_path, description(8, 8), local_pictures=64).prepare()
        plan_one(folder, pictures_NHW)
        with pytest.raises(
            RunFolderProblem, match=r"^[^\n]*paid answers for other pictures: it began with 64[^\n]*--run-dir$"
        ):
            agent(folder, tmp_path, description(8, 8), local_pictures=64).prepare()


@pytest.mark.parametrize(
    ("kind", "named", "unnamed"),
    [  # a folder that was begun before there was diffusion goes on
        ("mixes", {"mix_noise", "noise_count"}, {"drawing_steps"}),
        ("diffusion", {"drawing_steps", "steps"}, {"mix_noise", "noise_count", "discriminator_width"}),
    ],
)
def test_settings_of_other_generators_are_no_part_of_an_identity(tmp_path, pictures_NHW, kind, named, unnamed):
    with RunFolder(tmp_path / "run") as folder:
        settings = {"deprivatize": {"generator": kind}, "distill": {"image_weight": 0}}
        agent(folder, tmp_path, description(8, 8), **settings).prepare()
        said = {name.removeprefix("deprivatize.") for name in folder.journal.fact("identity")}
        assert named | {"generator"} <= said and not unnamed & said


def test_settings_of_mixes_are_no_part_of_a_gans_identity(tmp_path, pictures_NHW):
    """A folder that was begun before there were mixes goes on."""
    with RunFolder(tmp_path / "run") as folder:
        agent(folder, tmp_path, description(8, 8)).prepare()
        identity = folder.journal.fact("identity")
        assert not {"deprivatize.generator", "deprivatize.mix_noise", "deprivatize.drawing_steps"} & identity.keys()
        other = {"deprivatize": {"generator": "mixes"}, "distill": {"image_weight": 0}}
        folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=1, request=b"x", latents=b""))
        with pytest.raises(RunFolderProblem, match=r"deprivatize\.generator: it began with 'gan', now it is 'mixes'"):
            agent(folder, tmp_path, description(8, 8), **other).prepare()


def test_paid_answers_to_mixes_are_no_answers_to_a_gan(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        mixes = {"deprivatize": {"generator": "mixes"}, "distill": {"image_weight": 0}}
        agent(folder, tmp_path, description(8, 8), **mixes).prepare()
        folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=1, request=b"x", latents=b""))
        with pytest.raises(RunFolderProblem, match=r"deprivatize\.generator: it began with 'mixes', now it is 'gan'"):
            agent(folder, tmp_path, description(8, 8)).prepare()


def test_other_weights_of_a_teacher_that_was_asked_nothing_leave_phase_1_as_it_is(tmp_path, pictures_NHW, capsys):
    def with_model(folder: RunFolder, model_digest: str, **deprivatize: object) -> Agent:
        made = agent(folder, tmp_path, replace(description(8, 8), model_digest=model_digest), deprivatize=deprivatize)
        made.prepare()
        return made

    with RunFolder(tmp_path / "run") as folder:
        folder.write_tensors("generator.pt", {"any": torch.zeros(1)})
        folder.finish("deprivatize", with_model(folder, "m")._binding.generators_inputs())
        folder.journal.set_facts(first_model=None)  # as former versions left it
        for digest in ("m2", "m3"):
            made = with_model(folder, digest)
            assert folder.done("deprivatize", made._binding.generators_inputs())
        assert "phase 1 replaces it" not in capsys.readouterr().err
        asked = with_model(folder, "m3", im_queries=640)
        assert not folder.done("deprivatize", asked._binding.generators_inputs()), (
            "this one asks about the weights of today"
        )
        plan_one(folder, pictures_NHW)
        with pytest.raises(RunFolderProblem, match="paid answers for other teacher's model"):
            with_model(folder, "m4")
