"""What a run folder is bound to from its first question on: pictures, generator's settings, teacher, who counts.

Answers that are paid for are worth nothing for another generator's pictures, so a folder that has some is refused to
any other run. Before the first question all of it may change; what was trained on other inputs is trained again. How
a KServe server is read may be corrected until the first answer.
"""

from typing import Any

from edge_agent.config import RunConfig, generator_in_use, given_settings
from edge_agent.console import Console
from edge_agent.dealings import Dealings
from edge_agent.failures import RunFolderProblem
from edge_agent.local_pictures import LocalPictures
from edge_agent.runs import RunFolder, digest_of

_CORRECTABLE = ("teacher's model", "[teacher]")  # of a KServe server's identity, until the first answer is kept


class Binding:
    """The only writer of the facts `identity`, `first_model` and `metered_by` of a run folder's journal."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, console: Console, *, dealings: Dealings, local: LocalPictures
    ) -> None:
        self._config = config
        self._folder = folder
        self._journal = folder.journal
        self._console = console
        self._dealings = dealings
        self._local = local

    def check(self) -> dict[str, Any]:
        """Returns this run's identity, and notes who counts. Raises RunFolderProblem: the folder is another's."""
        described = self._dealings.description
        identity = {
            "pictures": self._local.found.digest,
            "seed": self._config.seed,
            "teacher's model": described.model_digest,
            "generator's side": self._local.side,
            "reference pictures": self._local.reference,
            **{f"deprivatize.{name}": value for name, value in generator_in_use(self._config.deprivatize).items()},
        }
        totals = self._journal.totals()
        self._check_meter(totals.planned_pictures)
        if self._dealings.counts_sent:
            identity |= {
                "pictures' shape": [described.channels, described.height, described.width],
                "classes": len(described.labels),
                "[teacher]": given_settings(self._config.kserve),
            }
        self._check_identity(identity, planned=totals.planned_pictures, charged=totals.charged_pictures)
        return identity

    def keep(self, identity: dict[str, Any]) -> None:
        """Makes the folder this run's."""
        if self._journal.fact("first_model") is None:
            before = self._journal.fact("identity") or identity
            self._journal.set_facts(first_model=before["teacher's model"])
        self._journal.set_facts(identity=identity)

    def generators_inputs(self) -> str:
        """A digest of what ``generator.pt`` depends on, of the identity that was kept (`keep`)."""
        identity = self._journal.fact("identity")
        if self._dealings.counts_sent:
            # How its tensors are read may still be corrected, and is no matter for the generator.
            identity = {name: value for name, value in identity.items() if name not in _CORRECTABLE}
        elif self._config.deprivatize.im_queries == 0 and (first := self._journal.fact("first_model")) is not None:
            # Weights of a teacher that was not asked are no matter either.
            identity |= {"teacher's model": first}
        return digest_of({"identity": identity, "classes": len(self._dealings.description.labels)})

    def _check_meter(self, planned: int) -> None:
        """Refuses to go on with another way to count than what was sent so far was counted by."""
        before, now = self._journal.fact("metered_by") or "teacher", self._dealings.metered_by
        if planned > 0 and before != now:
            raise RunFolderProblem(
                f"{self._folder.path}: its pictures so far were counted by the {before}, those of "
                f"{self._config.teacher} would be by the {now}; give another --run-dir"
            )
        self._journal.set_facts(metered_by=now)

    def _check_identity(self, identity: dict[str, Any], *, planned: int, charged: int) -> None:
        """Refuses another identity than answers were paid for with; says so where a generator would be replaced."""
        known = self._journal.fact("identity")
        if known is None:
            return
        # A GAN's identity says nothing of its kind (`generator_in_use`); here it is compared, first of all.
        known = {"deprivatize.generator": "gan"} | known
        now = {"deprivatize.generator": self._config.deprivatize.generator} | identity
        changed = [
            name
            for name in now
            if known.get(name) != now[name] and not self._may_change(name, planned=planned, answered=charged)
        ]
        if changed and planned > 0:
            refusal = f"{self._folder.path} has paid answers for other {changed[0]}: "
            if changed[0] == "pictures":
                before = str(known.get("reference pictures")).partition(",")[0].rpartition(" of ")[2]
                raise RunFolderProblem(
                    f"{refusal}it began with {before}, now there are {len(self._local.found.images_NCHW)} in "
                    f"{self._config.images}, and not the same; bring those back, or give another --run-dir"
                )
            raise RunFolderProblem(
                f"{refusal}it began with {known.get(changed[0])!r}, now it is {now[changed[0]]!r}; give another "
                f"--run-dir, or the former value (all of them: --config {self._folder.path / 'run.toml'})"
            )
        if changed and self._folder.has("generator.pt"):
            self._console.warn(
                f"{self._folder.path / 'generator.pt'} was trained with other {', '.join(changed)}; phase 1 "
                "replaces it"
            )

    def _may_change(self, name: str, *, planned: int, answered: int) -> bool:
        """How a server's tensors are read may be corrected until the first answer is kept.

        And a teacher that phase 1 asked nothing may have other weights by the first question.
        """
        if self._dealings.counts_sent:
            return answered == 0 and name in _CORRECTABLE
        return planned == 0 and name == "teacher's model" and self._config.deprivatize.im_queries == 0
