"""Regenerates hocket/v1/*_pb2*.py from proto/: `make proto`.

The stubs are committed, so that neither users nor CI need the generator; a test regenerates them
into a temporary folder and compares.
"""

import os
import sys
import sysconfig
from pathlib import Path

import grpc_tools
from google.longrunning import operations_pb2
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
            *google_paths(),
            f"--python_out={out}",
            f"--mypy_out={out}",
            *services,
            name,
        ]
        if services:
            args.insert(-1, f"--mypy_grpc_out={out}")
        if protoc.main(args) != 0:
            raise RuntimeError(f"protoc failed on {name}")


def google_paths() -> list[str]:
    """protoc's options that find the google protos that the contract imports.

    They come with googleapis-common-protos, where one file has another name than the published one.
    """
    site = Path(operations_pb2.__file__).parents[2]
    operations = "google/longrunning/operations"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    return [
        f"-I{operations}.proto={site / operations}_proto.proto",
        f"-I{site}",
        f"-I{well_known}",
    ]


def _has_service(path: Path) -> bool:
    return any(line.startswith("service ") for line in path.read_text().splitlines())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
