"""The agent's own decisions, without a teacher: what it trains, on what, and what is never written down."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from edge_agent import agent as agents
from edge_agent import training
from edge_agent.agent import Agent
from edge_agent.console import Console
from edge_agent.dealings import Dealings
from edge_agent.distill import Pool
from edge_agent.egress import CopiesStopped
from edge_agent.failures import BadInput, TeacherAway
from edge_agent.generators import to_content
from edge_agent.pixels import normalise
from edge_agent.runs import RunFolder
from edge_agent.teacher import Description
from networks.gan import Generator
from networks.mixes import Mixes
from tests.edge_agent.agent_parts import agent, asked, description, mixes, plan_one
from tests.edge_agent.conftest import COUNT


def test_student_whose_training_ran_away_is_not_written(tmp_path, pictures_NHW, monkeypatch):
    with RunFolder(tmp_path / "run") as folder:
        made = asked(folder, tmp_path, pictures_NHW)

        def ran_away(student, *parts, **options):
            student.linear.weight.data.fill_(float("nan"))
            return student

        monkeypatch.setattr(training, "train_student", ran_away)
        with pytest.raises(BadInput, match=r"no longer numbers.*--set distill\.learning_rate=0\.01"):
            made.distill()
        assert not folder.has("student.pt")
        assert made.write_summary()["phases_done"] == ["deprivatize"]


def test_generator_whose_training_ran_away_is_not_written_and_so_buys_nothing(tmp_path, pictures_NHW, monkeypatch):
    def ran_away(*parts, **options):
        made = Generator(class_count=2, noise_count=3, side=8, channels=1, width=4)
        next(made.parameters()).data.fill_(float("nan"))
        return made

    monkeypatch.setattr(agents, "train_generator", ran_away)
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(8, 8))
        made.prepare()
        with pytest.raises(BadInput, match=r"the generator ran away.*--set deprivatize\.generator_learning"):
            made.deprivatize()
        assert not folder.has("generator.pt")
        assert made.write_summary()["phases_done"] == []


def test_all_local_pictures_reach_the_training_and_the_student_is_trained_again_when_they_begin_to_count(
    tmp_path, pictures_NHW, monkeypatch
):
    seen = []

    def noting(student, *parts, local_NCHW, config, **options):
        seen.append((config.local_weight, local_NCHW.numpy()))
        return student.eval()

    monkeypatch.setattr(training, "train_student", noting)
    with RunFolder(tmp_path / "run") as folder:
        asked(folder, tmp_path, pictures_NHW).distill()
        agent(folder, tmp_path, description(8, 8), budget=4, distill={"local_batch_count": 8}).distill()
        assert len(seen) == 1  # a setting of a switch that is off
        agent(folder, tmp_path, description(8, 8), budget=4, distill={"local_weight": 1.0}).distill()
    assert [weight for weight, _ in seen] == [0.0, 1.0]
    assert np.array_equal(seen[1][1], pictures_NHW[:, None])


def test_the_student_is_given_the_assistant_of_its_answers_and_what_that_learnt_from_is_what_it_learns_from(
    tmp_path, pictures_NHW, monkeypatch
):
    seen, made, assistant = {}, mixes(), torch.nn.Linear(1, 1)

    def asking(folder, lessons, *, learnt_from):
        seen.update(folder=folder, pool=lessons.pool, mixed=lessons.mixed_MCHW, learnt_from=learnt_from)
        return assistant

    def noting(student, generator, pool, *, assistant, mixed_MCHW, local_NCHW, **options):
        seen.update(given=assistant, students_pool=pool, students_mixed=mixed_MCHW, local=local_NCHW)
        return student.eval()

    monkeypatch.setattr(agents, "assistant_of", asking)
    monkeypatch.setattr(training, "train_student", noting)
    settings = {"deprivatize": {"generator": "mixes"}, "distill": {"image_weight": 0, "assistant": "resnet14"}}
    with RunFolder(tmp_path / "run") as folder:
        asked(folder, tmp_path, pictures_NHW, made, **settings, held_out_fraction=0.25).distill()
        assert seen["learnt_from"].keys() == {"held out", "generator", "answers"}
        assert seen["learnt_from"]["generator"] == folder.digest("generator.pt")
    assert seen["given"] is assistant and seen["folder"] is folder
    assert seen["pool"] is seen["students_pool"] and len(seen["pool"]) == 3  # one is held out
    assert seen["mixed"] is seen["students_mixed"] and len(seen["mixed"]) == 56
    assert len(seen["local"]) == COUNT


def test_answers_that_train_are_balanced_where_the_settings_say_so_and_those_held_out_stay_as_they_were_sold(
    tmp_path, pictures_NHW, monkeypatch
):
    """The agreement is with the teacher, not with what was made of its answers."""
    seen = []
    bought = Pool(
        images_NCHW=torch.from_numpy(pictures_NHW[:4, None]),
        latents_NL=torch.zeros(4, 5),
        probabilities_NK=torch.tensor([[0.99, 0.01], [0.9, 0.1], [0.98, 0.02], [0.6, 0.4]]),
    )

    def always_the_first(student, generator, pool, **options):
        seen.append(pool.probabilities_NK)
        student.linear.weight.data.zero_()
        student.linear.bias.data = torch.tensor([1.0, 0.0])
        return student.eval()

    monkeypatch.setattr(agents.pools, "load_pool", lambda *parts, **options: bought)
    monkeypatch.setattr(training, "train_student", always_the_first)
    with RunFolder(tmp_path / "run") as folder:
        asked(folder, tmp_path, pictures_NHW, held_out_fraction=0.5).distill()
        balancing = {"distill": {"balance_answers": True}, "held_out_fraction": 0.5, "budget": 4}
        agent(folder, tmp_path, description(8, 8), **balancing).distill()
        assert folder.journal.fact("agreement_synthetic") == 1.0 and folder.journal.fact("held_out") == 2
    sold_NK, balanced_NK = seen
    assert torch.equal(sold_NK, bought.probabilities_NK[:2])
    assert balanced_NK.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_balancing_the_answers_of_a_label_only_teacher_is_refused(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        made = asked(folder, tmp_path, pictures_NHW, distill={"balance_answers": True})
        with pytest.raises(BadInput, match=r"distill\.balance_answers: .*got class indices; set it to false"):
            made.distill()


@pytest.mark.parametrize("kind", ["gan", "diffusion", "mixes"])
def test_the_reference_never_trains_the_generator(tmp_path, pictures_NHW, monkeypatch, kind):
    seen = []

    def noting(images_NCHW, **options):
        seen.append(images_NCHW)
        return Generator(class_count=2, noise_count=3, side=8, channels=1, width=4)

    trains = {"gan": "train_generator", "diffusion": "train_diffusion", "mixes": "train_mixes"}
    monkeypatch.setattr(agents, trains[kind], noting)
    with RunFolder(tmp_path / "run") as folder:
        settings = {"deprivatize": {"generator": kind}, "distill": {"image_weight": 0}}
        made = agent(folder, tmp_path, description(8, 8), **settings)
        made.prepare()
        made.deprivatize()
        _, reference_NCHW = made._local.split
        trained = {image.numpy().tobytes() for image in seen[0]}
        reference = {image.numpy().tobytes() for image in reference_NCHW}
        assert (len(trained), len(reference), trained & reference) == (56, 8, set())


def test_answers_to_mixes_that_were_paid_for_before_plans_were_kept_are_good_without(tmp_path, pictures_NHW):
    settings = {"deprivatize": {"generator": "mixes"}, "distill": {"image_weight": 0, "mosaic_fraction": 0.5}}
    with RunFolder(tmp_path / "run") as folder:
        asked(folder, tmp_path, pictures_NHW, mixes(), latents=b"", **settings).distill()
        assert folder.has("student.pt")


def test_the_student_is_given_the_pictures_that_the_mixes_are_of_in_their_order(tmp_path, pictures_NHW, monkeypatch):
    seen, made = {}, mixes()

    def noting(student, *parts, mixed_MCHW, **options):
        seen["by the student"] = mixed_MCHW
        return student.eval()

    monkeypatch.setattr(agents, "train_mixes", lambda images_NCHW, **options: seen.update({"by mixes": images_NCHW}))
    monkeypatch.setattr(training, "train_student", noting)
    settings = {"deprivatize": {"generator": "mixes"}, "distill": {"image_weight": 0}}
    with RunFolder(tmp_path / "run") as folder:
        agent(folder, tmp_path, description(8, 8), **settings)._train_generator(None, None)
        asked(folder, tmp_path, pictures_NHW, made, **settings).distill()
    assert torch.equal(seen["by the student"], seen["by mixes"])


def test_a_summary_does_without_pictures_that_went_away_while_the_run_worked(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(20, 30), image_size=8)
        made.prepare()
        plan_one(folder, pictures_NHW)
        (tmp_path / "pictures").rename(tmp_path / "elsewhere")
        assert made.write_summary()["private_images_sent"] == 0
        # One that never read them does not know.
        assert agent(folder, tmp_path, description(20, 30)).write_summary()["private_images_sent"] is None


@pytest.mark.parametrize(("ended", "counted"), [(KeyboardInterrupt, None), (TeacherAway, 0)])
def test_a_run_that_a_signal_ends_does_not_stay_to_decode_all_it_has_sent(
    tmp_path, pictures_NHW, monkeypatch, ended: type[BaseException], counted: int | None
) -> None:
    def end(_: Agent) -> None:
        raise ended("over")

    with RunFolder(tmp_path / "run") as folder:
        config = asked(folder, tmp_path, pictures_NHW)._config
    monkeypatch.setattr(Agent, "ask", end)
    with pytest.raises(ended):
        agents.run(config, ("ask",), api_key=None, console=Console(quiet=True))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["private_images_sent"], summary["left_out"], summary["queries"]["charged"]) == (
        counted,
        counted,
        4,
    )


def test_a_generator_that_copies_leaves_the_answers_that_are_paid_to_train_on(tmp_path, pictures_NHW, monkeypatch):
    def stopped(*_: object) -> None:
        raise CopiesStopped("it has copied")

    with RunFolder(tmp_path / "run") as folder:
        made = asked(folder, tmp_path, pictures_NHW)
        monkeypatch.setattr(Agent, "_ask", stopped)
        with pytest.raises(
            CopiesStopped, match=r"^it has copied; or give --budget 4 to train on the answers that are"
        ):
            made.ask()
    with RunFolder(tmp_path / "empty") as folder:
        none = agent(folder, tmp_path, description(8, 8))
        folder.write_tensors("generator.pt", to_content(made._generator()))
        folder.finish("deprivatize", none._binding.generators_inputs())
        with pytest.raises(CopiesStopped, match=r"^it has copied$"):
            none.ask()


def test_copies_of_an_autoencoder_are_stopped_before_the_teacher_is_asked(tmp_path, pictures_NHW, monkeypatch):
    """All of a mix from one picture, and no noise."""

    class Copier(Mixes):
        """A decoder that has learnt everything by heart: the latent is the picture."""

        def forward(self, latents_NZhw):
            return latents_NZhw.reshape(len(latents_NZhw), 1, 8, 8)

    def by_heart(images_NCHW, *, config, **options):
        shape = {"side": 8, "channels": 1, "width": 4, "latent_channels": 16, "view_count": 1}
        chosen = {"mix_pictures": 1, "mix_regions": 1, "mix_noise": 0.0}
        copier = Copier(picture_count=len(images_NCHW), **shape, **chosen)
        copier.latents_VMZhw[:] = normalise(images_NCHW).reshape(1, -1, 16, 2, 2)
        return copier.eval()

    monkeypatch.setattr(agents, "train_mixes", by_heart)
    monkeypatch.setattr(
        Agent, "_generator", lambda made: by_heart(made._local.split[0], config=made._config.deprivatize)
    )
    with RunFolder(tmp_path / "run") as folder:
        mixing = {"generator": "mixes"}
        made = agent(folder, tmp_path, description(8, 8), deprivatize=mixing, distill={"image_weight": 0})
        made.prepare()
        made.deprivatize()
        monkeypatch.setattr(Dealings, "teacher", lambda dealings: pytest.fail("the teacher was asked"))
        with pytest.raises(CopiesStopped, match=r"^2000 of 2000 synthetic pictures"):
            made.distill()
        assert folder.journal.totals().planned_pictures == 0


def test_a_diffusion_model_of_few_pictures_seen_often_is_warned_of(tmp_path, pictures_NHW, monkeypatch, capsys):
    monkeypatch.setattr(agents, "train_diffusion", lambda *_, **__: None)
    for steps, warned in ((agents.MOST_SIGHTS // 2, False), (2 * agents.MOST_SIGHTS, True)):
        settings = {"generator": "diffusion", "steps": steps, "batch_count": COUNT}
        with RunFolder(tmp_path / f"run-{steps}") as folder:
            chosen = agent(folder, tmp_path, description(8, 8), deprivatize=settings, distill={"image_weight": 0.0})
            chosen._train_generator(None, None)
        said = capsys.readouterr()
        assert ("may learn copies" in said.out + said.err) is warned


def test_a_description_of_another_versions_journal_is_read(tmp_path):
    kept = asdict(description(8, 8)) | {"labels": ["a", "b"], "of a later version": 1}
    del kept["indices_only"]
    assert Description.from_facts(kept) == description(8, 8)
