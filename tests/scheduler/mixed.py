"""Videos and pictures on the same workers: a second world to drive by hand."""

from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    DIT,
    Arrived,
    JobProgress,
    ModelFacts,
    Request,
    Shape,
    StepsEnded,
    WorkerUp,
)

from .driving import World

MIXED_CSV = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n" + "".join(
    f"{model},g,{node},{px},{px},{frames},{degree},{batch},{us},test\n"
    for model, node, px, frames, degree, batch, us in [
        *(("pic", "text", px, 1, 1, b, 1_000 * b) for px in (64, 96) for b in (1, 2, 4)),
        *(("pic", "dit", px, 1, 1, b, 9_000 + 1_000 * b) for px in (64, 96) for b in (1, 2, 4)),
        *(("pic", "vae", px, 1, 1, b, 1_000 * b) for px in (64, 96) for b in (1, 2, 4)),
        *(("vid", node, px, 9, 1, 1, 1_000) for node in ("text", "vae") for px in (256, 480)),
        *(("vid", "dit", 256, 9, k, 1, us) for k, us in ((1, 40_000), (2, 45_000), (4, 50_000))),
        *(("vid", "dit", 480, 9, k, 1, us) for k, us in ((1, 100_000), (2, 50_000), (4, 26_000))),
    ]
)
PIC = ModelFacts(name="pic", degrees=(1,), batch_max=4)
VID = ModelFacts(name="vid", degrees=(1, 2, 4))


class Mixed(World):
    """Videos and pictures on the same workers."""

    def __init__(self, policy="genserve", workers=1, **policy_settings):
        super().__init__(0)
        self.settings = Settings(policy=policy, policy_settings=policy_settings)
        self.scheduler = Scheduler(self.settings, Profile.from_csv(MIXED_CSV))
        for i in range(workers):
            self.up(f"w{i}")

    def up(self, worker, incarnation="1", host="h0", latents=None):
        self.observe(
            WorkerUp(
                at_us=self.now_us,
                worker=worker,
                incarnation=incarnation,
                gpu="g",
                host=host,
                models=(PIC, VID),
            )
        )

    def ask(self, name, model, px, steps=10, slo_us=None):
        shape = Shape(width=px, height=px, frames=9 if model == "vid" else 1)
        deadline_us = None if slo_us is None else self.now_us + slo_us
        request = Request(id=name, model=model, shape=shape, steps=steps, deadline_us=deadline_us)
        self.observe(Arrived(at_us=self.now_us, request=request))

    def over(self, a):
        self.now_us = max(self.now_us, a.end_us)
        steps = a.steps if a.node == DIT else 0
        jobs = tuple(
            JobProgress(request=m.request, attempt=m.attempt, steps_done=m.first_step + steps)
            for m in a.batch
        )
        self.observe(
            StepsEnded(
                at_us=self.now_us,
                sequence=a.sequence,
                jobs=jobs,
                step_time_us=(a.step_time_us,),
                last=True,
            )
        )


def names(assignment):
    return [m.request for m in assignment.batch]
