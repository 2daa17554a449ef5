"""The shape of the code: its size, the one way that imports run, and the README's tree."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lib").rglob("*.py"))
PROGRAMS = sorted(ROOT.glob("*.py"))
LAYERS = [  # each imports from those below it, or from its own
    ["lib.distributed"],
    ["lib.cli"],
    ["lib.runtime", "lib.files"],
    ["lib.model", "lib.data", "lib.losses", "lib.collectives"],  # a JobShard is a Shard of lib.model
    ["lib.config"],
    ["lib.checkpoints"],
    ["lib.prepare", "lib.training", "lib.evaluation", "lib.ablation", "lib.search"],
    ["lib.figures", "lib.share"],
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of lib that a file imports, within functions too; lib itself, which holds the version, is left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else str(node.module) for name in names)
    return {name for name in found if name in MODULES and name != "lib"}


GRAPH = {name: imports(path) for name, path in MODULES.items() if name != "lib"}


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if any(f"{module}.".startswith(f"{name}.") for name in names))


def test_imports_run_in_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_run_one_way():
    wrong = [f"{name} imports {other}" for name in GRAPH for other in GRAPH[name] if layer(other) > layer(name)]
    model = [name for name in GRAPH if name.startswith("lib.model")]
    wrong += [f"{name} imports {other}" for name in model for other in GRAPH[name] if not other.startswith("lib.model")]
    assert not wrong


def test_flags_are_read_without_pytorch():
    code = "import sys, lib.config, lib.cli, lib.distributed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_code_stays_small():
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(FILES) <= 73
    assert len(lines) <= 12948
    assert max(map(len, lines)) <= 120


def test_the_readme_tells_where_every_file_is_and_names_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## Where things are")[1].split("```")[1]
    for before, names, after in re.findall(r"(\w*)\{([\w,]+)\}([\w.]*)", tree):  # train_{f30k,coco}.sh
        tree += "".join(f" {before}{name}{after}" for name in names.split(","))
    tree = re.sub(r"\S*\{\S*", "", tree)
    named = set(re.findall(r"[\w.]+\.(?:py|sh|md|png)\b|\w+(?=/)", tree))
    files = [path for path in FILES if not path.name.startswith("__")] + PROGRAMS + sorted(ROOT.glob("*.sh"))
    files += [path for folder in ("benchmarks", "docs") for path in (ROOT / folder).iterdir() if path.suffix]
    folders = [path.parent for path in FILES] + [ROOT / name for name in ("benchmarks", "docs", "tests")]
    wanted = {path.name for path in files + folders}
    there = {path.name for path in ROOT.iterdir()}
    there |= {path.name for folder in ("lib", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*")}
    assert wanted - named == set(), "not in the README's tree"
    assert named - there == set(), "in the README's tree only"
