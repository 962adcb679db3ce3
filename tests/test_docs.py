"""README.md, docs/ and the pages beside them: commands parse, links lead somewhere, figures come from files."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench.pages import MARKED, pages
from tests.command_lines import ROOT, code_spans, commands_in, parse_as_started, parse_torchrun, without_code

if sys.version_info >= (3, 11):
    import tomllib

PAGES = [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCS = ROOT / "docs"
COMMANDS = sorted({(str(folder), *words) for path in PAGES for folder, words in commands_in(path.read_text())})
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
NO_PARSER = {("-m", "bench.pages"), ("-m", "bench.published")}
NOT_OURS = ("-c", "setup.py", "test.py")  # run in another folder, or no script at all
# Options of other programs that the pages mention.
FOREIGN_OPTIONS = {
    "--no-build-isolation",
    "--logdir",
    "--standalone",
    "--nproc_per_node",
    "--nnodes",
    "--rdzv_endpoint",
}
MEASURED = re.compile(
    r"\d\s?(?:%|ms\b|s\b|milliseconds?|seconds?|minutes?|hours?|times\b|AP\b|points?\b|GMACs|GB\b|MB\b)|\bAP (?:of )?\d"
)
AVOIDED = re.compile(
    r"\b(anew|mend(?:s|ed|ing)?|tells?|told|telling|go(?:es|ing)? on|went on|whoever|stands? in front of|at first|"
    r"tak(?:es?|ing) up)\b",
    re.IGNORECASE,
)
JOB = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "1234567", "SLURM_CPUS_PER_TASK": "32", "SLURM_NNODES": "2",
       "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip


@cache
def extras() -> set[str]:
    """Names of the optional dependencies in pyproject.toml."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[1:])[:60])
def test_every_command_is_one_that_its_script_takes(command):
    folder, program, *words = command
    assert Path(folder).is_dir()
    if program == "make":
        assert words and set(words) <= TARGETS
    elif program == "torchrun":
        parse_torchrun(words)
    elif program == "pip":
        named = re.search(r"\.\[(.*)\]", " ".join(words))
        assert named is None or set(named[1].split(",")) <= extras()
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif Path(folder) != ROOT:
        assert (Path(folder) / words[0]).is_file()
    elif tuple(words) in NO_PARSER:
        assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file()
    else:
        parse_as_started(words)


def test_a_command_that_no_script_takes_is_noticed():
    with pytest.raises(SystemExit):
        parse_as_started(["main.py", "--no_such_option"])
    with pytest.raises(SystemExit):
        parse_as_started(["-m", "datasets.check", "--no_such_option"])
    with pytest.raises(SystemExit):
        parse_torchrun(["--nproc_per_node", "2", "main.py", "--batch_size", "none"])
    assert parse_as_started(["main.py", "--batch_size", "3"]).options.batch_size == 3


def test_prose_behind_code_is_read():
    page = (
        "see `make demo`\n\n    python main.py --eval\n\nand `--seed`, 12 ms\n\n"
        "```bash\nmake test\n```\n\n`make lint`, 3 s\n"
    )
    assert [words for _, words in commands_in(page)] == [
        ["python", "main.py", "--eval"], ["make", "test"], ["make", "demo"], ["make", "lint"]
    ]  # fmt: skip
    assert code_spans(page) == ["make demo", "--seed", "make lint"]
    assert MEASURED.findall(without_code(page)) == ["2 ms", "3 s"] and "main.py" not in without_code(page)


def test_the_main_path_is_on_the_pages():
    scripts = {words[0] for _, program, *words in COMMANDS if program == "python"}
    assert {"main.py", "prune_greedy.py", "prune_greedy_ad.py", "inference.py", "export.py"} <= scripts
    assert {"torchrun", "make", "pip"} <= {program for _, program, *_ in COMMANDS}


def test_every_option_on_the_pages_exists(capsys):
    known = set(FOREIGN_OPTIONS)
    for script in {
        tuple(words[: 2 if words[0] == "-m" else 1]) for _, program, *words in COMMANDS if program == "python"
    }:
        if script not in NO_PARSER and script[0] not in NOT_OURS:
            with pytest.raises(SystemExit):
                parse_as_started([*script, "--help"])
            known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for path in PAGES:
        for span in code_spans(path.read_text()):
            assert set(re.findall(r"(?<!\S)--[\w-]+", span)) <= known, f"{path.name}: {span}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_figures_that_were_measured_come_from_files(path):
    prose = without_code(MARKED.sub("", path.read_text()))
    assert not MEASURED.findall(prose), "put the sentence into bench/sentences.py"


def test_measured_figures_are_recognised():
    for text in ("it takes 12 seconds", "3 times as fast", "AP 44.6", "62.8 AP", "47 % less", "5.5 GB", "14.1 ms"):
        assert MEASURED.search(text), text
    for text in ("two GPUs", "a batch of 8 images", "float32", "6 + 6 layers", "to 1e-5"):
        assert not MEASURED.search(text), text


@pytest.mark.parametrize(
    "path",
    [*PAGES, ROOT / "Makefile", ROOT / ".ci" / "run", *sorted((ROOT / "checkpoints").glob("*.sh"))],
    ids=lambda path: path.name,
)
def test_words_are_plain(path):
    assert not AVOIDED.findall(path.read_text())


def test_the_readme_is_read_in_a_few_minutes():
    assert 150 <= len((ROOT / "README.md").read_text().splitlines()) <= 250


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize("preempted", [False, True])
def test_the_slurm_job_starts_processes_on_all_machines_and_resumes_after_a_requeue(tmp_path, preempted):
    page = (DOCS / "distributed.md").read_text()
    (tmp_path / "job").write_text(re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1])
    for name, body in (("scontrol", "printf 'node1\\nnode2\\n'"), ("srun", 'printf "%s\\n" "$*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    if preempted:
        (tmp_path / "out" / "checkpoint.pth").write_text("")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "OUT": "out",
                 "START": "first.pth"}  # fmt: skip
    run = subprocess.run(["bash", "job"], cwd=tmp_path, env=JOB | variables, capture_output=True, text=True, check=True)
    torchrun, *words = run.stdout.split()
    assert torchrun == "torchrun"
    assert words[: words.index("main.py")] == [
        "--nnodes", "2", "--nproc_per_node", "8", "--rdzv_id", "1234567", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "node1:34567",
    ]  # fmt: skip
    script, parsed = parse_torchrun(words)
    assert script == "main.py"
    assert parsed.options.resume == ("out/checkpoint.pth" if preempted else "first.pth")
    assert parsed.options.output_dir == "out" and parsed.options.amp == "bf16"
