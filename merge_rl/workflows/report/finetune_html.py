"""The page of a fine-tuning run as HTML, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from merge_rl.config import CURVES, FinetuneConfig, load_mapping
from merge_rl.errors import quoted
from merge_rl.progress import counted, number
from merge_rl.storage.runs import FinetuneRun
from merge_rl.workflows.report.elements import badge, facts, figure, grids, headline, span_of, strip
from merge_rl.workflows.report.figures import chart, charts, steps_axis, values_axis
from merge_rl.workflows.report.markup import (
    NAMES,
    NOTHING,
    Safe,
    document,
    interval,
    joined,
    section,
    table,
    tag,
)
from merge_rl.workflows.report.results import finetune_verdict, outcome
from merge_rl.workflows.report.sections import (
    again_section,
    attempted,
    cost_section,
    footer,
    provenance_section,
    settings_section,
    shown_path,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[str, Any]
CHART: Final = (5.2, 2.9)  # inches
FILE: Final = "finetune.yaml"


@dataclass(frozen=True)
class TuningFacts:
    """What a run's folder holds, as plain data: of any version, finished or not."""

    path: Path
    settings: Found
    events: Sequence[Found]
    points: Mapping[int, Found]  # step -> curve -> reference -> FID
    result: Found | None
    inputs: Found
    text: str  # of finetune.yaml

    @classmethod
    def of(cls, run: FinetuneRun) -> TuningFacts:
        """Read it; RunError names a file that is damaged."""
        settings = run.path / FILE
        return cls(
            path=run.path,
            settings=load_mapping(settings),
            events=run.events(),
            points=run.curves(),
            result=run.read("result.json"),
            inputs=run.read("inputs.json") or {},
            text=settings.read_text(encoding="utf-8"),
        )

    @property
    def labels(self) -> dict[str, str]:
        """Curve -> what it is of."""
        train = self.settings["rollout"]["train_steps"]
        evaluated = self.settings["curves"]["eval_steps"]
        steps = {name: evaluated if name.endswith("eval") else train for name in CURVES}
        return {name: f"{name[:3].upper()}, {steps[name]} steps" for name in CURVES}

    @property
    def headline(self) -> str:
        """The reference to judge by."""
        known: Found = next(iter(self.points.values()), {})
        return "heldout" if "heldout" in known.get(CURVES[0], {}) else "reference"

    @property
    def steps(self) -> list[Found]:
        """Events of the steps that were made."""
        return [event for event in self.events if event.get("kind") == "step"]


def finetune_document(run: FinetuneRun, *, reloads: bool = False) -> str:
    """The whole page; one that `reloads` does so until the run is finished."""
    found = TuningFacts.of(run)
    builders = {
        "Verdict": _headline, "Before and after": _pictures, "Scores on fresh seeds": _scores,
        "Along the run": _curves, "Cost and time": _cost,
        "Settings": lambda run: settings_section(FinetuneConfig, run.settings),
        "Provenance": lambda run: provenance_section(run.inputs, run.settings),
        "Make it again": _again,
    }  # fmt: skip
    parts = [attempted(title, partial(build, found)) for title, build in builders.items()]
    heading = f"Fine-tuning of {_name(found)}"
    return document(heading, *parts, footer(), reloads=reloads and found.result is None)


def _name(run: TuningFacts) -> str:
    return Path(str(run.settings.get("model", run.path))).name


def _headline(run: TuningFacts) -> Safe:
    how = {"pg": "policy gradient", "rs": "rejection sampling"}
    context = (
        f"Fine-tuning of {_name(run)}, {how.get(run.settings['algorithm'], 'pathwise')}, credit by "
        f"{run.settings['credit']}, seed {run.settings['seed']}"
    )
    if run.result is not None:
        top = headline(finetune_verdict(run.result["comparison"], run.labels), "", context)
        images = f"{run.result['images']:,}"
        skipped = str(run.result["skipped"] or "")
        step = {"result is step": f"{run.result['step']:,}", "images learned from": images}
        return joined([top, facts({**step, "steps skipped": skipped})])
    done, of = (run.steps[-1]["step"] if run.steps else 0), run.settings["steps"]
    failing = [event["skipped"] for event in run.steps[-3:] if "skipped" in event]
    why = f" The last steps had a {failing[-1]} that is not finite." if len(failing) == 3 else ""
    top = headline(None, f"Not finished: step {done:,} of {of:,}.{why}", context)
    bar = tag("progress", value=done, max=of)
    path = quoted(shown_path(run.path))
    return joined([top, bar, tag("p", f"If it was stopped: mergerl resume {path}")])


