"""The one file that translates between protobuf messages and the scheduler's values."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from control.requests.records import Record
from control.scheduler import values
from control.scheduler.resilience.failures import CALL_REFUSED, INPUT_AWAY, INPUT_MISSING
from control.workflows.calls import node_call
from control.workflows.compiled import passes_of, steps_at, steps_total, workflow_of
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, mesh_pb2, types_pb2

_COLLECTIVE_TIMEOUT_STEPS = 8  # a collective counts as hung after this many predicted step times …
_COLLECTIVE_TIMEOUT_MIN_US = 5_000_000  # … but never sooner than this
_WHY = {
    INPUT_AWAY: "a file that it brought could not be read from the store of inputs",
    INPUT_MISSING: "a file that it brought is not in the store of inputs any more",
}
_LOADS_LATE = 3  # times its prediction that a load may take while others wait for it


def to_request(submit: control_pb2.SubmitRequest, accepted_us: int) -> values.Request:
    """The scheduler's view of a validated request accepted at `accepted_us`."""
    request = submit.request
    spec, slo = request.spec, request.slo
    return values.Request(
        id=submit.request_id,
        model=spec.model,
        shape=values.Shape(
            width=spec.shape.width, height=spec.shape.height, frames=max(1, spec.shape.frames)
        ),
        steps=spec.steps,
        deadline_us=accepted_us + slo.deadline_us if slo.deadline_us else None,
        on_miss=(
            values.OnMiss.REJECT
            if slo.on_miss == types_pb2.ON_MISS_REJECT
            else values.OnMiss.BEST_EFFORT
        ),
        priority=request.priority,
        tenant=request.tenant,
        branches=max(1, spec.guidance_branches),
        firm=commitment(slo) == types_pb2.COMMITMENT_FIRM,
        workflow=workflow_of(submit).name,
        passes=passes_of(submit),
    )


def make_variant(spec: types_pb2.GenerationSpec, variant: values.Request) -> None:
    """Gives a spec the steps and the shape of a variant of its request; frames stay as asked."""
    spec.steps = variant.steps
    spec.shape.width, spec.shape.height = variant.shape.width, variant.shape.height


def commitment(slo: types_pb2.Slo) -> types_pb2.Commitment.ValueType:
    """How binding a promised deadline is; whoever asks to be refused else is bound firmly."""
    if slo.commitment != types_pb2.COMMITMENT_UNSPECIFIED:
        return slo.commitment
    if slo.on_miss == types_pb2.ON_MISS_REJECT:
        return types_pb2.COMMITMENT_FIRM
    return types_pb2.COMMITMENT_SOFT


def branches_of(spec: types_pb2.GenerationSpec, models: Iterable[generation_pb2.ModelInfo]) -> int:
    """Branches of guidance in each step of a request, by what workers say of its model."""
    above = [m.branches_above for m in models if m.name == spec.model and _branches(m)]
    return 2 if above and spec.guidance_scale > max(above) else 1


def _branches(model: generation_pb2.ModelInfo) -> bool:
    return model.HasField("branches_above")


def to_event(report: mesh_pb2.StepReport, now_us: int) -> values.Event:
    """The fact that a worker's report states, stamped now."""
    jobs = tuple(
        values.JobProgress(request=r.request_id, attempt=r.attempt, steps_done=r.steps_done)
        for r in report.results
    )
    if report.HasField("failure"):
        failed = report.failed_job
        return values.AssignmentFailed(
            at_us=now_us,
            sequence=report.sequence,
            worker=report.worker,
            jobs=jobs,
            reason=report.failure.reason,
            suspects=tuple(failed.suspects),
            request=failed.request_id,
            tried=tuple(failed.tried),
            goes_on=not report.last,
            batch=failed.batch,
            artifact=failed.artifact,
        )
    return values.StepsEnded(
        at_us=now_us,
        sequence=report.sequence,
        jobs=jobs,
        step_time_us=tuple(report.step_time_us),
        last=report.last,
        group_time_us=report.group_time_us,
        transfer_time_us=report.transfer_time_us,
        load_time_us=report.load_time_us,
        member_time_us=tuple(report.member_time_us),
    )


def to_assignment(
    assignment: values.Assignment,
    term: int,
    records: Callable[[str], Record],
    store_address: Callable[[str], str],
    load_us: int = 0,
) -> mesh_pb2.Assignment:
    """What the workers of an assignment are told; `load_us`: until the slowest has its weights."""
    layout = assignment.layout
    return mesh_pb2.Assignment(
        term=term,
        sequence=assignment.sequence,
        node=assignment.node,
        batch=[
            _member(assignment.node, m, records(m.request), store_address) for m in assignment.batch
        ],
        steps=assignment.steps,
        group=types_pb2.Group(epoch=assignment.epoch, members=assignment.workers),
        layout=types_pb2.Layout(cfg=layout.cfg, ulysses=layout.ulysses, ring=layout.ring),
        rendezvous_address=store_address(assignment.workers[0]),
        predicted_step_time_us=assignment.step_time_us,
        collective_timeout_us=_LOADS_LATE * load_us
        + max(_COLLECTIVE_TIMEOUT_MIN_US, _COLLECTIVE_TIMEOUT_STEPS * assignment.step_time_us_safe),
        load_time_us=_LOADS_LATE * load_us,
    )


def to_weights_load(load: values.Load) -> mesh_pb2.WeightsLoad:
    """What a worker is told of a load."""
    return mesh_pb2.WeightsLoad(
        sequence=load.sequence,
        weights=mesh_pb2.WeightsName(model=load.model, node=load.node, part=load.part),
        evict=[mesh_pb2.WeightsName(part=part) for part in load.evict],
    )


