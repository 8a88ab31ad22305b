"""The kernel of each site of a graph: as a policy or calibration has it, or an exact one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adaattn_compiler.kernels.choose import Choice, choose, prepare
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.site import Refused, Site


@dataclass(frozen=True)
class SiteKey:
    """A site in a model: its module's path, and its number among those of that path, from 0."""

    name: str
    ordinal: int


@dataclass(frozen=True)
class Exact:
    """A chooser's answer: as everywhere else; why, where that is worth saying."""

    why: str = ""


# Asked first for each site.
Chooser = Callable[[SiteKey, Site, Problem], Choice | Exact]


def keys_of(found: Sequence[Site | Refused]) -> list[SiteKey]:
    """The keys of all that was found in a graph, in order."""
    counts: dict[str, int] = {}
    keys: list[SiteKey] = []
    for item in found:
        ordinal = counts.get(item.name, 0)
        counts[item.name] = ordinal + 1
        keys.append(SiteKey(item.name, ordinal))
    return keys


class Choices:
    """Chooses; among exact kernels once for layers alike."""

    def __init__(self, options: Options, chooser: Chooser | None) -> None:
        self._options = options
        self._chooser = chooser
        self._exact: dict[Problem, Choice] = {}

    def prepare(self, problems: Sequence[Problem]) -> None:
        """Start building what may be chosen; what is wrong with one is said in its turn."""
        for problem in dict.fromkeys(problems):
            with contextlib.suppress(Exception):
                prepare(problem, self._options)

    def of(self, key: SiteKey, site: Site, problem: Problem) -> Choice:
        """Raises Refusal where no kernel can take the problem."""
        answer = Exact() if self._chooser is None else self._chooser(key, site, problem)
        if isinstance(answer, Choice):
            return answer
        if problem not in self._exact:
            self._exact[problem] = choose(problem, self._options)
        choice = self._exact[problem]
        if not answer.why:
            return choice
        return replace(choice, why=f"exact: {answer.why}; {choice.why}", refused=answer.why)
