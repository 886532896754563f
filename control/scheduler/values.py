"""Everything that crosses the scheduler's border: facts in, one plan out.

House rules: every value is frozen; times are integer microseconds on the control plane's clock,
stamped once by whoever drives the scheduler; a tuple stands where order matters; nothing here
computes. The values serialise with msgspec (tag field `kind`), which is what the journal stores and
what a plan's digest is taken over.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec

# Nodes of the chain (see workflow.py), as in profiles and schedule logs.
TEXT = "text"
DIT = "dit"
VAE = "vae"


class OnMiss(StrEnum):
    """What happens to a request whose deadline cannot be kept."""

    BEST_EFFORT = "best_effort"
    REJECT = "reject"


class _Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all values: immutable, comparable, serialisable."""


class Shape(_Value, order=True, frozen=True):
    """Pixels and frames of a result; a still picture has one frame."""

    width: int
    height: int
    frames: int = 1


class Layout(_Value, order=True, frozen=True):
    """How the members of a group share one step; the product is the degree."""

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def degree(self) -> int:
        return self.cfg * self.ulysses * self.ring

    @classmethod
    def of(cls, degree: int, branches: int = 1) -> Layout:
        """How a group of that degree shares a step.

        The branches of guidance go to halves of the group where there are two: that halves the work
        for one exchange a step, where Ulysses takes two an attention.
        """
        if branches == 2 and degree % 2 == 0:
            return cls(cfg=2, ulysses=degree // 2)
        return cls(ulysses=degree)


class Pass(_Value, frozen=True):
    """One stepped node of a request's workflow."""

    node: str
    model: str
    shape: Shape
    steps: int  # that it runs
    branches: int = 1  # of guidance in each step


class Request(_Value, frozen=True):
    """What the scheduler knows of a request. It never sees prompts, seeds or media."""

    id: str
    model: str
    shape: Shape
    steps: int  # denoising steps in all
    deadline_us: int | None = None  # absolute; None: best effort
    on_miss: OnMiss = OnMiss.BEST_EFFORT
    priority: int = 0  # higher wins
    tenant: str = ""
    branches: int = 1  # of guidance in each step; two can be made by different workers
    firm: bool = False  # told "on time", it is not given up for one that came later
    workflow: str = "chain"  # name of one that its scheduler knows
    # One for each stepped node, in the workflow's order; empty: one, made of the fields above.
    passes: tuple[Pass, ...] = ()


class NodeParts(_Value, frozen=True):
    """The weights that a node of a model needs."""

    node: str
    parts: tuple[str, ...]


class ModelFacts(_Value, frozen=True):
    """What a worker says of a model it has loaded."""

    name: str
    degrees: tuple[int, ...] = (1,)  # ways its denoiser can be split
    batch_max: int = 1  # jobs of one shape that it steps, encodes or decodes together
    halves: bool = False  # it obeys a layout that gives branches of guidance to halves of a group
    parts: tuple[NodeParts, ...] = ()  # a node that is not named here needs a part of its own
    operations: tuple[str, ...] = ()  # that it runs, as nodes name them; empty: the chain's three


# -------------------------------------------------------------------------------- facts in


class Arrived(_Value, frozen=True, tag_field="kind", tag="arrived"):
    """A request was accepted (and journalled)."""

    at_us: int
    request: Request
    promised_us: int | None = None  # finish that its client was told; None: told nothing
    on_time: bool = False  # and that this is no later than its deadline


class CancelRequested(_Value, frozen=True, tag_field="kind", tag="cancel_requested"):
    """Somebody wants a request to stop at its next step boundary."""

    at_us: int
    request: str


class Held(_Value, frozen=True, omit_defaults=True):
    """A latent, or another artifact, that a worker says it holds."""

    request: str
    steps_done: int  # behind it, of the stepped node that made it; else 0
    artifact: str = ""  # its name in the request's workflow; "": the latents of a plain chain


class PartFacts(_Value, frozen=True):
    """What a worker with bounded memory says of a part; once for each node that needs it."""

    model: str
    node: str
    mib: int
    peak_mib: int  # with the activations of the largest call asked for
    load_us: int
    resident: bool = False  # on the device now
    part: str = ""  # "": one of the model's node alone


class GroupHeld(_Value, frozen=True):
    """A group that has a communicator on a worker."""

    epoch: int
    members: tuple[str, ...]


class WorkerUp(_Value, frozen=True, tag_field="kind", tag="worker_up"):
    """A worker's lease lives. Repeated for a known incarnation, it clears a suspicion."""

    at_us: int
    worker: str
    incarnation: str  # a new one means: the worker restarted and lost what it held
    gpu: str  # as the profile calls it
    host: str = ""
    models: tuple[ModelFacts, ...] = ()
    latents: tuple[Held, ...] = ()  # what it holds now, as it says; naming none denies nothing
    memory_mib: int = 0  # for weights and activations; 0: all its models always fit
    weights: tuple[PartFacts, ...] = ()  # where its memory is bounded; those used last at the end
    island: str = ""  # workers of one host with the same island are linked closely; "": one island
    shares_cores: bool = False  # with its peers: how slow it is says nothing of it
    stopping: bool = False  # it was told to stop: as drained, until it is gone
    pending: tuple[int, ...] = ()  # sequences that it has in hand, of this scheduler
    given_up: tuple[GroupHeld, ...] = ()  # it had these a heartbeat before, and has not now
    operations: tuple[str, ...] = ()  # without weights, that it runs


class WorkerLost(_Value, frozen=True, tag_field="kind", tag="worker_lost"):
    """A worker's lease ended: whatever it held is gone."""

    at_us: int
    worker: str
    reason: str = "lease"


class NothingHeard(_Value, frozen=True, tag_field="kind", tag="nothing_heard"):
    """No worker was heard of for a while: no assignment counts as overdue for that time."""

    at_us: int


class DrainRequested(_Value, frozen=True, tag_field="kind", tag="drain_requested"):
    """Stop (or, with `draining` false, resume) giving work to a worker of this name.

    The wish outlives the worker; it may come before the worker does.
    """

    at_us: int
    worker: str
    draining: bool = True


class JobProgress(_Value, frozen=True):
    """State of one job after a step."""

    request: str
    attempt: int
    steps_done: int


class StepsEnded(_Value, frozen=True, tag_field="kind", tag="steps_ended"):
    """Steps of an assignment ended well on every member of its group."""

    at_us: int
    sequence: int  # of the assignment
    jobs: tuple[JobProgress, ...]
    step_time_us: tuple[int, ...]  # of each step since the assignment's last report
    last: bool  # the assignment is over
    group_time_us: int = 0  # making the group, before the first step
    transfer_time_us: int = 0  # getting latents, before the first step
    load_time_us: int = 0  # loading weights, before the first step
    # How much of each step was each member's own, without its waiting for the others: step by step,
    # for each of the group's workers; 0: not known. Empty: none is.
    member_time_us: tuple[int, ...] = ()


class AssignmentFailed(_Value, frozen=True, tag_field="kind", tag="assignment_failed"):
    """One member gave an assignment, or one job of it, up.

    Survivors report it each; the first report counts. Of a batch, `request` names the job whose
    fault it was, where that is known.
    """

    at_us: int
    sequence: int
    worker: str  # who reports
    jobs: tuple[JobProgress, ...]  # last latent that this worker still holds; empty: none
    reason: str  # upper-snake-case
    suspects: tuple[str, ...] = ()  # members not to be used until their next heartbeat
    request: str = ""  # whose fault it was; "": not known
    tried: tuple[str, ...] = ()  # asked in vain for its latent; empty: all that it had named
    artifact: str = ""  # that they were asked for; "": all that the call takes
    goes_on: bool = False  # only that job was given up: the others of the batch go on
    batch: int = 0  # jobs that were together when it failed; 0: as assigned


Event = (
    Arrived
    | CancelRequested
    | WorkerUp
    | WorkerLost
    | NothingHeard
    | DrainRequested
    | StepsEnded
    | AssignmentFailed
)

# -------------------------------------------------------------------------------- decisions out


class Holder(_Value, frozen=True):
    """A worker that has (or, when the assignment starts, will have) a job's latent."""

    worker: str
    steps_done: int


class Input(_Value, frozen=True):
    """An artifact that a call takes."""

    artifact: str  # its name in the workflow
    version: int  # steps behind what a stepped node made; else 0
    holders: tuple[str, ...]  # workers that have it or, when the call starts, will; best first


class Member(_Value, frozen=True, omit_defaults=True):
    """One job of an assignment's batch."""

    request: str
    first_step: int  # of the node, where it is stepped
    attempt: int
    holders: tuple[Holder, ...]  # of all that it takes, best first; empty: it takes nothing
    # Each artifact that it takes, in workflows that name theirs. A stepped node behind its first
    # step takes its own latents alone: all that they were made from is in them.
    inputs: tuple[Input, ...] = ()


class Assignment(_Value, frozen=True):
    """These jobs, these steps, on this ordered list of workers, in this layout."""

    sequence: int  # position in the one order that every worker follows
    node: str
    batch: tuple[Member, ...]
    steps: int
    workers: tuple[str, ...]
    epoch: int  # of the group (epoch, workers)
    layout: Layout
    step_time_us: int  # predicted mean of one step
    step_time_us_safe: int  # predicted safe quantile
    start_us: int  # predicted; informative, nobody waits for it
    end_us: int  # predicted
    reason: str  # why this and not another: "minimal", "fill", "scale-up", "fcfs", "stage" …


class Truncation(_Value, frozen=True):
    """A job stops in its assignments up to `attempt` after `stop_at_step` steps, or, at 0, as soon
    as it can. Those in a batch with it go on.
    """

    request: str
    attempt: int
    workers: tuple[str, ...]
    stop_at_step: int = 0
    release: bool = False  # the request ended: drop its latents


class Outcome(StrEnum):
    """How a request ended."""

    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REJECTED = "rejected"  # by its policy's own admission


class Ended(_Value, frozen=True, tag_field="kind", tag="ended"):
    """A request ended; `observe` and plans tell of it."""

    request: str
    outcome: Outcome
    at_us: int
    on_time: bool
    steps_done: int
    degree_changes: int = 0
    moves: int = 0  # steps begun on workers of which none had run the one before
    steps_lost: int = 0
    reason: str = ""


class Forecast(_Value, frozen=True):
    """When a newcomer would finish, absolute."""

    finish_us: int  # as likely sooner as later
    finish_us_p95: int  # later than this in 5 of 100


class Load(_Value, frozen=True):
    """Weights that a worker gets onto its GPU before an assignment; it does nothing else then."""

    sequence: int  # of the assignment that needs them
    worker: str
    model: str  # that needs them
    node: str
    part: str
    load_us: int  # predicted
    evict: tuple[str, ...] = ()  # parts that make room first


class Fetch(_Value, frozen=True, omit_defaults=True):
    """A worker copies a latent to itself, beside its steps: whoever has it is about to leave."""

    request: str
    attempt: int
    steps_done: int
    holder: str
    worker: str  # copies it
    artifact: str = ""  # its name in the request's workflow; "": the latents of a plain chain


class Plan(_Value, frozen=True):
    """All decisions of one call, as one value."""

    round: int
    now_us: int  # when it was made
    start_us: int  # boundary that it is for (== now_us for an amendment)
    assignments: tuple[Assignment, ...] = ()
    truncations: tuple[Truncation, ...] = ()
    released: tuple[str, ...] = ()  # requests whose latents may be dropped
    loads: tuple[Load, ...] = ()
    ended: tuple[Ended, ...] = ()  # turned away by the policy, or failed by an overdue assignment
    fetches: tuple[Fetch, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's JSON: equal plans, equal digests, on every machine."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()
