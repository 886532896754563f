"""Moving, loads, noise, stragglers and late reports: what they cost, told by whom, and when."""

import random
from pathlib import Path

import msgspec
import pytest

from bench.sim.case import Case, ClusterSpec, FaultSpec, load_case
from bench.sim.costs import CostError, Costs, Noise, Straggler, StragglerSchedule
from bench.sim.loop import run
from bench.sim.workers import Workers
from bench.sim.workloads import generate
from control.scheduler.schedule_log import RunLine
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    Assignment,
    Holder,
    Layout,
    Load,
    Member,
    Plan,
    StepsEnded,
    Truncation,
)

PROFILE = """model,gpu,node,width,height,frames,degree,batch,call_us
m,g,text,64,64,1,1,1,10
m,g,dit,64,64,1,1,1,100
m,g,dit,64,64,1,1,2,150
m,g,dit,64,64,1,2,1,60
m,g,vae,64,64,1,1,1,20
"""
FLUX = Path(__file__).parents[2] / "bench/assets/profiles/flux.1-dev_h100_h28.csv"


def small_case(**changes):
    mix = [{"model": "m", "width": 64, "height": 64, "steps": 4, "slo_s": 1.0}]
    phases = [{"duration_s": 0.003, "rate": 600_000, "cv": 0.0, "mix": mix}]
    case = Case(
        cluster=ClusterSpec(workers=4).completed(Profile.from_csv(PROFILE)),
        profile_csv=PROFILE,
        trace=generate("phases", 0, {"phases": phases}),
        settings=Settings(policy="fixed-1"),
    )
    return msgspec.structs.replace(case, **changes)


class Hand:
    """Simulated workers driven by hand-made plans."""

    def __init__(self, **costs):
        case = small_case(costs=Costs(**costs))
        self.workers = Workers(case.profile, case)
        for i in range(4):
            self.workers.join(f"w{i}", 1)
        for item in case.trace:
            self.workers.requests[item.id] = item.to_request()
        self.sequence = 0
        self.facts = []

    def send(self, now_us, node, group, first=0, steps=1, requests=("r000000",), **plan):
        self.sequence += 1
        before = plan.pop("holders", ("w0",))
        holders = tuple(Holder(worker=w, steps_done=first) for w in before)
        a = Assignment(
            sequence=self.sequence,
            node=node,
            batch=tuple(
                Member(
                    request=r,
                    first_step=first,
                    attempt=1,
                    holders=() if node == "text" else holders,
                )
                for r in requests
            ),
            steps=steps,
            workers=tuple(group),
            epoch=plan.pop("epoch", 1),
            layout=Layout(ulysses=len(group)),
            step_time_us=1,
            step_time_us_safe=1,
            start_us=now_us,
            end_us=now_us,
            reason="",
        )
        self.workers.receive(
            Plan(round=1, now_us=now_us, start_us=now_us, assignments=(a,), **plan)
        )
        self.workers.start(now_us)

    def finish(self):
        while (at_us := self.workers.next_us()) is not None:
            self.facts += self.workers.ended(at_us)
            self.workers.start(at_us)
        return self.facts


def setup(fact):
    return fact.load_time_us, fact.transfer_time_us, fact.group_time_us


def test_a_change_of_group_and_a_cold_group_cost_once():
    hand = Hand(group_change_us=5, group_cold_us=7)
    hand.send(0, "text", ["w0"])
    hand.send(0, "dit", ["w0"], 0, 1)
    hand.send(0, "dit", ["w0", "w1"], 1, 1)
    hand.send(0, "dit", ["w0", "w1"], 2, 1)
    hand.send(0, "dit", ["w2", "w3"], 3, 1, holders=("w1",))
    hand.send(0, "vae", ["w3"], 4, holders=("w2",))
    facts = hand.finish()
    assert [setup(f)[1:] for f in facts] == [(0, 0), (0, 0), (5, 7), (0, 0), (5, 7), (0, 0)]
    assert [f.at_us for f in facts] == [10, 110, 110 + 12 + 60, 242, 242 + 12 + 60, 334]


