"""`hocket workflows`: what a request can be made of, and how operators say so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from hocket.cli.common import Address, StateDir, client_of, console, run, settings
from hocket.client import HocketClient
from hocket.errors import InvalidRequest, WrongConfig
from hocket.v1.workflows_pb2 import WorkflowInput, WorkflowSpec
from hocket.workflows.catalogue import port_type_name
from hocket.workflows.content import PROMPTS, digest_of, named
from hocket.workflows.drawing import drawn, mermaid
from hocket.workflows.files import read_file, to_document
from hocket.workflows.shipped import faults_of_name, shipped

workflows = typer.Typer(
    help="Lists, shows, checks, registers and deletes workflows.", no_args_is_help=True
)
File = Annotated[Path, typer.Argument(help="Workflow file, .toml or .json (docs/workflows.md).")]
Name = Annotated[str, typer.Argument(help="Name, or name@digest for one version.")]


class Form(StrEnum):
    """How a workflow is shown."""

    GRAPH = "graph"
    MERMAID = "mermaid"
    JSON = "json"


@workflows.command("list")
def list_(address: Address = None, state_dir: StateDir = None) -> None:
    """Lists the workflows beside the models' own, and the files that each takes."""
    found = settings(state_dir, address)

    async def work() -> Sequence[WorkflowSpec]:
        async with client_of(found) as client:
            return await client.workflows()

    name, told = (Column(head, overflow="fold") for head in ("workflow", "what it does"))
    table = Table(name, "digest", "inputs", told, "")
    for spec in run(work()):
        inputs = " ".join(f"{i.name}?" if i.optional else i.name for i in files_of(spec))
        kind = "shipped" if spec.shipped else ""
        table.add_row(spec.name, spec.digest[:16], inputs, spec.description, kind)
    console.print(table)


@workflows.command("show")
def show(
    name: Name,
    form: Annotated[Form, typer.Option("--as", help="A tree, Mermaid text, or a file.")] = (
        Form.GRAPH
    ),
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Draws a workflow from its output back to what a request brings.

    hocket workflows show two-pass --as json > mine.json
    """
    if name in shipped():
        _show(shipped()[name], form)
        return
    found = settings(state_dir, address)

    async def work() -> WorkflowSpec:
        async with client_of(found) as client:
            return await client.workflow(name)

    _show(run(work()), form)


@workflows.command("check")
def check(file: File) -> None:
    """Tells everything that is wrong with a workflow file, with the lines; asks nobody."""

    async def work() -> WorkflowSpec:
        spec = read_file(file)
        if taken := faults_of_name(spec.name):
            raise InvalidRequest(taken)
        return spec

    spec = run(work())
    spec.digest = digest_of(spec)
    _show(spec, Form.GRAPH)


@workflows.command("register")
def register(file: File, address: Address = None, state_dir: StateDir = None) -> None:
    """Registers a workflow file under its name; another content is a new version of it.

    Where gateways ask for API keys it takes one of `hocket keys add --operator`.
    """
    found = settings(state_dir, address)

    async def work() -> WorkflowSpec:
        spec = read_file(file)
        async with client_of(found) as client:
            return await client.register_workflow(spec)

    console.print(f"registered {named(run(work()))}", markup=False, soft_wrap=True)


@workflows.command("delete")
def delete(
    name: Annotated[str, typer.Argument(help="Name; all its versions go.")],
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Forgets a registered workflow; requests that were accepted go on."""
    found = settings(state_dir, address)

    async def work() -> None:
        async with client_of(found) as client:
            await client.delete_workflow(name)

    run(work())
    console.print(f"deleted {name}", markup=False)


def files_of(spec: WorkflowSpec) -> list[WorkflowInput]:
    """What a request has to upload."""
    return [item for item in spec.inputs if item.name not in PROMPTS]


async def upload(
    client: HocketClient, workflow: str, files: Mapping[str, Path], tenant: str
) -> dict[str, str]:
    """Uploads what a workflow takes, masks as masks; names by input. A name that PutInput gave is
    taken as it is."""
    if not workflow:
        raise WrongConfig("--input", ", ".join(files), "with --workflow, which says what it takes")
    spec = await client.workflow(workflow)
    masks = {
        text[1:] for node in spec.nodes if node.op == "load_mask" for text in node.inputs.values()
    }
    found = {}
    for name, file in files.items():
        if str(file).startswith("sha256:"):  # it was uploaded before
            found[name] = str(file)
            continue
        stored = await client.put_input(file, mask=name in masks, tenant=tenant)
        found[name] = stored.name
        told = "".join(f"; {conversion}" for conversion in stored.conversions)
        console.print(f"{name}: {stored.width}x{stored.height}{told}", markup=False)
    return found


def named_files(said: Sequence[str]) -> dict[str, Path]:
    """Of "NAME=FILE", as often as it was given. Raises WrongConfig."""
    found: dict[str, Path] = {}
    for item in said:
        name, equals, file = item.partition("=")
        if not (name and equals and file) or name in found:
            allowed = "NAME=FILE, each input of the workflow once: image=photo.jpg"
            raise WrongConfig("--input", item, allowed)
        found[name] = Path(file)
    return found


def _show(spec: WorkflowSpec, form: Form) -> None:
    if form is Form.JSON:
        text = json.dumps(to_document(spec), indent=2, ensure_ascii=False)
        console.print(text, markup=False, soft_wrap=True)
    elif form is Form.MERMAID:
        console.print(mermaid(spec), markup=False, soft_wrap=True, end="")
    else:
        console.print(f"{named(spec)}  {spec.description}", markup=False, soft_wrap=True)
        for item in spec.inputs:
            kind = port_type_name(item.type) + (", optional" if item.optional else "")
            console.print(f"  ${item.name}: {kind}  {item.description}".rstrip(), markup=False)
        console.print(drawn(spec), soft_wrap=True)
