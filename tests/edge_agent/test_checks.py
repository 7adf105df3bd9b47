"""Settings that are refused, or warned of, before anything is trained or asked."""

from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.checks import check_budget, check_networks, check_questions
from edge_agent.config import build_config
from edge_agent.failures import BadInput
from edge_agent.journal import Totals
from edge_agent.runs import RunFolder
from tests.edge_agent.agent_parts import agent, description, plan_one


def test_a_teacher_of_pictures_too_small_for_a_generator_is_refused(tmp_path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(BadInput, match=r"expected a teacher of pictures with 8 x 8 pixels or more, got 7 x 9"):
            agent(folder, tmp_path, description(7, 9)).prepare()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"deprivatize": {"generator": "mixes", "mix_pictures": 5}, "distill": {"image_weight": 0}},
            r"mix_pictures: expected one for each of 4 regions at most, got 5",
        ),
        ({"deprivatize": {"im_queries": 63}}, r"im_queries: expected the questions of one step \(64, .* got 63"),
        ({"deprivatize": {"im_queries": 64}, "batch_pictures": 63}, r"batch_pictures: expected 64 .* got 63"),
        (
            {"deprivatize": {"im_queries": 130, "batch_count": 65}},
            r"batch_count: expected at most 64, which this teacher takes in a batch, .* got 65",
        ),
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


def test_questions_of_phase_1_leave_some_of_the_budget_until_it_asks_no_more() -> None:
    config = build_config({"images": "digits", "budget": 970, "deprivatize": {"im_queries": 970}})
    with pytest.raises(BadInput, match=r"im_queries: expected 0 to less than the budget \(970\), got 970"):
        check_questions(config, phase_2_began=False)
    check_questions(config, phase_2_began=True)


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


def test_more_regions_than_a_latent_has_cells_are_refused(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        mixes = {"deprivatize": {"generator": "mixes", "mix_regions": 3}, "distill": {"image_weight": 0}}
        with pytest.raises(BadInput, match=r"mix_regions: expected at most 2 for pictures of side 8, got 3"):
            agent(folder, tmp_path, description(8, 8), **mixes).prepare()


@pytest.mark.parametrize(
    ("budget", "counts_sent", "said"),
    [
        (99, True, "expected at least the 100 pictures that run has sent already, got 99"),
        (59, False, "expected at least the 60 pictures that run was charged already, got 59"),
        (61, False, r"asked about 80 pictures and was answered 60; expected at least 80, or 60 .*, got 61"),
        (79, False, r"asked about 80 pictures and was answered 60; expected at least 80, or 60 .*, got 79"),
        (60, False, None),
        (80, False, None),
        (100, True, None),
    ],
)
def test_a_budget_below_what_is_spent_or_may_be_is_refused(budget: int, counts_sent: bool, said: str | None) -> None:
    totals = Totals(
        planned_pictures=80,
        refused_pictures=0,
        sent_pictures=100,
        charged_pictures=60,
        dropped_pictures=0,
        sent_bytes=0,
        received_bytes=0,
    )
    config = build_config({"images": "digits", "budget": budget})
    if said is None:
        check_budget(config, totals, Path("run"), counts_sent=counts_sent)
    else:
        with pytest.raises(BadInput, match=said):
            check_budget(config, totals, Path("run"), counts_sent=counts_sent)


def test_a_student_of_no_known_architecture_is_refused() -> None:
    with pytest.raises(BadInput, match=r"--student: expected one of .*resnet8.*; got 'resnet9'"):
        check_networks(build_config({"images": "digits", "student": "resnet9"}))
