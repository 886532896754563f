"""Regenerates hocket/v1/*_pb2*.py from proto/: `make proto`.

The stubs are committed, so that neither users nor CI need the generator; a test regenerates them
into a temporary folder and compares.
"""

import os
import sys
import sysconfig
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> None:
    """Writes stubs of every proto file below `out`; raises RuntimeError when protoc refuses one."""
    # protoc looks its plugins (mypy-protobuf) up on the PATH.
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    for name in protos:
        services = ["--grpc_python_out", str(out)] if _has_service(ROOT / "proto" / name) else []
        args = [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"--python_out={out}",
            f"--mypy_out={out}",
            *services,
            name,
        ]
        if services:
            args.insert(-1, f"--mypy_grpc_out={out}")
        if protoc.main(args) != 0:
            raise RuntimeError(f"protoc failed on {name}")


def _has_service(path: Path) -> bool:
    return any(line.startswith("service ") for line in path.read_text().splitlines())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
