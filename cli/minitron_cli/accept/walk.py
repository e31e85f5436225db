"""Going through the steps of an acceptance: what depends on what, what is left out, and what an error becomes."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from minitron.checks import FAIL, SKIPPED, CatalogueEntry, Check, catalogue, of_step
from minitron.errors import MinitronError, UsageError, VerdictError
from minitron_cli.accept.evidence import Evidence
from minitron_cli.main import explain

log = logging.getLogger(__name__)

#: Steps without which the ones after them have nothing to look at; others may fail alone.
_STAGES = ("machine", "convert", "build", "repository", "serve", "tokens", "speed", "reference")
#: Steps that cost minutes and tell that the hour would be lost: where one fails on a GPU, it ends there.
_PROOFS = ("tool", "small", "machine", "convert", "checkpoint")
#: A step under the name that a user has for it.
_ALSO = {"server": "audit"}


@dataclass(frozen=True)
class Step:
    """``needs``: the steps without which this one has nothing to look at."""

    name: str
    needs: tuple[str, ...]
    work: Callable[[], Sequence[Check]]


def chosen(words: Sequence[str]) -> dict[str, frozenset[str]]:
    """What ``--only`` asks for: the checks by their step. A word is a step or a check; raises UsageError."""
    found: dict[str, frozenset[str]] = {}
    steps = list(dict.fromkeys(entry.step for entry in catalogue().values()))
    for word in words:
        step = _ALSO.get(word, word)
        if step in steps:
            found[step] = frozenset(entry.name for entry in of_step(step))
        elif word in catalogue():
            step = catalogue()[word].step
            found[step] = found.get(step, frozenset()) | {word}
        elif "." in word and (known := [entry.name for entry in of_step(word.partition(".")[0])]):
            raise UsageError(f"there is no check {word}; there are {', '.join(known)}")
        else:
            raise UsageError(f"there is no part {word}; there are {', '.join([*_ALSO, *steps])}, and single checks")
    return found


@dataclass
class Walk:
    """``only``: see ``chosen``, empty for all. Whoever asks for a part gets an error as it is; an acceptance goes on
    past it, with a FAIL.

    ``alone``: do not do what the steps that are asked for need. ``keep_going``: past a cheap proof that failed.
    """

    evidence: Evidence
    on_gpu: bool
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    alone: bool = False
    keep_going: bool = False
    failed: set[str] = field(default_factory=set)

    def wanted(self, steps: Sequence[Step]) -> Collection[str]:
        """Names of the steps to do: those asked for, and what they need."""
        if not self.only:
            return {step.name for step in steps}
        wanted = set(self.only)
        for step in reversed(steps):
            if step.name in wanted and not self.alone:
                wanted |= set(step.needs)
        return wanted

    def through(self, steps: Sequence[Step], wanted: Collection[str]) -> Iterator[tuple[str, list[Check]]]:
        """Do those of ``steps`` that are wanted; yields name and checks of those that were asked for."""
        for step in steps:
            if step.name not in wanted:
                continue
            found = self._do(step)
            if not self.only:
                yield step.name, found
            elif step.name in self.only:
                yield step.name, [check for check in found if check.name in self.only[step.name]]
            elif lost := next((check for check in found if check.verdict == FAIL), None):
                raise VerdictError(f"step {step.name}, which that needs, failed: {lost.evidence}")

    def _do(self, step: Step) -> list[Check]:
        """A step's checks in the catalogue's order, every one of them once."""
        lost = next((need for need in step.needs if need in self.failed), self._ended_early())
        if lost is not None:
            self.failed.add(step.name)
            return [Check(entry.name, SKIPPED, f"step {lost} failed") for entry in of_step(step.name)]
        log.info("step %s", step.name)
        try:
            with self.evidence.logged(step.name):
                found = step.work()
        except Exception as error:
            if self.only:
                raise
            found = self._not_judged(step, error)
        if any(check.verdict == FAIL for check in found) and step.name in (*_STAGES, *_PROOFS):
            self.failed.add(step.name)
        by_name = {check.name: check for check in found}
        return [by_name.get(entry.name) or self._skipped(entry) for entry in of_step(step.name)]

    def _not_judged(self, step: Step, error: Exception) -> list[Check]:
        """The first check fails with what a command would have said; the log has the place of a bug of ours."""
        said, _ = explain(error)
        shown = f"error: {said}\n" if isinstance(error, MinitronError) else "".join(traceback.format_exception(error))
        with open(self.evidence.log(step.name), "a", encoding="utf-8") as file:
            file.write(shown)
        first, *others = of_step(step.name)
        return [Check(first.name, FAIL, said),
                *(Check(other.name, SKIPPED, f"{first.name} failed before") for other in others)]  # fmt: skip

    def _ended_early(self) -> str | None:
        """The cheap proof that failed, after which nothing dearer is worth its time; None with ``keep_going``."""
        if self.keep_going or not self.on_gpu:
            return None
        return next((step for step in _PROOFS if step in self.failed), None)

    def _skipped(self, entry: CatalogueEntry) -> Check:
        lost = "step machine failed" if "machine" in self.failed else "the step gave no answer"
        return Check(entry.name, SKIPPED, lost if self.on_gpu else "only a GPU target can show it")
