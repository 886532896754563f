"""Calls of operations on artifacts: real workers on a real bus, driven by assignments by hand."""

from __future__ import annotations

import asyncio
import hashlib
import io
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from nats.js.api import ObjectStoreConfig
from PIL import Image
from safetensors.torch import save_file

from gpuworker.loading import load_card
from gpuworker.models.card import Asked, ModelCard
from gpuworker.operations.pictures import resized
from gpuworker.state import LatentState
from hocket import loras
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker import call_tasks
from tests.worker import worker_tasks as tasks
from tests.worker.call_mesh import LARGE, STEPS, Mesh, given
from tests.worker.tiny_adapters import FLUX_LAYERS, adapter
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, meet
from tests.worker.worker_pool import CPU, Pool

SMALL, STRENGTH = (16, 16), 0.5


@pytest.fixture
def names(pool: Pool) -> Iterator[tuple[str, str]]:
    chosen = (pool.names[0], pool.names[1])
    yield chosen
    pool.heal()
    for name in chosen:
        if name in pool.names:
            pool.one(name, call_tasks.close_worker)


@pytest.fixture
def folder(flux: Reference, tmp_path: Path) -> str:
    """The tiny Flux with two adapters beside it."""
    copy = shutil.copytree(flux.folder, tmp_path / Path(flux.folder).name)
    (copy / "loras").mkdir()
    denoiser = FluxTransformer2DModel.from_pretrained(copy / "transformer", low_cpu_mem_usage=False)
    for place, (name, modules) in enumerate(FLUX_LAYERS.items()):
        weights = adapter(denoiser, modules, rank=2 + place, seed=place)
        save_file(weights, copy / "loras" / f"{name}.safetensors")
    return str(copy)


@pytest.fixture
async def mesh(
    bus: Bus,
    subjects: Subjects,
    nats_url: str,
    names: tuple[str, str],
    pool: Pool,
    flux: Reference,
    folder: str,
    tmp_path: Path,
) -> AsyncIterator[Mesh]:
    model = load_card(folder, CPU, torch.float32).facts.name
    made = Mesh(bus, subjects, names, {}, model, str(flux.settings["prompt"]), pool)
    await made.listen()
    for name in names:
        opening = (folder, nats_url, subjects.cluster, str(tmp_path))
        address = await asyncio.to_thread(pool.one, name, call_tasks.open_worker, *opening)
        made.addresses[name] = address
    await made.until(lambda: set(made.beats) == set(names))
    yield made
    made.rendezvous.close()


def two_passes(mesh: Mesh) -> dict[str, mesh_pb2.Assignment]:
    """A small picture, made larger, and denoised again on both workers."""
    a, b = mesh.workers
    on_a, on_b = mesh.holder(a), mesh.holder(b)
    text = [mesh_pb2.NodeInput(port="prompt", text=mesh.prompt)]
    embeddings = given("embeddings", "text.embeddings", 0, on_a)
    first = given("latents", "first.latents", STEPS, mesh.holder(a, STEPS))
    half = int(STEPS * STRENGTH)
    second = given("latents", "second.latents", half, mesh.holder(a, half), mesh.holder(b, half))
    again = given("latents", "again.latents", 0, on_b)

    def one(worker: str, call: mesh_pb2.NodeCall) -> mesh_pb2.Assignment:
        return mesh.order((worker,), {"r": call})

    return {
        "text": one(a, mesh.call("encode_prompt", "text.embeddings", LARGE, text)),
        "first": mesh.order(
            (a,),
            {"r": mesh.call("denoise", "first.latents", SMALL, [embeddings])},
            count=STEPS,
            total=STEPS,
        ),
        "small": one(a, mesh.call("decode", "small.image", SMALL, [first])),
        "grow": one(
            b, mesh.call("resize", "grow.image", LARGE, [given("image", "small.image", 0, on_a)])
        ),
        "again": one(
            b,
            mesh.call(
                "encode_image", "again.latents", LARGE, [given("image", "grow.image", 0, on_b)]
            ),
        ),
        "second": mesh.order(
            (b, a),
            {
                "r": mesh.call(
                    "denoise",
                    "second.latents",
                    LARGE,
                    [embeddings, again],
                    strength=STRENGTH,
                    seed_offset=1,
                )
            },
            count=half,
            total=half,
        ),
        "final": one(a, mesh.call("decode", "final.image", LARGE, [second])),
        "file": one(
            b,
            mesh.call("make_media", "file.media", LARGE, [given("image", "final.image", 0, on_a)]),
        ),
    }


