"""An ending is stored before it is told; nobody else waits for it."""

from __future__ import annotations

from hocket.v1 import control_pb2, journal_pb2, mesh_pb2, types_pb2
from tests.control.stage import TERM, running


async def test_an_ending_is_stored_before_it_is_told() -> None:
    """While the broker stands still workers go on; clients hear nothing that could be undone."""
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "a", call=1)
        stage.submit(gateway, "b", call=2)
        await stage.until(lambda: len(gateway.answers) == 2)
        stage.shelf.is_open.clear()
        await stage.work()
        assert not {"finished"} & {*gateway.kinds("a"), *gateway.kinds("b")}
        assert stage.desk.records.open_count == 2
        stage.shelf.is_open.set()
        await stage.settle()
        assert gateway.kinds("a")[-1] == gateway.kinds("b")[-1] == "finished"
        assert stage.desk.records.open_count == 0


async def test_who_asked_for_what_cannot_be_done_is_told_why() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r")
        await stage.settle()
        (assignment,) = stage.assigned()
        why = "guidance_scale=40.0: allowed is 1..20"
        await stage.intake.report(
            mesh_pb2.StepReport(
                worker=assignment.group.members[0],
                incarnation="a",
                term=TERM,
                sequence=assignment.sequence,
                node=assignment.node,
                failure=types_pb2.Failure(reason="CALL_REFUSED", message=why),
                failed_job=mesh_pb2.FailedJob(request_id="r", batch=1),
                last=True,
            )
        )
        await stage.settle()
        (failed,) = [e.failed for e in gateway.events("r") if e.HasField("failed")]
        assert failed.reason == "CALL_REFUSED" and why in failed.message
        assert len(stage.assigned()) == 1, "no other try"


async def test_what_is_remembered_of_it_says_nothing_of_what_was_asked_for() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r", idempotency_key="k")
        await stage.work()
        opened, ended = stage.shelf.stored
        assert opened.submit.request.spec.prompt == "a fox"
        assert ended.submit.request.idempotency_key == "k" and ended.wish_sha256
        assert ended.accepted_unix_us > 0 and ended.ended.finished.media.object_name == "made"
        record = stage.desk.records.get("r")
        assert record is not None and not record.spec.prompt
        assert not record.accepted.effective_spec.prompt


async def test_events_are_numbered_alike_by_every_leader() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r", steps=3)
        await stage.work()
        told = [e.sequence for e in gateway.events("r")]
        assert told == sorted(set(told)) and told[0] > TERM << 32
        kept = stage.shelf.stored[-1]
    kept.term = TERM
    async with running() as heir:
        record = heir.desk.records.restore(kept, 0, 9)
        assert [e.sequence for e in record.since(1)] == [told[-1]]
        assert record.since(told[-1]) == []
        assert record.ended_unix_us == 9 and record.accepted_unix_us == kept.accepted_unix_us


async def test_media_of_an_attempt_that_was_called_off_do_not_count() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r", steps=1)
        await stage.settle()
        while stage.assigned()[-1].node != "vae":
            await stage.report(stage.assigned()[-1])
            await stage.advance(100_000)
        decode = stage.assigned()[-1]
        stale = type(decode)()
        stale.CopyFrom(decode)
        stale.batch[0].attempt += 1
        await stage.report(stale, media="stale")
        assert not gateway.kinds("r") or gateway.kinds("r")[-1] == "progress"
        await stage.report(decode, media="right")
        await stage.settle()
        assert gateway.events("r")[-1].finished.media.object_name == "right"


async def test_a_request_is_read_listed_and_forgotten_by_its_tenant() -> None:
    async with running() as stage:
        gateway = stage.attach()
        for number, tenant in enumerate(("t1", "t2", "t1", "t1")):
            stage.submit(gateway, f"r{number}", call=number, tenant=tenant)
        await stage.work()
        servicer = stage.desk.servicer
        asked = control_pb2.ListRequestsRequest(tenant="t1", page_size=2)
        page = await servicer.ListRequests(asked, None)  # type: ignore[arg-type]
        assert [r.metadata.request_id for r in page.requests] == ["r3", "r2"]
        asked.page_token = page.next_page_token
        page = await servicer.ListRequests(asked, None)  # type: ignore[arg-type]
        assert [r.metadata.request_id for r in page.requests] == ["r0"]
        assert not page.next_page_token
        got = await servicer.GetRequest(
            control_pb2.GetRequestRequest(request_id="r0", tenant="t1"),
            None,  # type: ignore[arg-type]
        )
        assert got.status.ended.HasField("finished") and got.status.metadata.ended_unix_us
        await servicer.DeleteRequest(
            control_pb2.DeleteRequestRequest(request_id="r0"),
            None,  # type: ignore[arg-type]
        )
        assert stage.shelf.forgotten == ["r0"]
        assert stage.desk.records.get("r0") is None


def test_a_restored_request_goes_on_under_its_key() -> None:
    from control.requests.records import Records
    from tests.control.stage import submit_of

    submit = submit_of("r", idempotency_key="k")
    records = Records(term=9)
    record = records.restore(journal_pb2.Promise(term=7, submit=submit), 5, 11)
    assert record.is_open and record.accepted_unix_us == 11
    assert records.same_key(submit) is record