def test_a_decode_elsewhere_and_a_new_epoch_cost():
    hand = Hand(group_change_us=5, group_cold_us=7)
    hand.send(0, "text", ["w0"])
    hand.send(0, "dit", ["w0", "w1"], 0, 2, epoch=1)
    hand.send(0, "dit", ["w0", "w1"], 2, 2, epoch=2)
    hand.send(0, "vae", ["w2"], 4)
    assert [setup(f)[1:] for f in hand.finish() if any(setup(f))] == [(5, 7), (0, 7), (5, 0)]


def test_members_load_side_by_side_and_dropped_loads_stay_due():
    hand = Hand()
    loads = tuple(
        Load(sequence=2, worker=w, model="m", node="dit", part="m/dit", load_us=us)
        for w, us in (("w0", 30), ("w1", 50))
    )
    hand.send(0, "text", ["w0"])
    hand.send(0, "dit", ["w0", "w1"], 0, 1, loads=loads)
    assert [setup(f) for f in hand.finish()] == [(0, 0, 0), (50, 0, 0)]

    hand = Hand()
    hand.send(0, "text", ["w0"])
    hand.send(0, "dit", ["w0", "w1"], 0, 1, loads=loads)
    drop = Truncation(request="r000000", attempt=1, workers=("w0", "w1"))
    hand.workers.receive(Plan(round=1, now_us=0, start_us=0, truncations=(drop,)))
    hand.send(0, "text", ["w1"], requests=("r000001",))
    assert [(f.sequence, setup(f)) for f in hand.finish()] == [(1, (0, 0, 0)), (3, (50, 0, 0))]


def test_a_batch_takes_the_batch_row_and_tells_of_each_member():
    hand = Hand()
    for request in ("r000000", "r000001"):
        hand.send(0, "text", ["w0"], requests=(request,))
    hand.send(0, "dit", ["w0"], 0, 2, requests=("r000000", "r000001"))
    last = hand.finish()[-1]
    assert last.at_us == 20 + 2 * 150 and last.last
    assert [(j.request, j.steps_done) for j in last.jobs] == [("r000000", 2), ("r000001", 2)]


def test_reports_are_gathered_and_late():
    hand = Hand(report_us=250, report_delay_us=1000)
    hand.send(0, "text", ["w0"])
    hand.send(0, "dit", ["w0"], 0, 4)
    facts = hand.finish()
    assert all(isinstance(f, StepsEnded) for f in facts)
    assert [(f.at_us, f.step_time_us) for f in facts] == [
        (1010, (10,)),
        (1310, (100, 100, 100)),
        (1410, (100,)),
    ]
    assert [f.jobs[0].steps_done for f in facts] == [0, 3, 4]


@pytest.mark.parametrize("cv", [0.05, 0.3])
def test_noise_has_its_coefficient_of_variation_and_is_never_fast(cv):
    noise = Noise(cv, 3)
    factors = [noise.factor(f"r{i}", "dit", step) for i in range(400) for step in range(30)]
    mean = sum(factors) / len(factors)
    deviation = (sum((f - mean) ** 2 for f in factors) / len(factors)) ** 0.5
    assert min(factors) >= 1 and deviation / mean == pytest.approx(cv, rel=0.05)
    assert Noise(cv, 3).factor("r7", "dit", 5) == noise.factor("r7", "dit", 5)
    assert Noise(cv, 4).factor("r7", "dit", 5) != noise.factor("r7", "dit", 5)