def _pictures(run: TuningFacts) -> Safe:
    known = sorted((run.path / "samples").glob("step-*.png"))
    if not known:
        why = "no step was scored, or its samples were not finite"
        if run.points:
            why = "its samples are none, or were not finite"
        text = f"There are no pictures: {why}."
        return section("Before and after", tag("p", text, class_="note"))
    after = known[-1]
    if run.result is not None:
        own = run.path / f"samples/step-{run.result['step']:07d}.png"
        after = own if own.is_file() else after
    pictures = {"Before: the start": (known[0], _score(run, known[0]))}
    if after != known[0] or run.result is not None:
        pictures[f"After: step {_step(after):,}"] = (after, _score(run, after))
    note = run.labels["sde-eval"]
    note += ", the same seeds and classes on both sides." if len(pictures) > 1 else "."
    return section("Before and after", grids(pictures), note=note)


def _step(picture: Path) -> int:
    return int(picture.stem.rpartition("-")[2])


def _score(run: TuningFacts, picture: Path) -> str:
    """The final score of a picture's model, as in the table; before the end that along the run."""
    if run.result is not None:
        entry = {run.result["step"]: "result", 0: "start"}.get(_step(picture))
        comparison = run.result["comparison"]
        if entry is not None:
            score = comparison["curves"]["sde-eval"]["entries"][entry][comparison["headline"]]
            return f"{NAMES[comparison['headline']]} FID {interval(score)}"
    value = run.points.get(_step(picture), {}).get("sde-eval", {}).get(run.headline)
    return "" if value is None else f"{NAMES[run.headline]} FID {number(value)}"


def _scores(run: TuningFacts) -> Safe:
    if run.result is None:
        return NOTHING
    comparison = run.result["comparison"]
    head, found = comparison["headline"], comparison["curves"]
    span = span_of([found[name]["gain"] for name in run.labels], zero=True)
    rows = []
    for name, label in run.labels.items():
        entries, gain = found[name]["entries"], found[name]["gain"]
        numbers = [interval(entries[entry][head]) for entry in ("start", "result")]
        shown = [interval(gain, "+.3f"), strip(gain, span, zero=True), badge(outcome(gain))]
        rows.append([label, *numbers, *shown])
    measure = f"{NAMES[head].capitalize()} FID, lower is better: mean [95 % interval]"
    count = f"{comparison['repeats']} repeats of {comparison['num_images']:,} images"
    note = f"{measure} of {count} on fresh seeds; the gain is paired."
    drawn = table(["sampler", "start", "result", "gained", "", "result is"], rows, kind="wide")
    return section("Scores on fresh seeds", drawn, note=note)


def _curves(run: TuningFacts) -> Safe:
    if not run.points:
        return NOTHING
    found = []
    for index, (name, label) in enumerate(run.labels.items()):
        drawn = chart(partial(_curve, run, name, index), CHART, f"FID along the run, {label}")
        found.append(figure(drawn, label))
    measure = f"{NAMES[run.headline].capitalize()} FID"
    count = run.settings["curves"]["num_images"]
    note = f"{measure} of {count:,} images, the same seeds at every step."
    if run.result is not None:
        count = run.result["comparison"]["num_images"]
        note += f" Bars: the final scores of {count:,} images on fresh seeds, 95 % intervals."
    return section("Along the run", charts(*found), note=note)


def _curve(run: TuningFacts, name: str, index: int, axes: list[Axes]) -> None:
    """One of the four, with the intervals of start and result."""
    (axis,), head = axes, run.headline
    known = [(k, run.points[k][name][head]) for k in sorted(run.points)]
    known = [(step, value) for step, value in known if value is not None]
    if known:
        axis.plot(*zip(*known, strict=True), "-o", color=f"C{index}", markersize=4)
    values = [value for _, value in known]
    if run.result is not None:
        entries = run.result["comparison"]["curves"][name]["entries"]
        for step, entry in ((0, "start"), (run.result["step"], "result")):
            value = entries[entry][head]
            if value["low"] is not None:
                half = value["high"] - value["mean"]
                axis.errorbar(
                    [step], [value["mean"]], yerr=[half], fmt="D", color="C7", markersize=4,
                    capsize=4, linewidth=1.4,
                )  # fmt: skip
                values += [value["low"], value["high"]]
    values_axis(axis, values, f"{NAMES[head]} FID")
    steps_axis(axis)


def _cost(run: TuningFacts) -> Safe:
    seconds = sum(event.get("seconds") or 0 for event in run.steps)
    images = run.steps[-1]["images"] if run.steps else 0
    said = [f"{counted(len(run.steps), 'step')}, {images:,} images, {seconds:,.0f} s in steps"]
    return cost_section({}, said)


def _again(run: TuningFacts) -> Safe:
    model, path = shown_path(run.settings["model"]), shown_path(run.path)
    command = ["mergerl", "finetune", model, "--config", f"{path}/{FILE}", "--out", f"{path}-again"]
    what = "The run, to the same bits on the same machine:"
    return again_section([(what, command)], FILE, run.text)
