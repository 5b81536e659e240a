"""What runs came to, as one sentence, and what evaluations and comparisons return, typed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from merge_rl.progress import number
from merge_rl.workflows.report.markup import NAMES, interval, largest, metric_text

Outcome = Literal["better", "worse", "no clear difference", "not finite"]
Tone = Literal["good", "bad", "even"]
TONES: Final[Mapping[Outcome, Tone]] = {
    "better": "good", "worse": "bad", "no clear difference": "even", "not finite": "bad",
}  # fmt: skip
OTHERS: Final = {
    "start": "its start",
    "uniform": "the uniform average",
    "best single": "the best single checkpoint",
}


@dataclass(frozen=True)
class Verdict:
    """One outcome, for people."""

    tone: Tone
    claim: str  # a sentence
    numbers: str  # what it rests on, a sentence
    line: str  # both in a line of a terminal

    def __str__(self) -> str:
        return f"{self.claim} {self.numbers}"


def outcome(gain: Mapping[str, Any]) -> Outcome:
    """What a paired interval of (other - result) says of the result; lower scores are better."""
    low, high = gain["low"], gain["high"]
    if any(value is None or math.isnan(value) for value in (low, high)):
        return "not finite"
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def run_verdict(comparison: Mapping[str, Any]) -> Verdict:
    """Of a search: its result against the start and the merges that need no search.

    `comparison` is that of result.json.
    """
    head, gains, entries = comparison["headline"], comparison["gain_over"], comparison["entries"]
    found = outcome(gains["start"])
    if found == "not finite":
        return _not_finite(f"{NAMES[head]} FID")
    names = {**OTHERS, "best single": f"{OTHERS['best single']} ({comparison['best_single']})"}
    outcomes = {names[other]: outcome(gain) for other, gain in gains.items()}
    told = _verdict(found, outcomes, f"{NAMES[head]} FID", entries, gains["start"], head)
    ahead = [other for other, gain in gains.items() if outcome(gain) == "worse"]
    if not ahead or "start" in ahead:
        return told
    # Who could have had a better one without a search is told so first, by the numbers of the best.
    best = min(ahead, key=lambda other: float(entries[other][head]["mean"]))
    line = "{} FID {} to {}, {}".format(NAMES[head], *_change(entries, gains[best], head, best))
    return replace(told, tone="bad", line=f"worse than {enumerated(ahead)}: {line}")


def _verdict(
    found: Outcome, outcomes: Mapping[str, Outcome], measure: str, entries: Mapping[str, Any],
    gain: Mapping[str, Any], head: str,
) -> Verdict:  # fmt: skip
    before, after, change = _change(entries, gain, head)
    return Verdict(
        TONES[found],
        f"{_capital('; '.join(_grouped(outcomes)))}.",
        f"{_capital(measure)} went from {before} to {after}, a gain of {change}.",
        f"{found}: {measure} {before} to {after}, {change}",
    )


def _change(
    entries: Mapping[str, Any], gain: Mapping[str, Any], head: str, other: str = "start"
) -> tuple[str, str, str]:
    """The mean of another, that of the result, and the interval of what was gained."""
    size = largest(gain.values())
    before, after = (number(entries[e][head]["mean"], like=size) for e in (other, "result"))
    return before, after, interval(gain, "+.3f")


def _grouped(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Such as "better than A and B", then "no clear difference from C"."""
    parts = []
    for kind, joint in (
        ("better", "better than"), ("no clear difference", "no clear difference from"),
        ("worse", "worse than"), ("not finite", "no score to compare with"),
    ):  # fmt: skip
        members = [name for name, found in outcomes.items() if found == kind]
        if members:
            parts.append(f"{joint} {enumerated(members)}")
    return parts


