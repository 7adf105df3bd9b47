"""What a run refuses, or warns of, before it trains or asks anything.

Networks that do not exist, settings that this teacher rules out, a budget below what is spent.
"""

from pathlib import Path

from edge_agent.config import DeprivatizeConfig, RunConfig, idle_settings
from edge_agent.console import Console
from edge_agent.failures import BadInput
from edge_agent.journal import Totals
from edge_agent.teacher import Description
from networks import registry
from networks.autoencoder import latent_side


def check_networks(config: RunConfig) -> None:
    """Raises BadInput for a network that cannot be built."""
    known = ", ".join(registry.CLASSIFIERS)
    if config.student not in registry.CLASSIFIERS:
        raise BadInput(f"--student: expected one of {known}; got {config.student!r}")
    if config.distill.assistant not in ("", *registry.CLASSIFIERS):
        raise BadInput(
            f"distill.assistant: expected one of {known}, or nothing for none; got {config.distill.assistant!r}"
        )


def check_questions(config: RunConfig, *, phase_2_began: bool) -> None:
    """Raises BadInput where phase 1 would leave nothing of the budget; once phase 2 has asked it asks no more."""
    if config.deprivatize.im_queries >= config.budget and not phase_2_began:
        raise BadInput(
            f"deprivatize.im_queries: expected 0 to less than the budget ({config.budget}), "
            f"got {config.deprivatize.im_queries}"
        )


def check_settings(
    config: RunConfig, described: Description, *, side: int, anything_asked: bool, console: Console
) -> None:
    """Refuses what cannot be done with this teacher, and warns of what does little.

    Args:
        config: the run's settings.
        described: the teacher.
        side: of the generator's pictures.
        anything_asked: whether the journal has plans. Such a run may have begun under a former version, which took
            some of these settings as they are.
        console: where warnings go.

    Raises BadInput.
    """
    if side < 8:
        raise BadInput(
            f"expected a teacher of pictures with 8 x 8 pixels or more, got {described.height} x {described.width}"
        )
    if config.distill.shift_px >= side:
        raise BadInput(
            f"distill.shift_px: expected less than the side of the pictures, {side}, got {config.distill.shift_px}"
        )
    # Before the first alone: of an account that is sold other answers since, the description is of former times.
    if config.distill.balance_answers and described.indices_only and not anything_asked:
        raise BadInput(
            "distill.balance_answers: expected probabilities to balance, and this account is sold class indices; "
            "set it to false"
        )
    if idle := idle_settings(config):
        console.warn(f"settings that change nothing in this run: {', '.join(idle)}")
    settings = config.deprivatize
    if not anything_asked:
        _check_counts(settings, config.batch_pictures, described.max_batch_pictures)
        _warn_of_little_use(settings, described, console)
    most = latent_side(side)
    if settings.generator == "mixes" and settings.mix_regions > most:
        raise BadInput(
            f"deprivatize.mix_regions: expected at most {most} for pictures of side {side}, "
            f"got {settings.mix_regions}"
        )


def check_budget(config: RunConfig, totals: Totals, run_dir: Path, *, counts_sent: bool) -> None:
    """Refuses a budget below what is spent, or may be. `counts_sent`: `Dealings.counts_sent`. Raises BadInput."""
    budget, planned, charged = config.budget, totals.planned_pictures, totals.charged_pictures
    if counts_sent and budget < totals.sent_pictures:
        raise BadInput(
            f"--budget: expected at least the {totals.sent_pictures} pictures that {run_dir} has sent already, "
            f"got {budget}"
        )
    if budget < charged:
        raise BadInput(
            f"--budget: expected at least the {charged} pictures that {run_dir} was charged already, got {budget}"
        )
    # What is planned may have been sent, and so be paid for: it is asked about again, or nothing is.
    if charged < budget < planned and not counts_sent:
        raise BadInput(
            f"--budget: {run_dir} has asked about {planned} pictures and was answered {charged}; "
            f"expected at least {planned}, or {charged} to train on those alone, got {budget}"
        )


def _check_counts(settings: DeprivatizeConfig, batch_pictures: int, teachers_most_pictures: int) -> None:
    """Refuses counts of phase 1 that would quietly come to less than they say."""
    step = settings.batch_count
    if settings.generator == "mixes" and settings.mix_pictures > settings.mix_regions**2:
        raise BadInput(
            f"deprivatize.mix_pictures: expected one for each of {settings.mix_regions**2} regions at most, "
            f"got {settings.mix_pictures}"
        )
    if 0 < settings.im_queries < step:
        raise BadInput(
            f"deprivatize.im_queries: expected the questions of one step ({step}, deprivatize.batch_count) or "
            f"more, or 0, got {settings.im_queries}"
        )
    if settings.im_queries > 0 and batch_pictures < step:
        raise BadInput(
            f"batch_pictures: expected {step} (deprivatize.batch_count) or more with deprivatize.im_queries, "
            f"whose steps ask in one batch, got {batch_pictures}"
        )
    if settings.im_queries > 0 and teachers_most_pictures < step:
        raise BadInput(
            f"deprivatize.batch_count: expected at most {teachers_most_pictures}, which this teacher takes in a "
            f"batch, with deprivatize.im_queries, whose steps ask in one, got {step}; or set im_queries to 0"
        )


def _warn_of_little_use(settings: DeprivatizeConfig, described: Description, console: Console) -> None:
    """Says what will be paid for and teach little."""
    if described.indices_only and settings.im_queries > 0:
        console.warn(
            f"deprivatize.im_queries: {settings.im_queries} questions will change nothing: the teacher answers by "
            "class indices, so it seems equally sure of all pictures"
        )
    if described.height != described.width:
        console.warn(
            f"the teacher takes pictures of {described.height} x {described.width}, and the generator makes "
            "squares: the middle of each local picture is learnt from, and stretched when it is sent, which the "
            "teacher may understand less well"
        )
