"""The certificate: what was checked of a training, as a table that stands in its manifest.

Each check turns a failure that is silent elsewhere into an error that names the repair.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from qlora_dist.errors import TrainError


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what was found."""

    check: str
    passed: bool
    found: str


@dataclass(slots=True)
class Certificate:
    """The checks of one training, in the order in which they were made; `subject` says in errors whose they are."""

    subject: str = ""
    checks: list[Check] = field(default_factory=list)

    def require(self, check: str, passed: bool, found: str, repair: str) -> None:
        """Notes a check.

        Raises:
            TrainError: if it didn't pass: the check, what was found, and the repair.
        """
        self.checks = [c for c in self.checks if c.check != check]
        self.checks.append(Check(check, bool(passed), found))
        if not passed:
            whose = f"{self.subject}: check" if self.subject else "Check"
            raise TrainError(f"{whose} {check!r} failed: {found}. {repair}")

    def table(self) -> list[dict[str, object]]:
        """Returns the checks as rows for the manifest."""
        return [asdict(check) for check in self.checks]