def made_here(card: ModelCard, prompt: str) -> dict[str, Any]:
    """The same calls in this process, up to the beginning of the second pass."""
    asked = Asked(prompt, "", *LARGE, 1, STEPS, 3.5, 7)
    embeddings = card.embed(asked)
    first = card.begin(embeddings, asked._replace(width=SMALL[0], height=SMALL[1]))
    while not first.finished:
        (first,) = card.step([first], None)
    grown = resized(card.decode(first), *LARGE, "lanczos")
    again = card.encode_image(grown, 7)
    second = card.begin(embeddings, asked._replace(seed=8), again, STRENGTH)
    return {"first": first, "grown": grown, "again": again, "second": second}


def stepped_on_two(mesh: Mesh, folder: str, begun: LatentState) -> bytes:
    """All steps of a state by two other processes, which know cards and groups, and no engine."""
    names = mesh.pool.names[2:4]
    mesh.rendezvous.put("direct", begun.to_bytes())
    meeting, address = meet(mesh.pool, names), mesh.rendezvous.address
    segment = tasks.Segment(folder, "direct", meeting, begun.steps_total, 0, address)
    assert mesh.pool.each(names, tasks.denoise, segment) == [begun.steps_total] * 2
    made = mesh.pool.one(names[0], tasks.blob, "direct")
    mesh.pool.each(names, tasks.forget, "direct")
    return bytes(made)


async def test_two_passes_on_two_workers_equal_the_same_calls_in_one_process(
    mesh: Mesh, flux: Reference
) -> None:
    a, b = mesh.workers
    orders = two_passes(mesh)
    reports = dict(zip(orders, await mesh.done(*orders.values()), strict=True))
    assert not any(r.HasField("failure") for r in reports.values()), reports
    here = made_here(load_card(flux.folder, CPU, torch.float32), mesh.prompt)
    first = LatentState.from_bytes(await mesh.artifact(a, "first.latents", STEPS))
    assert torch.equal(first.tensors["latents"], here["first"].tensors["latents"])
    grown = LatentState.from_bytes(await mesh.artifact(b, "grow.image"))
    assert np.array_equal(grown.tensors["pixels"].numpy(), here["grown"])
    second = await asyncio.to_thread(stepped_on_two, mesh, flux.folder, here["second"])
    for worker in (a, b):
        assert await mesh.artifact(worker, "second.latents", int(STEPS * STRENGTH)) == second
    store = await mesh.bus.jetstream.object_store(mesh.subjects.media_bucket)
    (told,) = reports["file"].results
    file = await store.get(told.media.object_name)
    pixels = np.asarray(Image.open(io.BytesIO(file.data or b"")))
    final = LatentState.from_bytes(await mesh.artifact(a, "final.image"))
    assert np.array_equal(pixels, final.tensors["pixels"][0].numpy())


async def test_a_prompt_asked_twice_is_encoded_once_and_teaches_no_time(mesh: Mesh) -> None:
    a = mesh.workers[0]
    text = [mesh_pb2.NodeInput(port="prompt", text=mesh.prompt)]
    call = mesh.call("encode_prompt", "text.embeddings", LARGE, text)
    orders = [mesh.order((a,), {request: call}) for request in ("r", "again")]
    made, recalled = await mesh.done(*orders)
    assert made.step_time_us and not recalled.step_time_us, "what was kept is no measurement"
    assert [result.request_id for result in recalled.results] == ["again"]
    artifacts = [await mesh.artifact(a, "text.embeddings", 0, r) for r in ("r", "again")]
    assert artifacts[0] == artifacts[1]
    await mesh.until(lambda: mesh.beats[a].memory.prompts_recalled)
    memory = mesh.beats[a].memory
    assert (memory.prompts_recalled, memory.prompts_encoded) == (1, 1) and memory.prompts_bytes


