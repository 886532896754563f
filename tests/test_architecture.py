"""The house rules of docs/ARCHITECTURE.md, checked by machine, each with a planted negative."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import contract

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hocket", "gateway", "control", "gpuworker", "bench", "tests", "tools")
LINES_A_FUNCTION, LINES_A_FILE, COLUMNS = 70, 400, 100
SERVICE_RUST_FREE = ("gateway", "control", "client")
# Inside the scheduler library, between its values and a policy's own arrays or books.
# Indexes of compiled code name `improve.Start`: after a renaming, an upgrade finds them broken.
STANDING_TWICE = {"Start"}
READS_ENVIRONMENT = re.compile(
    r"\bos\.environ\b(?!\.setdefault)|\bfrom os import [^\n]*\benviron\b"
)


def sources() -> list[Path]:
    found = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return [p for p in found if "_pb2" not in p.name]


def oversized(text: str, name: str) -> list[str]:
    """What in a source text breaks a size limit."""
    lines = text.splitlines()
    found = [f"{name}: {len(lines)} lines"] if len(lines) > LINES_A_FILE else []
    found += [
        f"{name}:{number}: {len(line)} columns"
        for number, line in enumerate(lines, 1)
        if len(line) > COLUMNS
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            if size > LINES_A_FUNCTION:
                found.append(f"{name}:{node.lineno}: {node.name} has {size} lines")
    return found


def test_files_and_functions_are_small() -> None:
    found = [o for p in sources() for o in oversized(p.read_text(), str(p.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_size_check_sees_what_is_too_large() -> None:
    body = "\n".join("    x = 1" for _ in range(LINES_A_FUNCTION))
    assert oversized(f"def f():\n{body}\n", "planted")
    assert oversized("x = 1\n" * (LINES_A_FILE + 1), "planted")
    assert oversized("x" * (COLUMNS + 1), "planted")
    assert not oversized("def f():\n    return 1\n", "planted")


def test_import_contracts() -> None:
    run = _tool("lint-imports")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('modules = ["time", ', 'modules = ["msgspec", "time", ', "msgspec"),
        ('["control", "control.*", ', '["control.scheduler.policies.hocket.*", ', "numba"),
        ('["hocket", "gateway"]', '["hocket", "gateway", "control"]', "numba"),
    ],
)
def test_import_contracts_see_a_breach(old: str, new: str, told: str, tmp_path: Path) -> None:
    config = (ROOT / "pyproject.toml").read_text()
    config = config[config.index("[tool.importlinter]") :]
    planted = config.replace(old, new)
    assert planted != config
    (tmp_path / "pyproject.toml").write_text(planted)
    run = _tool("lint-imports", "--config", str(tmp_path / "pyproject.toml"))
    assert run.returncode != 0
    assert "control.scheduler" in run.stdout and f"-> {told}" in run.stdout


def test_style() -> None:
    run = _tool("ruff", "check", ".")
    assert run.returncode == 0, run.stdout
    run = _tool("ruff", "format", "--check", ".")
    assert run.returncode == 0, run.stdout


def test_clock_and_environment_bans_bite() -> None:
    for line in ("import time\ntime.monotonic()\n", "import os\nos.getenv('X')\n"):
        run = _tool("ruff", "check", "--stdin-filename", "control/planted.py", "-", text=line)
        assert "TID251" in run.stdout


def names_standing_twice(texts: dict[str, str]) -> dict[str, list[str]]:
    """Public classes whose name stands at the top of several source texts, and in which."""
    places: dict[str, list[str]] = {}
    for name, text in texts.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    return {name: where for name, where in places.items() if len(where) > 1}


def test_a_class_name_means_one_thing() -> None:
    texts = {
        str(p.relative_to(ROOT)): p.read_text()
        for p in sources()
        if p.relative_to(ROOT).parts[0] not in ("tests", "tools")
    }
    found = names_standing_twice(texts)
    assert found.keys() == STANDING_TWICE, found


def test_class_name_check_sees_a_second_meaning() -> None:
    planted = {
        "one": "class Layout:\n    pass\nclass _Row:\n    pass\n",
        "two": "class Layout:\n    pass\nclass _Row:\n    pass\n",
        "three": "from one import Layout\nclass Other:\n    class Layout:\n        pass\n",
    }
    assert names_standing_twice(planted) == {"Layout": ["one", "two"]}


def environment_readers(texts: dict[str, str]) -> set[str]:
    """Names of those source texts that read the environment; setting a default is none."""
    return {name for name, text in texts.items() if READS_ENVIRONMENT.search(text)}


def test_environment_is_read_in_one_place() -> None:
    texts = {
        str(p.relative_to(ROOT)): p.read_text()
        for p in sources()
        if p.relative_to(ROOT).parts[0] in ("hocket", "gateway", "control", "gpuworker")
    }
    found = environment_readers(texts)
    assert "hocket/config.py" in found
    assert found <= {"hocket/config.py", "hocket/tracing/telemetry.py"}, found


def test_environment_rule_sees_a_read() -> None:
    planted = {
        "item": "import os\nX = os.environ['X']\n",
        "get": "import os\nX = os.environ.get('X')\n",
        "copy": "import os\nX = {**os.environ}\n",
        "name": "from os import path, environ\nX = environ['X']\n",
        "default": "import os\nos.environ.setdefault('X', '1')\n",
        "other": "import os\nX = os.getcwd()\n",
    }
    assert environment_readers(planted) == {"item", "get", "copy", "name"}


def test_types() -> None:
    run = _tool("mypy")
    assert run.returncode == 0, run.stdout


def test_types_see_what_is_wrong(tmp_path: Path) -> None:
    """Under our settings, which are strict."""
    found = {}
    for name, line in {
        "right": "def f(x: int) -> str:\n    return str(x)\n",
        "wrong": "def f(x: int) -> str:\n    return x\n",
        "untyped": "def f(x):\n    return x\n",
    }.items():
        (tmp_path / f"planted_{name}.py").write_text(line)
        settings = ("--config-file", str(ROOT / "pyproject.toml"))
        run = _tool("mypy", *settings, str(tmp_path / f"planted_{name}.py"))
        found[name] = (run.returncode, set(re.findall(r"\[([a-z-]+)\]", run.stdout)))
    assert found == {
        "right": (0, set()),
        "wrong": (1, {"return-value"}),
        "untyped": (1, {"no-untyped-def"}),
    }


def planted_proto(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of what the contract is made of, in which one text stands for another."""
    shutil.copytree(ROOT / "proto", folder / "proto")
    shutil.copy(ROOT / "buf.yaml", folder)
    path = folder / "proto/hocket/v1" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder


