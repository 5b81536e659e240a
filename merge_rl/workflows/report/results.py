"""What evaluations and comparisons return: their document, typed, and shown as its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_rl.workflows.report.markup import NAMES, number
from merge_rl.workflows.report.verdicts import Verdict, compare_verdict, ranked


@dataclass(frozen=True)
class Score:
    """A metric over several repeats; without an interval where there is but one."""

    mean: float
    low: float | None  # ends of the 95 % interval
    high: float | None
    minimum: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Score:
        """From the summary of a document."""
        found = {key: summary[key] for key in ("mean", "low", "high")}
        return cls(**found, minimum=summary["min"], values=tuple(summary["values"]))

    def __str__(self) -> str:
        ends = "" if self.low is None else f" [{number(self.low)}, {number(self.high)}]"
        return f"{number(self.mean)}{ends}"


class EvaluateResult(dict[str, Any]):
    """Scores of a model, of images or of features.

    Also a dict: {"kind", "num_images", "repeats", METRIC: {"reference": {"mean", "low", "high",
    "min", "values"}}}; for several samplers the metrics lie in {"samplers": {NAME: ...}}.
    """

    @property
    def num_images(self) -> int:
        """N of one repeat."""
        return int(self["num_images"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes the scores doubtful, and what was assumed."""
        return tuple(self.get("notes", ()))

    @property
    def scores(self) -> dict[str, dict[str, dict[str, Score]]]:
        """Sampler ("" where there is one) -> metric -> "reference" or "heldout" -> score."""
        sections: Mapping[str, Any] = self.get("samplers") or {"": self}
        return {
            name: {
                metric: {key: Score.of(value) for key, value in of.items()}
                for metric, of in section.items()
                if metric != "samplers"
                and isinstance(of, Mapping)
                and all(isinstance(v, Mapping) for v in of.values())
            }
            for name, section in sections.items()
        }

    def score(self, metric: str = "fid", reference: str = "reference", sampler: str = "") -> Score:
        """One score; by default of the first sampler."""
        sections = self.scores
        return sections[sampler if sampler in sections else next(iter(sections))][metric][reference]

    def __repr__(self) -> str:
        lines = [
            f"{metric.upper()} {found}, {NAMES.get(key, key)}{f' ({name})' if name else ''}"
            for name, section in self.scores.items()
            for metric, of in section.items()
            for key, found in of.items()
        ]
        return "\n".join([*lines, f"N = {self.num_images:,}, {self['repeats']} repeats"])


def _is_metric(name: str, value: object) -> bool:
    """Whether an entry of a section has scores by reference."""
    scores = isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())
    return scores and name != "samplers"


@dataclass(frozen=True)
class SearcherScore:
    """Held-out FID of what a searcher found (to the reference where nothing is held out)."""

    searcher: str
    median: float | None  # over the seeds of the searches; None where it is not finite
    low: float | None  # the lowest of them, and the highest
    high: float | None
    images: int  # that a search generated, the median

    @classmethod
    def of(cls, line: Mapping[str, Any], headline: str) -> SearcherScore:
        """From a line of compare.json."""
        found = line["fid"][headline]
        spread = {key: found[key] for key in ("median", "low", "high")}
        return cls(line["searcher"], **spread, images=line["images"])


class CompareResult(dict[str, Any]):
    """A comparison of searchers; also the dict that compare.json holds."""

    @property
    def ranking(self) -> Sequence[SearcherScore]:
        """The searchers, the best median first."""
        return [SearcherScore.of(line, self["headline"]) for line in ranked(self)]

    @property
    def verdict(self) -> Verdict:
        """Which searcher found the best merges, and whether that beats what needs no search."""
        return compare_verdict(self)

    def __repr__(self) -> str:
        return str(self.verdict)