async def test_what_a_lost_worker_held_is_named_and_made_again(mesh: Mesh) -> None:
    a, b = mesh.workers
    orders = two_passes(mesh)
    until_grown = [orders[name] for name in ("text", "first", "small", "grow")]
    await mesh.done(*until_grown)
    grown = await mesh.artifact(b, "grow.image")
    await asyncio.to_thread(mesh.pool.kill, b)

    def again(*holders: types_pb2.LatentHolder) -> mesh_pb2.Assignment:
        call = mesh.call(
            "encode_image", "again.latents", LARGE, [given("image", "grow.image", 0, *holders)]
        )
        return mesh.order((a,), {"r": call})

    (lost,) = await mesh.done(again(mesh.holder(b)))
    assert (lost.failure.reason, lost.failed_job.artifact) == ("LATENT_MISSING", "grow.image")
    assert (list(lost.failed_job.tried), lost.failed_job.request_id) == ([b], "r")
    assert not lost.results, "a call that is made once leaves nothing by halves"
    resize = mesh.order((a,), {"r": orders["grow"].batch[0].call})
    made = await mesh.done(resize, again(mesh.holder(b), mesh.holder(a)))
    assert not any(report.HasField("failure") for report in made)
    assert await mesh.artifact(a, "grow.image") == grown
    await mesh.bus.publish(mesh.subjects.assign(a), mesh_pb2.Assign(term=1, released=["r"]))
    await mesh.until(lambda: not mesh.beats[a].latents)