def enumerated(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _not_finite(measure: str) -> Verdict:
    return Verdict(
        "bad",
        "The result or its start has no finite score.",
        f"There is no {measure} to judge by.",
        f"not finite: no {measure} to judge by",
    )


def finetune_verdict(comparison: Mapping[str, Any], labels: Mapping[str, str]) -> Verdict:
    """Of fine-tuning: result against start under each sampler; `labels` say which is which.

    `comparison` is that of result.json. The numbers are those of the first sampler with a score,
    of the steps of evaluation where there is one.
    """
    head, curves = comparison["headline"], comparison["curves"]
    outcomes = {name: outcome(curves[name]["gain"]) for name in labels}
    known = [name for name, found in outcomes.items() if found != "not finite"]
    if not known:
        return _not_finite(f"{NAMES[head]} FID")
    own = next((name for name in known if name.endswith("-eval")), known[0])
    kinds = {found: [n for n in labels if outcomes[n] == found] for found in outcomes.values()}
    whole = {name: label.replace(", ", " with ") for name, label in labels.items()}
    claim = "; ".join(f"{k} under {enumerated([whole[n] for n in of])}" for k, of in kinds.items())
    counts = ", ".join(f"{kind} under {len(of)}" for kind, of in kinds.items())
    gain, measure = curves[own]["gain"], f"{NAMES[head]} FID ({labels[own]})"
    found = outcomes[own] if len(kinds) == 1 else "no clear difference"
    base = _verdict(found, {}, measure, curves[own]["entries"], gain, head)
    line = f"{counts} samplers ({labels[own]}: {interval(gain, '+.3f')})"
    return Verdict(base.tone, f"{_capital(claim)}.", base.numbers, line)


def ranked(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Searchers of a comparison, the best median first; those without a score last."""

    def key(line: Mapping[str, Any]) -> float:
        middle = line["fid"][document["headline"]]["median"]
        return math.inf if middle is None else float(middle)

    return sorted(document["searchers"], key=key)


def compare_verdict(document: Mapping[str, Any]) -> Verdict:
    """Of a comparison of searchers: the best median, whether it beats what needs no search.

    Searchers are apart where the ranges over their seeds share no point, which one seed cannot
    tell. `document` is compare.json.
    """
    head, (best, *others) = document["headline"], ranked(document)
    own, seeds = best["fid"][head], len(document["seeds"])
    measure = f"{NAMES[head]} FID"
    if own["median"] is None:
        return _not_finite(measure)
    of = f"median of {seeds} seeds" if seeds > 1 else "one seed"
    shown = f"{ranged(own)}, {of}"
    free, name = document["best_free"], best["searcher"]
    beaten = not free or own["median"] < free["fid"]
    lead = _lead(own, [line for line in others if line["fid"][head]["median"] is not None], head)
    claim = f"{name} found the best merges" if beaten else "No search beat the merges without one"
    lead = f"; {lead if beaten else f'the best is {name}'}" if lead else ""
    ratio = "" if not free else (
        f" The best merge without a search, {free['entry']}, has {number(free['fid'])}."
    )  # fmt: skip
    return Verdict(
        "bad" if not beaten else "even" if "no clear" in lead else "good",
        f"{claim}{lead}.",
        f"{_capital(measure)} {shown}.{ratio}",
        f"best: {name}, {measure} {shown}" if beaten else f"none beat {free['entry']}: {shown}",
    )


def ranged(value: Mapping[str, Any], form: str = ".3f") -> str:
    """Median [lowest, highest] over seeds."""
    alone = len(value["values"]) == 1
    return number(value["median"], form) if alone else interval(value, form, middle="median")


def _lead(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]], head: str) -> str:
    """How the best stands to the next one."""
    if not others:
        return ""
    following = others[0]["fid"][head]
    named = f"{others[0]['searcher']} ({number(following['median'])})"
    several = len(own["values"]) > 1
    if several and own["high"] is not None and own["high"] < following["low"]:
        return f"ahead of {named} with every seed"
    return f"no clear difference from {named}{'' if several else ', which one seed cannot tell'}"


@dataclass(frozen=True)
class Score:
    """Mean, 95 % interval (low, high; None for one repeat), minimum and values of a metric."""

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
            f"{metric_text(metric)} {found}, {NAMES.get(key, key)}{f' ({name})' if name else ''}"
            for name, section in self.scores.items()
            for metric, of in section.items()
            for key, found in of.items()
        ]
        return "\n".join([*lines, f"N = {self.num_images:,}, {self['repeats']} repeats"])


@dataclass(frozen=True)
class SearcherScore:
    """FID of what a searcher found, held-out where there is some: median, low, high over seeds."""

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