def test_proto_lint() -> None:
    run = contract.lint(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


def test_proto_lint_sees_a_wrong_package(tmp_path: Path) -> None:
    planted = tmp_path / "proto/hocket/v1/planted.proto"
    planted.parent.mkdir(parents=True)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    planted.write_text('syntax = "proto3";\n\npackage hocket.v1;\n')
    assert _tool("buf", "lint", at=tmp_path).returncode == 0
    planted.write_text('syntax = "proto3";\n\npackage hocket.other;\n')
    run = _tool("buf", "lint", at=tmp_path)
    assert run.returncode != 0 and "hocket.other" in run.stdout, run.stdout + run.stderr


def test_proto_breaks_nothing_of_main(tmp_path: Path) -> None:
    """Passes without a comparison only where there is no main with a contract to compare with."""
    if (
        shutil.which("git") is None
        or _git("rev-parse", "--verify", "--quiet", "main:proto").returncode != 0
    ):
        return
    run = contract.breaking(ROOT, contract.checkout("main", tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr


def test_proto_comparison_sees_a_break(tmp_path: Path) -> None:
    taken = "uint32 stop_at_step = 4;"
    planted_proto(tmp_path, "mesh.proto", taken, "uint32 stop_at_step = 14;")
    run = contract.breaking(tmp_path, ROOT)
    assert run.returncode != 0 and "mesh.proto" in run.stdout, run.stdout + run.stderr


def stale_stubs(root: Path, out: Path) -> list[str]:
    """Committed stubs that are not what the proto files below `root` give."""
    command = [sys.executable, str(root / "tools/generate_stubs.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    fresh = {p.name: p.read_text() for p in out.glob("hocket/*/*_pb2*")}
    committed = {p.name: p.read_text() for p in ROOT.glob("hocket/*/*_pb2*")}
    assert fresh.keys() == committed.keys()
    return [name for name in fresh if fresh[name] != committed[name]]


def test_generated_stubs_are_in_step_with_proto(tmp_path: Path) -> None:
    stale = stale_stubs(ROOT, tmp_path)
    assert not stale, f"run `make proto`: {stale}"


def test_stub_comparison_sees_a_changed_field(tmp_path: Path) -> None:
    planted_proto(tmp_path, "mesh.proto", "uint32 stop_at_step = 4;", "uint64 stop_at_step = 4;")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/generate_stubs.py", tmp_path / "tools")
    (tmp_path / "out").mkdir()
    assert "mesh_pb2.py" in stale_stubs(tmp_path, tmp_path / "out")


def closure(extras: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Every installed distribution that `hocket[extras]` needs, hocket aside."""
    found: dict[str, metadata.Distribution] = {}
    todo: list[tuple[str, frozenset[str]]] = [("hocket", frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        distribution = metadata.distribution(name)
        if name != "hocket":
            found[canonicalize_name(name)] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            for extra in ("", *wanted):
                environment = {**default_environment(), "extra": extra}
                if requirement.marker is None or requirement.marker.evaluate(environment):
                    todo.append((requirement.name, frozenset(requirement.extras)))
                    break
    return found


def rust_built(distribution: metadata.Distribution) -> list[str]:
    """Compiled files of a distribution that the Rust compiler made (they name its runtime)."""
    marks = (b"rust_begin_unwind", b"rust_panic", b"/rustc/", b"library/core/src/panicking")
    found = []
    for file in distribution.files or ():
        if file.suffix in (".so", ".pyd", ".dylib"):
            content = Path(str(distribution.locate_file(file))).read_bytes()
            if any(mark in content for mark in marks):
                found.append(str(file))
    return found


@pytest.mark.parametrize("service", SERVICE_RUST_FREE)
def test_no_rust_and_no_torch_in_the_closure(service: str) -> None:
    needed = closure((service,))
    assert "torch" not in needed and "grpcio" in needed
    built = {name: rust_built(d) for name, d in needed.items()}
    assert not any(built.values()), {n: files for n, files in built.items() if files}


def test_rust_check_sees_rust() -> None:
    assert rust_built(metadata.distribution("safetensors"))
    assert "llvmlite" in closure(("control",))
    assert "torch" in closure(("worker",))


@pytest.mark.parametrize("module", ["gateway.service", "control.service", "hocket.cli.__main__"])
def test_services_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "False", run.stderr


def _tool(
    name: str, *arguments: str, text: str | None = None, at: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    path = Path(sysconfig.get_path("scripts")) / name
    return subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, cwd=at, input=text
    )


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
