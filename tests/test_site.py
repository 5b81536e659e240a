"""README, citation and site: links lead somewhere, and what they say of the code is there."""

from __future__ import annotations

import itertools
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import merge_rl
from merge_rl.cli.main import COMMANDS
from merge_rl.cli.tables import print_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Written anew at every build.
GENERATED = {DOCS / "reference" / name for name in ("commands.md", "settings.md", "python.rst")}
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*DOCS.glob("**/*.md")} - GENERATED),
]  # fmt: skip
SOURCES = "\n".join(path.read_text() for path in Path(merge_rl.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.is_file() or path in GENERATED, target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_of_code_are_closed(page: Path) -> None:
    fences = [line for line in page.read_text(encoding="utf-8").splitlines() if "```" in line]
    assert len(fences) % 2 == 0
    assert all(line.strip() == "```" for line in fences[1::2])


def cut_paragraphs(text: str) -> list[str]:
    """First lines of what begins small after a title or a full stop: the rest of a sentence."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for block in prose.split("\n\n") if block.strip()]
    return [
        block.splitlines()[0]
        for before, block in itertools.pairwise(blocks)
        if re.match(" {0,3}[a-z]", block)
        and not re.match(r"\w+\n: ", block)  # a word and what it means
        and (before.startswith("#") or before.rstrip().endswith("."))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_paragraph_begins_within_a_sentence(page: Path) -> None:
    assert cut_paragraphs(page.read_text(encoding="utf-8")) == []


def test_what_begins_within_a_sentence_is_found() -> None:
    lost = "# Title\n\n  to the SDE.\n- All.\n\nloads it.\n\nScores\n\n    R(g)\n\nwhere g is."
    assert cut_paragraphs(lost) == ["  to the SDE.", "loads it."]


def test_the_readme_shows_the_table_as_it_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index("FID, N = ") : text.index("\nfloor: ")].splitlines()
    rows = [re.split(r" {2,}", line) for line in shown[1:] if not line.startswith("─")]
    monkeypatch.setenv("COLUMNS", "80")
    print_table(shown[0], rows[0], rows[1:])
    printed = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in printed] == shown


def test_the_readme_is_short_and_shows_a_command_first() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert any(line.startswith("    mergerl ") for line in lines[:40])
    assert any("](docs/_static/" in line for line in lines[:40])


def test_help_quotes_what_the_code_says() -> None:
    table = (DOCS / "help/errors.md").read_text(encoding="utf-8")
    quoted = [
        re.findall(r"`([^`]+)`", row.split("|")[1]) for row in table.splitlines() if "|" in row
    ]
    said = [text for texts in quoted for text in texts]
    assert len(said) > 10
    code = re.sub(r'"\s*\n\s*f?"', "", SOURCES)  # sentences that go over several lines
    assert [text for text in said if text not in code] == []


def test_names_of_the_package_in_pages_and_docstrings_are_there() -> None:
    text = "\n".join([SOURCES, *(page.read_text(encoding="utf-8") for page in PAGES)])
    named = set(re.findall(r"`(merge_rl(?!\.reference\.v1)(?:\.\w+)+)\b[`(]", text))
    assert {"merge_rl.sample", "merge_rl.interfaces.Searcher"} <= named
    for name in sorted(named):
        pkgutil.resolve_name(name)


def test_pages_of_commands_and_settings_have_all_of_them(tmp_path: Path) -> None:
    # In a process of its own: here other tests have loaded commands, whose settings are then known.
    program = (
        "import sys, pathlib, generated; generated.python = tuple; "
        "generated.write(pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DOCS), str(ROOT)])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    commands = (tmp_path / "commands.md").read_text(encoding="utf-8")
    for name in itertools.chain.from_iterable(COMMANDS.values()):
        assert f"\n## mergerl {name}\n" in commands
    assert "\n\n    mergerl plan digits/edm2 --budget 20000\n\n" in commands
    assert "[bold]" not in commands
    settings = (tmp_path / "settings.md").read_text(encoding="utf-8")
    for key in ("reward.pool_size", "rollout.train_steps", "max_shard_size"):
        assert f"\n| `{key}` | `--" in settings


def test_recipes_that_pages_name_are_there() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"--config ([a-z0-9-]+)\b(?!\.)", text))
    assert {"digits", "digits-sit"} <= named
    assert named <= {path.stem for path in (ROOT / "merge_rl/data/recipes").glob("*.yaml")}


def test_hosts_build_what_make_builds() -> None:
    hosted = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text(encoding="utf-8"))
    assert (ROOT / hosted["sphinx"]["configuration"]).is_file()
    assert hosted["sphinx"]["fail_on_warning"]
    assert hosted["python"]["install"][0]["extra_requirements"] == ["docs"]
    pages = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text(encoding="utf-8"))
    steps = pages["jobs"]["site"]["steps"]
    assert {"run": "make docs"} in steps
    assert f"sphinx -q -W --keep-going -b html docs {steps[3]['with']['path']}" in (
        ROOT / "Makefile"
    ).read_text(encoding="utf-8")


def test_citation_names_the_software_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["cff-version"], cited["title"]) == ("1.2.0", "merge_rl")
    assert cited["references"][0]["url"] == "https://arxiv.org/abs/2607.02291"