async def test_a_file_that_is_missing_ends_its_job_alone(mesh: Mesh) -> None:
    a, _ = mesh.workers
    bucket = mesh.subjects.input_bucket
    store = await mesh.bus.jetstream.create_object_store(bucket, ObjectStoreConfig(bucket=bucket))
    content = png(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
    good = f"t/sha256:{hashlib.sha256(content).hexdigest()}"
    wrong = f"t/sha256:{'0' * 64}"
    for name in (good, wrong):
        await store.put(name, content)
    names = {"r": good, "gone": "t/sha256:gone", "wrong": wrong}
    calls = {
        request: mesh.call(
            "load_image",
            "load.image",
            LARGE,
            [mesh_pb2.NodeInput(port="image", object_name=name)],
            fit="stretch",
        )
        for request, name in names.items()
    }
    calls["askew"] = mesh.call("load_image", "load.image", LARGE, calls["r"].inputs, fit="sideways")
    order = mesh.order((a,), calls)
    (last,) = await mesh.done(order)
    assert [result.request_id for result in last.results] == ["r"]
    failed = {r.failed_job.request_id: r for r in mesh.of(order) if r.HasField("failure")}
    assert {r: (f.failure.reason, f.failed_job.artifact) for r, f in failed.items()} == {
        "gone": ("INPUT_MISSING", names["gone"]),
        "wrong": ("INPUT_MISSING", names["wrong"]),
        "askew": ("CALL_REFUSED", ""),
    }
    loaded = LatentState.from_bytes(await mesh.artifact(a, "load.image"))
    assert loaded.tensors["pixels"].shape == (1, LARGE[1], LARGE[0], 3)
    # Alone, it is the failure of the run.
    (alone,) = await mesh.done(mesh.order((a,), {"gone": calls["gone"]}))
    assert (alone.failure.reason, alone.failed_job.request_id) == ("INPUT_MISSING", "gone")
    (alone,) = await mesh.done(mesh.order((a,), {"askew": calls["askew"]}))
    assert (alone.failure.reason, alone.failed_job.request_id) == ("CALL_REFUSED", "askew")
    assert "settings.fit=sideways: allowed is cover" in alone.failure.message


async def test_what_one_member_lacks_takes_its_job_off_on_all(mesh: Mesh) -> None:
    """The plan says that both members have everything; one has no latents of one job."""
    a, b = mesh.workers
    for worker in (a, b):
        text = [mesh_pb2.NodeInput(port="prompt", text=mesh.prompt)]
        calls = {r: mesh.call("encode_prompt", "text.embeddings", LARGE, text) for r in ("r", "s")}
        await mesh.done(mesh.order((worker,), calls))
    both = (mesh.holder(a), mesh.holder(b))
    first = mesh.call(
        "denoise", "first.latents", LARGE, [given("embeddings", "text.embeddings", 0, *both)]
    )
    lacking = mesh.call(
        "denoise",
        "first.latents",
        LARGE,
        [
            given("embeddings", "text.embeddings", 0, *both),
            given("latents", "nowhere.latents", 0, *both),
        ],
    )
    order = mesh.order((a, b), {"r": first, "s": lacking}, count=2, total=2)
    (last,) = await mesh.done(order)
    (failed,) = [r for r in mesh.of(order) if r.HasField("failure")]
    assert failed.failed_job.request_id == "s" and failed.failure.reason == "LATENT_MISSING"
    assert failed.failed_job.artifact == "nowhere.latents"
    assert {r.request_id: r.steps_done for r in last.results} == {"r": 2}
    states = [await mesh.artifact(worker, "first.latents", 2) for worker in (a, b)]
    assert states[0] == states[1]


async def test_heartbeats_say_what_a_worker_can_do_and_has(mesh: Mesh) -> None:
    a, _ = mesh.workers
    orders = two_passes(mesh)
    await mesh.done(*(orders[name] for name in ("text", "first", "small")))
    await mesh.until(lambda: len(mesh.beats[a].latents) == 3)
    held = {each.artifact: each for each in mesh.beats[a].latents}
    assert {name: each.steps_done for name, each in held.items()} == {
        "text.embeddings": 0,
        "first.latents": STEPS,
        "small.image": 0,
    }
    assert held["small.image"].size_bytes == SMALL[0] * SMALL[1] * 3
    assert mesh.beats[a].memory.latents_bytes == sum(e.size_bytes for e in held.values())
    (model,) = mesh.beats[a].models
    assert {"encode_prompt", "denoise", "decode", "encode_image"} <= set(model.operations)
    assert {"load_image", "load_mask", "resize", "make_media"} == set(mesh.beats[a].operations)


async def test_steps_go_on_from_a_passes_own_latents_and_stop_where_they_are_told(
    mesh: Mesh,
) -> None:
    a, b = mesh.workers
    orders = two_passes(mesh)
    await mesh.done(orders["text"])
    call = orders["first"].batch[0].call
    begun = mesh.order((a,), {"r": call}, count=1, total=STEPS)
    await mesh.done(begun)
    own = mesh.call(
        "denoise", "first.latents", SMALL, [given("latents", "first.latents", 1, mesh.holder(a))]
    )
    further = mesh.order((b,), {"r": own}, first=1, count=STEPS - 1, total=STEPS)
    (last,) = await mesh.done(further)
    assert [result.steps_done for result in last.results] == [STEPS]
    moved = await mesh.artifact(b, "first.latents", STEPS)
    (last,) = await mesh.done(mesh.order((a,), {"r": call}, count=STEPS, total=STEPS))
    assert await mesh.artifact(a, "first.latents", STEPS) == moved
    # Called off before it comes: nothing of it is made.
    await mesh.bus.publish(
        mesh.subjects.truncate(a), mesh_pb2.Truncate(term=1, request_id="r", attempt=0)
    )
    (off,) = await mesh.done(mesh.order((a,), {"r": orders["small"].batch[0].call}))
    assert off.failure.reason == "TRUNCATED"


async def test_plain_jobs_with_different_adapters_share_batches_and_keep_them(
    mesh: Mesh, folder: str
) -> None:
    """Encoded together, begun on one worker, gone on with on two, and at the end on the other."""
    a, b = mesh.workers
    wanted = {"r": [], "s": ["style:0.8"], "t": ["detail:-0.5", "style"]}

    def order(workers: tuple[str, ...], node: str, first: int, count: int, *at: str) -> Any:
        call = mesh.call("denoise", f"{node}.latents", LARGE, [])
        made = mesh.order(
            workers, dict.fromkeys(wanted, call), first=first, count=count, total=STEPS
        )
        for member in made.batch:
            member.ClearField("call")
            member.spec.workflow = "txt2img"
            member.spec.loras[:] = wanted[member.request_id]
            member.holders.extend(mesh.holder(worker, first) for worker in at)
        return made

    orders = [
        order((a,), "text", 0, 1),
        order((a,), "dit", 0, 1, a),
        order((a, b), "dit", 1, 2, a),
        order((b,), "dit", 3, 1, a, b),
    ]
    for one in orders:
        (last,) = await mesh.done(one)
        assert not last.HasField("failure") and len(last.results) == len(wanted), last
    card = load_card(folder, CPU, torch.float32)
    asked = Asked(mesh.prompt, "", *LARGE, 1, STEPS, 3.5, 7)
    for request, names in wanted.items():
        scales = dict(lora for lora in map(loras.parsed, names) if lora is not None)
        state = card.begin(card.embed(asked), asked, loras=scales)
        while not state.finished:
            (state,) = card.step([state], None)
        made = LatentState.from_bytes(await mesh.artifact(b, "", STEPS, request))
        apart = made.tensors["latents"] - state.tensors["latents"]
        assert float(apart.abs().max()) <= LATENT_TOLERANCE, request
    odd = order((a,), "text", 0, 1)
    odd.batch[1].spec.loras[:] = ["stile"]
    (last,) = await mesh.done(odd)
    assert {result.request_id for result in last.results} == {"r", "t"}
    (failed,) = [report for report in mesh.of(odd) if report.HasField("failure")]
    assert failed.failed_job.request_id == "s" and "detail, style" in failed.failure.message


def png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
