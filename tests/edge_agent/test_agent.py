"""The agent's own decisions, without a teacher: what the door knows, and what is never written down."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edge_agent import agent as agents
from edge_agent import privacy, training
from edge_agent.agent import Agent
from edge_agent.config import build_config
from edge_agent.console import Console
from edge_agent.distill import Pool
from edge_agent.egress import CopiesStopped
from edge_agent.failures import BadInput, RunFolderProblem
from edge_agent.generators import to_content
from edge_agent.journal import Batch
from edge_agent.pixels import normalise, resize
from edge_agent.runs import RunFolder
from edge_agent.teacher import Description
from networks.gan import Generator
from networks.mixes import Mixes
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

COUNT = 64


@pytest.fixture
def pictures_NHW(tmp_path: Path) -> np.ndarray:
    made = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(made):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02}.png")
    return made


def description(height: int, width: int) -> Description:
    return Description(
        model_digest="m", labels=("a", "b"), channels=1, height=height, width=width, max_batch_pictures=64
    )


def agent(folder: RunFolder, tmp_path: Path, teacher: Description, **settings: object) -> Agent:
    folder.journal.set_facts(teacher=asdict(teacher))
    config = build_config({"images": str(tmp_path / "pictures"), "run_dir": str(folder.path), **settings})
    return Agent(config, folder, None, Console(quiet=True))


def test_copies_made_at_the_generators_size_are_known_at_the_size_that_is_sent(tmp_path, pictures_NHW):
    """A generator that has learnt a picture by heart makes it at its own size; it is sent resized."""
    with RunFolder(tmp_path / "run") as folder:
        door = agent(folder, tmp_path, description(20, 30), image_size=8)._door
        copies_NCHW = resize(torch.from_numpy(pictures_NHW[:5, None]), 20, 30).numpy()
        assert door.matches(wire.Batch(images=codec.encode_images(copies_NCHW))) == 5
        others_NCHW = resize(torch.from_numpy(pictures_NHW[:5, None] ^ 1), 20, 30).numpy()
        assert door.matches(wire.Batch(images=codec.encode_images(others_NCHW))) == 0


@pytest.mark.parametrize(("height", "width", "side"), [(30, 30, 28), (32, 40, 32), (50, 70, 48), (224, 224, 64)])
def test_the_generator_makes_no_more_pixels_than_are_sent(tmp_path, height: int, width: int, side: int) -> None:
    """Or pictures could differ from local ones for the gate in what shrinking takes away."""
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(height, width))
        assert made._side == side
        folder.journal.set_facts(identity={"generator's side": 72})  # of a former version, which has paid with it
        assert made._side == side
        plan_one(folder, np.zeros((1, 8, 8), np.uint8))
        assert made._side == 72


def test_a_teacher_of_pictures_too_small_for_a_generator_is_refused(tmp_path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(BadInput, match=r"expected a teacher of pictures with 8 x 8 pixels or more, got 7 x 9"):
            agent(folder, tmp_path, description(7, 9)).prepare()


def plan_one(folder: RunFolder, pictures_NHW: np.ndarray) -> None:
    images = codec.encode_images(pictures_NHW[:1, None] ^ 1)
    request = wire.Batch(batch_id="a", images=images).SerializeToString()
    folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=1, request=request, latents=b""))


def asked(
    folder: RunFolder,
    tmp_path: Path,
    pictures_NHW: np.ndarray,
    generator: Generator | Mixes | None = None,
    latents: bytes | None = None,
    **settings: object,
) -> Agent:
    """An agent whose whole budget of four is asked and answered by a label-only teacher: only training is left."""
    made = agent(folder, tmp_path, description(8, 8), budget=4, **settings)
    generator = generator or Generator(class_count=2, noise_count=3, side=8, channels=1, width=4)
    folder.write_tensors("generator.pt", to_content(generator))
    images_NCHW = pictures_NHW[:4, None] ^ 1
    folder.finish("deprivatize", made._generators_inputs())
    request = wire.Batch(batch_id="a", images=codec.encode_images(images_NCHW)).SerializeToString()
    if latents is None:
        latents = np.zeros((4, generator.latent_count), "<f4").tobytes()
    folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=4, request=request, latents=latents))
    answer = wire.Answer(model_digest="m", charged_count=4, pixel_digest=codec.pixel_digest(images_NCHW))
    answer.class_indices.CopyFrom(codec.encode_class_indices(np.array([0, 1, 0, 1]), 2))
    folder.journal.keep_answer("a", answer=answer.SerializeToString(), charged_count=4, received_bytes=1)
    return made


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"deprivatize": {"generator": "mixes", "mix_pictures": 5}, "distill": {"image_weight": 0}},
            r"mix_pictures: expected one for each of 4 regions at most, got 5",
        ),
        ({"deprivatize": {"im_queries": 63}}, r"im_queries: expected the questions of one step \(64, .* got 63"),
        ({"deprivatize": {"im_queries": 64}, "batch_pictures": 63}, r"batch_pictures: expected 64 .* got 63"),
    ],
)
def test_counts_that_would_quietly_come_to_less_are_refused_until_answers_are_bound_to_them(
    tmp_path, pictures_NHW, settings, said
):
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(BadInput, match=said):
            agent(folder, tmp_path, description(8, 8), budget=200, **settings).prepare()
    with RunFolder(tmp_path / "former") as folder:
        made = agent(folder, tmp_path, description(8, 8), budget=200, **settings)
        plan_one(folder, pictures_NHW)
        made.prepare()


def test_a_shift_as_large_as_the_pictures_is_refused(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(8, 8), distill={"shift_px": 8})
        with pytest.raises(
            BadInput, match=r"distill\.shift_px: expected less than the side of the pictures, 8, got 8"
        ):
            made.prepare()


def test_an_assistant_of_no_known_architecture_is_refused(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(8, 8), distill={"assistant": "resnet21"})
        with pytest.raises(BadInput, match=r"distill\.assistant: expected one of .*resnet20.*got 'resnet21'"):
            made.prepare()


def test_answers_are_balanced_where_the_settings_say_so_and_nowhere_else(tmp_path, pictures_NHW, monkeypatch):
    probabilities_NK = torch.tensor([[0.99, 0.01], [0.9, 0.1]])
    bought = Pool(
        images_NCHW=torch.from_numpy(pictures_NHW[:2, None]),
        latents_NL=torch.zeros(2, 5),
        probabilities_NK=probabilities_NK,
    )
    monkeypatch.setattr(agents.pools, "load_pool", lambda *parts, **options: bought)
    generator = Generator(class_count=2, noise_count=3, side=8, channels=1, width=4)
    with RunFolder(tmp_path / "run") as folder:
        assert agent(folder, tmp_path, description(8, 8))._pool(generator) is bought
        said = agent(folder, tmp_path, description(8, 8), distill={"balance_answers": True})._pool(generator)
    assert said.probabilities_NK.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_balancing_the_answers_of_a_label_only_teacher_is_refused(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        made = asked(folder, tmp_path, pictures_NHW, distill={"balance_answers": True})
        with pytest.raises(BadInput, match=r"distill\.balance_answers: .*got class indices; set it to false"):
            made.distill()


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
        _, reference_NCHW = made._split
        trained = {image.numpy().tobytes() for image in seen[0]}
        reference = {image.numpy().tobytes() for image in reference_NCHW}
        assert (len(trained), len(reference), trained & reference) == (56, 8, set())


def mixes() -> Mixes:
    shape = {"side": 8, "channels": 1, "width": 4, "latent_channels": 2, "view_count": 1}
    return Mixes(**shape, picture_count=56, mix_pictures=2, mix_regions=2, mix_noise=0.3)


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
        folder.finish("deprivatize", with_model(folder, "m")._generators_inputs())
        folder.journal.set_facts(first_model=None)  # as former versions left it
        for digest in ("m2", "m3"):
            made = with_model(folder, digest)
            assert folder.done("deprivatize", made._generators_inputs())
        assert "phase 1 replaces it" not in capsys.readouterr().err
        asked = with_model(folder, "m3", im_queries=640)
        assert not folder.done("deprivatize", asked._generators_inputs()), "this one asks about the weights of today"
        plan_one(folder, pictures_NHW)
        with pytest.raises(RunFolderProblem, match="paid answers for other teacher's model"):
            with_model(folder, "m4")


def test_what_a_teacher_will_understand_less_well_is_told_before_anything_is_trained(tmp_path, pictures_NHW, capsys):
    settings = {"deprivatize": {"im_queries": 640}}
    with RunFolder(tmp_path / "run") as folder:
        agent(folder, tmp_path, description(8, 8), **settings).prepare()
        assert "WARNING" not in capsys.readouterr().err
    with RunFolder(tmp_path / "other") as folder:
        agent(folder, tmp_path, replace(description(8, 12), indices_only=True), **settings).prepare()
    said = capsys.readouterr().err
    assert "im_queries: 640 questions will change nothing" in said
    assert "the teacher takes pictures of 8 x 12, and the generator makes squares" in said


def test_files_left_out_are_listed_once_and_not_at_every_start(tmp_path, pictures_NHW):
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    with RunFolder(tmp_path / "run") as folder:
        for _ in range(3):
            assert len(agent(folder, tmp_path, description(8, 8))._local.skipped) == 1
        assert (folder.path / "metrics.jsonl").read_text().count("notes.txt") == 1
        (tmp_path / "pictures" / "more.txt").write_text("no picture")
        assert len(agent(folder, tmp_path, description(8, 8))._local.skipped) == 2
        assert (folder.path / "metrics.jsonl").read_text().count("notes.txt") == 2


def test_a_summary_does_without_pictures_that_went_away_while_the_run_ended(tmp_path, pictures_NHW):
    """The door reads them once more where another size is sent; why the run ended is worth more than their count."""
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(20, 30), image_size=8)
        made.prepare()
        plan_one(folder, pictures_NHW)
        (tmp_path / "pictures").rename(tmp_path / "elsewhere")
        assert made.write_summary()["private_images_sent"] is None
        (tmp_path / "pictures").mkdir()  # where a card was mounted
        assert made.write_summary()["private_images_sent"] is None
        with pytest.raises(
            BadInput, match="changed during the run: it began with 64 usable pictures, now there are 0"
        ):
            made._door.matches(wire.Batch())
        (tmp_path / "pictures").rmdir()
        (tmp_path / "elsewhere").rename(tmp_path / "pictures")
        assert made.write_summary()["private_images_sent"] == 0


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
        folder.finish("deprivatize", none._generators_inputs())
        with pytest.raises(CopiesStopped, match=r"^it has copied$"):
            none.ask()


def test_more_regions_than_a_latent_has_cells_are_refused(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        mixes = {"deprivatize": {"generator": "mixes", "mix_regions": 3}, "distill": {"image_weight": 0}}
        with pytest.raises(BadInput, match=r"mix_regions: expected at most 2 for pictures of side 8, got 3"):
            agent(folder, tmp_path, description(8, 8), **mixes).prepare()


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
    monkeypatch.setattr(Agent, "_generator", lambda made: by_heart(made._split[0], config=made._config.deprivatize))
    with RunFolder(tmp_path / "run") as folder:
        mixing = {"generator": "mixes"}
        made = agent(folder, tmp_path, description(8, 8), deprivatize=mixing, distill={"image_weight": 0})
        made.prepare()
        made.deprivatize()
        monkeypatch.setattr(Agent, "_connected", lambda made: pytest.fail("the teacher was asked"))
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