def to_fetch(
    fetch: values.Fetch, record: Record, store_address: Callable[[str], str]
) -> mesh_pb2.LatentFetch:
    """What a worker is told of a latent that it copies to itself."""
    return mesh_pb2.LatentFetch(
        request_id=fetch.request,
        attempt=fetch.attempt,
        steps_done=fetch.steps_done,
        holder=types_pb2.LatentHolder(
            worker=fetch.holder,
            steps_done=fetch.steps_done,
            store_address=store_address(fetch.holder),
        ),
        model=record.spec.model,
        artifact=fetch.artifact,
    )


def _member(
    node: str, member: values.Member, record: Record, store_address: Callable[[str], str]
) -> mesh_pb2.BatchMember:
    made = mesh_pb2.BatchMember(
        request_id=member.request,
        first_step=member.first_step,
        steps_total=steps_at(record.submit, node) or record.spec.steps,
        attempt=member.attempt,
        holders=[
            types_pb2.LatentHolder(
                worker=h.worker, steps_done=h.steps_done, store_address=store_address(h.worker)
            )
            for h in member.holders
        ],
        spec=record.spec,
        traceparent=record.traceparent,
    )
    if record.submit.HasField("workflow"):
        made.call.CopyFrom(node_call(record.submit, node, member, store_address))
    return made


def to_truncate(truncation: values.Truncation, term: int, incarnation: str) -> mesh_pb2.Truncate:
    """What one process of a worker is told of a truncation."""
    return mesh_pb2.Truncate(
        term=term,
        request_id=truncation.request,
        attempt=truncation.attempt,
        stop_at_step=truncation.stop_at_step,
        release=truncation.release,
        incarnation=incarnation,
    )


def to_ended(
    ended: values.Ended, record: Record, said: mesh_pb2.StepReport | None = None
) -> journal_pb2.EndedRequest:
    """How a request ended, as the promises stream keeps it; `said`: the report that ended it."""
    steps = steps_total(record.submit)
    outcome = journal_pb2.EndedRequest(request_id=ended.request)
    if ended.outcome is values.Outcome.DONE:
        outcome.finished.CopyFrom(
            generation_pb2.Finished(
                latency_us=ended.at_us - record.accepted_us,
                predicted_latency_us=record.accepted.predicted_latency_us,
                on_time=ended.on_time,
                degree_changes=ended.degree_changes,
                moves=ended.moves,
                steps_lost=ended.steps_lost,
                media=record.media,
            )
        )
    elif ended.outcome is values.Outcome.CANCELLED:
        outcome.cancelled.steps_done = ended.steps_done
    elif ended.outcome is values.Outcome.REJECTED:
        outcome.failed.CopyFrom(_turned_away(ended, record, steps))
    else:
        outcome.failed.reason = ended.reason or "FAILED"
        why = _WHY.get(ended.reason, ended.reason.lower())
        if ended.reason == CALL_REFUSED and said is not None:
            why = said.failure.message
        outcome.failed.message = f"gave up after {ended.steps_done} of {steps} steps: {why}"
    return outcome


def from_ended(promise: journal_pb2.Promise, accepted_us: int) -> values.Ended | None:
    """How a request ended that was accepted at `accepted_us`; None while it is open. Of one that
    did not succeed nobody kept when.
    """
    if not promise.HasField("ended"):
        return None
    ended, outcome = promise.ended, values.Outcome.FAILED
    if ended.HasField("finished"):
        outcome = values.Outcome.DONE
    elif ended.HasField("cancelled"):
        outcome = values.Outcome.CANCELLED
    return values.Ended(
        request=promise.submit.request_id,
        outcome=outcome,
        at_us=accepted_us + ended.finished.latency_us,
        on_time=ended.finished.on_time,
        steps_done=ended.cancelled.steps_done,
    )


def _turned_away(ended: values.Ended, record: Record, steps_total: int) -> types_pb2.Failure:
    """By the policy's own admission; its reason goes with it."""
    reason = ended.reason or "UNSAID"
    waited_us = ended.at_us - record.accepted_us
    return types_pb2.Failure(
        reason="REJECTED_BY_POLICY",
        message=(
            f"the planning policy turned it away after {waited_us / 1e6:.2f} s and "
            f"{ended.steps_done} of {steps_total} steps: {reason.lower().replace('_', ' ')}"
        ),
        metadata={"policy_reason": reason, "steps_done": str(ended.steps_done)},
    )


def to_plan_record(plan: values.Plan, digest: str, plan_time_us: int) -> journal_pb2.PlanRecord:
    """What the journal keeps of a plan: enough to compare a replay with."""
    return journal_pb2.PlanRecord(
        round=plan.round,
        now_us=plan.now_us,
        digest=digest,
        assignments=len(plan.assignments),
        plan_time_us=plan_time_us,
    )


def to_unattainable(
    request: values.Request, finish_us: int, now_us: int, *, hopeless: bool
) -> types_pb2.Failure:
    """The refusal of a request that cannot be on time; `hopeless`: nor on an idle cluster, so that
    another try helps nothing.
    """
    assert request.deadline_us is not None
    late_us = finish_us - request.deadline_us
    return types_pb2.Failure(
        reason="DEADLINE_UNATTAINABLE",
        message=(
            f"predicted to take {(finish_us - now_us) / 1e6:.2f} s, "
            f"{late_us / 1e6:.2f} s more than the deadline allows"
        ),
        retry_after_us=0 if hopeless else late_us,
        metadata={"predicted_latency_us": str(finish_us - now_us)},
    )
