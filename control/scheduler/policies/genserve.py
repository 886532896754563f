"""GENSERVE (arXiv 2604.04335v1, sections 4.1 to 4.4): videos and pictures on the same workers.

    stages (encode, decode of videos; the later nodes of a picture's batch) ── at once, one worker
    every video ── candidates: hold | continue | up | down | resume ─┐
    pictures ── batches by deadline, one worker each: B*(g) ─────────┴▶ knapsack, Algorithm 1
    the plan with most requests in time ── what is then idle widens videos at their boundary

The solver runs at every arrival and whenever a video reaches a step boundary (each `round_steps`
steps: Delta_round).

Left open by the paper, and settings here: `round_steps`; what is planned (`plan`: "boundary", idle
workers and those of videos at a boundary; "all", those in mid-step too, whose part of the plan goes
out at their boundary, if it still stands); how much of 4.2 binds the solver (`pause`: "slack" lets
it pause only the videos of 4.2, with slack and while pictures wait; "any" whom it likes, as
Algorithm 1 does); when a paused video may come back (`resume`: "solver", or "rules" of 4.2 with
`resume_idle_us` and a guard of one step); whether the predicted finish counts the decode
(`reserve_decode`; printed without); what widens a video while workers idle (`scale_up`: the score
itself prefers narrow); `batch_max` and `batch_wait_us`; how many videos compete (`videos_max`,
those that can still make it first, by deadline); what is elastic ("video", or "degrees": whatever
its model can split, so that pictures of such models are served as videos are).

Two defaults differ from the text for the policy's own good: at most one paused video on a worker
(`paused_max` 1) costs it up to 15 points, 0 means any number; the decode is reserved (15 to 20).
`hold_credit` is ours (a hold that can be afforded counts as served): it buys nothing, so is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ..settings import Settings, SettingValue, Spec
from ..starts import Decision
from ..values import Request
from ..workflow import NodeKind, Section
from .base import EventPolicy
from .genserve_images import Batch, ImageRules, alike, batches, deadline_us, waits_until_us
from .genserve_table import Table
from .genserve_videos import Pool, State, Video, bits, options, picked, select
from .remaining import steps_us

if TYPE_CHECKING:
    from ..outlook.scene import Scene, Work


class GenServe(EventPolicy):
    """Candidates, knapsack, preemption, batching."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        "round_steps": Spec(1, low=1, high=100_000),
        "elastic": Spec("degrees", allowed=("degrees", "video")),
        "pause": Spec("slack", allowed=("any", "slack")),
        "paused_max": Spec(0, low=0, high=1_000),  # videos paused on a worker; 0: any number
        "resume": Spec("solver", allowed=("solver", "rules")),
        "resume_idle_us": Spec(1_000_000, low=0),  # without a new picture
        "plan": Spec("boundary", allowed=("boundary", "all")),
        "reserve_decode": Spec(True),
        "scale_up": Spec(True),
        "hold_credit": Spec(False),
        "batch_max": Spec(0, low=0, high=4096),  # 0: what the workers take
        "batch_wait_us": Spec(0, low=0),
        "videos_max": Spec(16, low=1, high=4096),
    }

    def __init__(self, read: Mapping[str, SettingValue]) -> None:
        self._round_steps = int(read["round_steps"])
        self._by_frames = read["elastic"] == "video"
        self._pause_by_slack = read["pause"] == "slack"
        self._paused_max = int(read["paused_max"])
        self._resume_by_rules = read["resume"] == "rules"
        self._resume_idle_us = int(read["resume_idle_us"])
        self._all = read["plan"] == "all"
        self._reserve_decode = bool(read["reserve_decode"])
        self._scale_up = bool(read["scale_up"])
        self._hold_credit = bool(read["hold_credit"])
        self._images = ImageRules(int(read["batch_max"]), int(read["batch_wait_us"]))
        self._videos_max = int(read["videos_max"])
        self._last_image_us = 0  # a new leader waits at most `resume_idle_us` too short

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> GenServe:
        """From its own settings."""
        return cls(read)

    def decide(self, scene: Scene) -> Decision:
        """Stages first, then one joint plan for videos and pictures."""
        names = tuple(s.name for s in scene.seats)
        table = Table(names, sum(1 << s.index for s in scene.seats if s.idle))
        elastic = {w.id: self._elastic(scene, w.request) for w in scene.works}
        images = [w for w in scene.works if not elastic[w.id]]
        for w in images:
            self._last_image_us = max(self._last_image_us, w.arrived_us)
        queue = [w for w in images if w.section is Section.BEFORE]
        if not table.idle:
            return Decision(wake_us=self._wake_us(scene, (), queue))
        videos = [w for w in scene.works if elastic[w.id]]
        jobs = [w for w in videos if w.section is Section.STEPPED]
        standing = [table.mask(w.group) for w in jobs if self._at_boundary(scene, w)]
        stages = [w for w in videos if w.section is not Section.STEPPED]
        begun = [w for w in images if w.section is not Section.BEFORE]
        self._stages(scene, table, sum(standing), begun, stages)
        found = self._videos(scene, table, jobs)
        self._plan(scene, table, found, {w.id: w for w in jobs}, queue)
        return Decision(table.starts, wake_us=self._wake_us(scene, found, queue))

    def _elastic(self, scene: Scene, request: Request) -> bool:
        if self._by_frames or request.shape.frames > 1:
            return request.shape.frames > 1
        return len(scene.degrees(request)) > 1

    def _at_boundary(self, scene: Scene, work: Work) -> bool:
        """It ended steps, or (planned with a lead) will, and nobody ran on its workers since."""
        if work.available_us > scene.now_us:
            return bool(work.group)
        freed = {s.name: s.worker.freed_us for s in scene.seats}
        since_us = work.waiting_since_us
        return bool(work.group) and all(freed.get(w, since_us) <= since_us for w in work.group)

    # ---------------------------------------------------------------------------- stages

    def _stages(
        self,
        scene: Scene,
        table: Table,
        standing: int,
        images: Sequence[Work],
        videos: Sequence[Work],
    ) -> None:
        """A batch goes on where it is; then encodes and decodes of videos, by deadline."""
        left = list(images)
        while left:
            first = left[0]
            mates = [w for w in left if w.where == first.where and alike(w, first)]
            mates = mates[: scene.batch_max(first.request, first.node)]
            left = [w for w in left if w not in mates]
            self._stage(scene, table, standing, mates)
        for work in sorted(videos, key=lambda w: (deadline_us(w.request), w.order)):
            self._stage(scene, table, standing, [work])

    def _stage(self, scene: Scene, table: Table, standing: int, works: Sequence[Work]) -> None:
        """On a holder, else where no video stands, else anywhere."""
        first = works[0]
        held = table.mask(first.where)
        able = bits(table.idle & self._can(scene, table, first))
        if able:
            bit = min(able, key=lambda b: (not b & held, bool(b & standing), b))
            table.give(works, bit, first.steps_left, "stage")

    def _able(self, scene: Scene, table: Table, request: Request) -> int:
        known = table.able.get(request.model)
        if known is None:
            can = [s.index for s in scene.seats if s.worker.can(request.model)]
            known = table.able[request.model] = sum(1 << i for i in can)
        return known

    def _can(self, scene: Scene, table: Table, work: Work) -> int:
        """Who runs its node."""
        if not scene.mixed:
            return self._able(scene, table, work.request)
        return sum(1 << s.index for s in scene.seats if scene.can(s, work))

    # ---------------------------------------------------------------------------- videos

    def _videos(self, scene: Scene, table: Table, jobs: Sequence[Work]) -> list[Video]:
        """Those on workers, then those that wait; sets what is open."""
        found: list[Video] = []
        ready = {w.id for w in jobs}
        known = {t.id: t for t in scene.tracked()}
        for r in scene.running if self._all else ():
            request = known[r.requests[0]].request
            denoises = r.kind is NodeKind.STEPPED
            if denoises and request.id not in ready and self._elastic(scene, request):
                own = table.mask(r.workers)
                left = request.steps - known[request.id].steps_done - r.steps_left
                leader = table.mask(r.workers[:1])
                if left > 0:
                    found.append(
                        self._video(scene, table, request, False, r.end_us, left, own, leader)
                    )
        waiting: list[Work] = []
        for w in jobs:
            group = table.mask(w.group) if self._at_boundary(scene, w) else 0
            if group and group & table.idle == group:
                from_us = max(scene.now_us, w.available_us)
                leader = table.mask(w.where[:1])
                found.append(
                    self._video(scene, table, w.request, True, from_us, w.steps_left, group, leader)
                )
            else:
                waiting.append(w)
        for video in found:
            table.owned |= video.own
        table.open = table.idle | table.owned
        return sorted(found, key=_by_deadline) + self._waiting(scene, table, waiting)

    def _waiting(self, scene: Scene, table: Table, works: Sequence[Work]) -> list[Video]:
        """Those that compete: who can still make it, by deadline, then the others."""
        for w in works:
            if w.first_step:
                leader = table.mask(w.where[:1])
                table.paused[leader] = table.paused.get(leader, 0) + 1

        def urgency(w: Work) -> tuple[int, bool, int, int]:
            step_us = min(self._step_us(scene, table, w.request).values())
            end_us = max(scene.now_us, w.available_us) + w.steps_left * step_us
            end_us += scene.after_us(w.request) if self._reserve_decode else 0
            limit_us = deadline_us(w.request)
            return (-w.request.priority, end_us > limit_us, limit_us, w.order)

        found: list[Video] = []
        for w in sorted(works, key=urgency)[: self._videos_max]:
            from_us = max(scene.now_us, w.available_us)
            leader = table.mask(w.where[:1]) if w.first_step else 0
            found.append(
                self._video(scene, table, w.request, True, from_us, w.steps_left, 0, leader)
            )
        return found

    def _step_us(self, scene: Scene, table: Table, request: Request) -> dict[int, int]:
        key = (request.model, request.shape)
        if key not in table.step_us:
            table.step_us[key] = steps_us(scene, request, scene.degrees(request))
        return table.step_us[key]

    def _video(
        self,
        scene: Scene,
        table: Table,
        request: Request,
        ready: bool,
        from_us: int,
        left: int,
        own: int,
        leader: int,
    ) -> Video:
        limit_us = request.deadline_us
        if limit_us is not None and self._reserve_decode:
            limit_us -= scene.after_us(request)
        step_us = self._step_us(scene, table, request)
        if own.bit_count() not in step_us:
            own = 0
        able = self._able(scene, table, request)
        return Video(request, ready, from_us, limit_us, left, step_us, able, own, leader)

    def _may_pause(
        self, table: Table, videos: Sequence[Video], batches_waiting: int
    ) -> dict[str, bool]:
        """By video: the solver may hold it although it stands on workers."""
        paused = table.paused
        limit = self._paused_max
        allowed = {
            v.request.id: not limit or paused.get(v.leader, 0) < limit for v in videos if v.own
        }
        if not self._pause_by_slack:
            return allowed
        needed = batches_waiting - (table.idle & ~table.owned).bit_count()
        chosen: set[str] = set()
        for v in sorted(videos, key=lambda v: -v.lax_us()):
            if needed > 0 and v.own and v.lax_us() > 0 and allowed[v.request.id]:
                chosen.add(v.request.id)
                needed -= v.degree
        return {name: name in chosen for name in allowed}

    def _may_resume(self, scene: Scene, video: Video, images_wait: bool) -> bool:
        """4.2: its budget is tight, or no picture came for a while."""
        if not self._resume_by_rules or not video.leader:
            return True
        if not images_wait and scene.now_us - self._last_image_us >= self._resume_idle_us:
            return True
        return self._tight_us(scene, video) <= scene.now_us

    def _tight_us(self, scene: Scene, video: Video) -> int:
        """When its budget gets tight: a step more, on one worker, than it has time for."""
        narrow = min(video.step_us)
        return scene.now_us + video.laxity_us(narrow) - video.step_us[narrow]

    def _wake_us(self, scene: Scene, videos: Sequence[Video], queue: Sequence[Work]) -> int | None:
        """When batches waited long enough, or a paused video may come back."""
        times = [waits_until_us(scene, queue, self._images) or 0]
        if self._resume_by_rules:
            paused = [v for v in videos if v.leader and not v.own]
            times += [self._tight_us(scene, v) for v in paused]
            times += [self._last_image_us + self._resume_idle_us] if paused else []
        return min((t for t in times if t > scene.now_us), default=None)

    # ---------------------------------------------------------------------------- the plan

    def _plan(
        self,
        scene: Scene,
        table: Table,
        videos: Sequence[Video],
        works: Mapping[str, Work],
        queue: Sequence[Work],
    ) -> None:
        """Algorithm 1, and what of its plan can begin now."""
        workers = table.open.bit_count()
        found = batches(scene, queue, self._images, workers)
        may_pause = self._may_pause(table, videos, len(found))
        choices = [
            options(
                v,
                may_pause.get(v.request.id, False),
                self._may_resume(scene, v, bool(queue)),
                self._hold_credit,
            )
            for v in videos
        ]
        dp = select(videos, choices, self._pool_of(table, videos), workers)
        state = _best(dp, found)
        chosen = picked(state)
        used = 0 if state is None else state.used
        used |= self._start_images(scene, table, found, used)
        begun: list[tuple[Video, int]] = []
        for i, (option, mask) in sorted(chosen.items()):
            if option.width and videos[i].ready and mask & table.idle == mask:
                begun.append((videos[i], mask))
        if self._scale_up:
            begun = self._widen(table, begun, used)
        for video, mask in begun:
            work = works[video.request.id]
            steps = min(self._round_steps, work.steps_left)
            table.give([work], mask, steps, _kind(video, mask))

    def _pool_of(self, table: Table, videos: Sequence[Video]) -> Pool:
        """Idle workers first, then those of videos: hopeless ones first, then the laxest."""
        order = bits(table.idle & ~table.owned)
        owners = [v for v in videos if v.own]
        owners.sort(key=lambda v: (not v.ready, v.lax_us() >= 0, -v.lax_us(), v.request.id))
        order += [b for v in owners for b in bits(v.own)]
        return Pool(tuple(order))

    def _start_images(self, scene: Scene, table: Table, found: Sequence[Batch], used: int) -> int:
        """A batch each to what the videos leave, idle workers first; returns what they take."""
        left = table.open & ~used
        taken = 0
        for batch in found:
            able = left & ~taken & self._can(scene, table, batch.works[0])
            if not able:
                continue
            bit = bits(able & table.idle or able)[0]
            taken |= bit
            if bit & table.idle:
                reason = "image" if batch.on_time else "image-late"
                table.give(batch.works, bit, batch.works[0].steps_left, reason)
        return taken

    def _widen(
        self, table: Table, begun: Sequence[tuple[Video, int]], used: int
    ) -> list[tuple[Video, int]]:
        """4.3, up while workers idle: by deadline, those in time first, to the next faster."""
        spare = table.idle & ~used
        wide = dict(enumerate(begun))
        order = sorted(wide, key=lambda i: (wide[i][0].lax_us() < 0, _by_deadline(wide[i][0]), i))
        for i in order:
            video, mask = wide[i]
            for degree in video.step_us:
                more = degree - mask.bit_count()
                faster = more > 0 and video.step_us[degree] < video.step_us[mask.bit_count()]
                free = bits(spare & video.able)
                if faster and more <= len(free):
                    mask |= sum(free[:more])
                    spare &= ~mask
            wide[i] = (video, mask)
        return list(wide.values())


def _best(dp: Sequence[State | None], found: Sequence[Batch]) -> State | None:
    """Stage 3: the terminal state that is best together with the pictures on what it leaves."""
    workers = len(dp) - 1
    best: tuple[tuple[int, float], State] | None = None
    for b, state in enumerate(dp):
        if state is None:
            continue
        served = found[: workers - b]
        count = sum(len(x.works) for x in served if x.on_time)
        value = (state.value[0] + count, state.value[1] + sum(x.score for x in served))
        if best is None or value > best[0]:
            best = (value, state)
    return None if best is None else best[1]


def _kind(video: Video, mask: int) -> str:
    """What becomes of it, for the log."""
    if not video.own:
        return "resume" if video.leader else "start"
    if mask == video.own:
        return "continue"
    return "up" if mask.bit_count() > video.degree else "down"


def _by_deadline(video: Video) -> tuple[int, int, str]:
    return (-video.request.priority, deadline_us(video.request), video.request.id)