def test_noise_is_the_same_for_all_policies_and_the_same_again():
    def times(policy):
        case = small_case(costs=Costs(noise=0.2), seed=5, settings=Settings(policy=policy))
        found = {}
        for fact in run(case).facts:
            if isinstance(fact, StepsEnded) and len(fact.step_time_us) == 1:
                found[fact.sequence, fact.jobs[0].request, fact.jobs[0].steps_done] = fact
        return {(k[1], k[2]): f.step_time_us for k, f in found.items() if f.at_us}

    assert times("fixed-1") == times("fixed-1")
    one = small_case(costs=Costs(noise=0.2), seed=5)
    assert run(one).digests == run(one).digests
    assert run(one).log.text() != run(msgspec.structs.replace(one, seed=6)).log.text()


def test_a_straggler_holds_its_group_up():
    slow = StragglerSchedule((Straggler(worker="w1", from_us=100, until_us=200, factor=3.0),))
    assert [slow.factor(("w0", "w1"), t) for t in (99, 100, 199, 200)] == [1.0, 3.0, 3.0, 1.0]
    assert slow.factor(("w0",), 150) == 1.0


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (Costs, {"group_change_us": -1}, "group_change_us"),
        (Costs, {"noise": 1.0}, "noise"),
        (Straggler, {"worker": "w", "from_us": 5, "until_us": 5, "factor": 2.0}, "from_us"),
        (Straggler, {"worker": "w", "from_us": 0, "until_us": 5, "factor": 0.5}, "factor"),
    ],
)
def test_wrong_costs_are_named(kind, values, field):
    with pytest.raises(CostError, match=field) as error:
        kind(**values)
    assert error.value.field == field


def test_moving_costs_lie_inside_the_runs():
    """With all costs 0 nothing changes; with costs each run takes at least its profile time."""
    case = Case(
        cluster=ClusterSpec(workers=8).completed(Profile.from_csv(FLUX.read_text())),
        profile_csv=FLUX.read_text(),
        trace=generate("tetriserve-uniform", 0, {"count": 40, "rate": 30}),
        settings=Settings(policy="tetriserve"),
    )
    free = run(case)
    assert run(msgspec.structs.replace(case, costs=Costs(), seed=9)).digests == free.digests
    dear = run(msgspec.structs.replace(case, costs=Costs(group_change_us=3000, noise=0.1)))
    used = [sum((x.end_us - x.start_us) * len(x.gpus) for x in r.log.lines() if type(x) is RunLine)
            for r in (free, dear)]  # fmt: skip
    assert used[1] > used[0]


def test_a_case_file_may_name_costs(tmp_path):
    (tmp_path / "case.toml").write_text(
        '[cluster]\nworkers = 2\n[profile]\nfile = "flux.1-dev_h100_h28.csv"\n'
        "[workload]\nrequests = []\n[costs]\nnoise = 2.0\n"
    )
    with pytest.raises(CostError, match="noise"):
        load_case(tmp_path / "case.toml")


def test_a_latent_that_nobody_has_is_reported():
    hand = Hand()
    hand.send(0, "text", ["w0"])
    hand.send(0, "dit", ["w1"], 0, 1, holders=("w2",))
    text, failed = hand.finish()
    assert text.last and failed.reason == "LATENT_MISSING" and failed.worker == "w1"


@pytest.mark.parametrize("seed", range(25))
def test_late_reports_and_faults_cost_no_request(seed):
    rng = random.Random(seed)
    faults = tuple(
        FaultSpec(
            at_us=rng.randrange(1, 4_000),
            kind=rng.choice(["lost", "up", "beat", "fail"]),
            worker=f"w000{rng.randrange(4)}",
        )
        for _ in range(6)
    )
    rescue = tuple(FaultSpec(at_us=9_000, kind="up", worker=f"w000{i}") for i in range(4))
    case = small_case(
        faults=faults + rescue,
        seed=seed,
        settings=Settings(policy=rng.choice(["fixed-1", "tetriserve"])),
        costs=Costs(
            group_change_us=rng.choice([0, 30]),
            group_cold_us=70,
            noise=0.2,
            report_delay_us=rng.choice([1, 40, 500]),
            report_us=rng.choice([0, 250]),
        ),
    )
    assert len(run(case).ended) == len(case.trace)
