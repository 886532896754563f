"""buf over the contract: `python tools/contract.py lint` and `… breaking AGAINST`.

The contract imports google.longrunning, which buf would fetch from its registry. Here it takes what
lies in googleapis-common-protos, and so works offline: both trees are copied beside each other.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.longrunning import operations_pb2

ROOT = Path(__file__).resolve().parent.parent
_WORKSPACE = """\
version: v2
modules:
  - path: proto
  - path: google
    lint: {ignore: [google]}
"""
_IMPORTED = ("api/annotations", "api/client", "api/field_behavior", "api/http", "api/launch_stage")


def stage(root: Path, into: Path) -> Path:
    """A workspace in `into` that holds the contract of `root` and what it imports."""
    shutil.copytree(root / "proto", into / "proto")
    rules = (root / "buf.yaml").read_text().partition("lint:")
    (into / "buf.yaml").write_text(_WORKSPACE + rules[1] + rules[2])
    site, google = Path(operations_pb2.__file__).parents[1], into / "google" / "google"
    for name in (*_IMPORTED, "rpc/status"):
        target = google / f"{name}.proto"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site / f"{name}.proto", target)
    (google / "longrunning").mkdir(parents=True)
    published = google / "longrunning/operations.proto"
    shutil.copy(site / "longrunning/operations_proto.proto", published)
    return into


def buf(*args: str, at: Path) -> subprocess.CompletedProcess[str]:
    """Runs buf in a workspace."""
    tool = Path(sysconfig.get_path("scripts")) / "buf"
    return subprocess.run([str(tool), *args], cwd=at, capture_output=True, text=True, check=False)


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """buf lint over the contract of `root`."""
    with tempfile.TemporaryDirectory(prefix="hocket-contract-") as folder:
        return buf("lint", at=stage(root, Path(folder)))


def breaking(root: Path, against: Path) -> subprocess.CompletedProcess[str]:
    """buf breaking over the contract of `root`, beside that of `against`."""
    with tempfile.TemporaryDirectory(prefix="hocket-contract-") as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        new.mkdir()
        old.mkdir()
        stage(root, new)
        return buf("breaking", "--against", str(stage(against, old)), at=new)


def checkout(revision: str, into: Path) -> Path:
    """The contract as it stands at a revision of this repository."""
    archive = subprocess.run(
        ["git", "archive", revision, "proto", "buf.yaml"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(into)], input=archive, check=True)
    return into


def main() -> int:
    """Runs what the command line says, prints what buf says, returns its status."""
    if sys.argv[1:2] == ["breaking"]:
        with tempfile.TemporaryDirectory(prefix="hocket-contract-") as folder:
            run = breaking(ROOT, checkout((sys.argv[2:] or ["main"])[0], Path(folder)))
    else:
        run = lint(ROOT)
    print(run.stdout + run.stderr, end="")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
