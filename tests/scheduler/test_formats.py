"""The frozen formats of DESIGN.md section 10: literal examples, and what the checkers refuse."""

import msgspec
import pytest

from bench.sim.case import load_case
from bench.sim.loop import run
from bench.sim.trace import TraceError, read_trace, write_trace
from control.scheduler.schedule_log import LogError, RunLine, read_log
from control.scheduler.settings import SettingError
from control.scheduler.summary import Summary
from control.scheduler.times.profile import Profile, ProfileError

from .driving import FLUX_CSV, PROFILES, case

TRACE = (
    '{"id":"r000000","arrival_us":1250,"model":"flux.1-dev","workflow":"txt2img","width":512,'
    '"height":512,"frames":1,"steps":28,"slo_us":2000000,"priority":0}\n'
)

PROFILE = """model,gpu,node,width,height,frames,degree,batch,call_us,source
flux.1-dev,h100,text,512,512,1,1,1,30000,[I] fit
flux.1-dev,h100,dit,512,512,1,2,1,60000,"[I] 28 steps, fit"
"""
LAYOUTS = """model,gpu,node,width,height,frames,degree,batch,call_us,cfg,ulysses,ring
wan,h100,dit,480,480,81,8,1,90000,2,4,1
"""

LOG = """{"kind":"header","workers":["w0","w1"],"start":0}
{"kind":"run","node":"text","requests":["r1"],"gpus":[0],"start_us":0,"end_us":30000,\
"first_step":0,"steps":1,"batch":1}
{"kind":"run","node":"dit","requests":["r1","r2"],"gpus":[0,1],"start_us":30000,"end_us":90000,\
"first_step":[0,3],"steps":1,"batch":2}
{"kind":"lost","node":"dit","requests":["r1"],"gpus":[1],"start_us":90000,"end_us":150000,\
"first_step":1,"steps":1,"batch":1}
{"kind":"degraded","request":"r3","steps":20,"width":512,"height":512}
{"kind":"done","request":"r1","finish_us":99}
{"kind":"rejected","request":"r2","at_us":5,"reason":"DEADLINE"}
{"kind":"cancelled","request":"r3","at_us":7,"reason":""}
{"kind":"failed","request":"r4","at_us":8,"reason":"MODEL_ERROR"}
"""

SUMMARY = (
    '{"requests":2,"met":1,"attainment":0.5,"by_class":{"flux.1-dev 512x512x1":{"requests":2,'
    '"met":1,"attainment":0.5}},"latency_s":{"p50":1.5,"p90":1.9,"p99":2.0},'
    '"gpu_seconds_used":3.0,"utilisation":0.4,"rejected":0,"preemptions":1,"degree_changes":2,'
    '"plan_ms":{"p50":0.1,"p99":0.4}}'
)


def test_trace():
    (request,) = read_trace(TRACE)
    assert request.arrival_us == 1250 and request.to_request().deadline_us == 2_001_250
    assert write_trace((request,)) == TRACE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"slo_us"', '"slo"'),
        ('"steps":28', '"steps":0'),
        ('"steps":28', '"steps":"28"'),
        ('"arrival_us":1250', '"arrival_us":-1'),
        ('"priority":0', '"priority":0,"seed":1'),
        ("}", ""),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(old, new):
    with pytest.raises(TraceError) as error:
        read_trace(TRACE + "\n" + TRACE.replace("r000000", "r1").replace(old, new))
    assert error.value.line == 3
    with pytest.raises(TraceError):
        read_trace(TRACE + TRACE)


def test_profile():
    cells = Profile.from_csv(PROFILE, LAYOUTS).cells
    assert sorted(cells.values()) == [30_000, 60_000, 90_000]
    layouts = {k.node + str(k.layout.degree): k.layout for k in cells}
    assert layouts["dit2"].ulysses == 2
    assert (layouts["dit8"].cfg, layouts["dit8"].ulysses, layouts["dit8"].ring) == (2, 4, 1)


def test_the_shipped_profiles_read():
    for path in sorted(PROFILES.glob("*.csv")):
        assert Profile.from_csv(path.read_text()).cells, path


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("call_us", "call_ms", 1),
        (",source", ",note", 1),
        ("30000", "fast", 2),
        ("30000", "0", 2),
        (",2,1,60000", ",2,60000", 3),
        ("flux.1-dev,h100,dit", ",h100,dit", 3),
    ],
)
def test_a_broken_profile_is_refused_with_its_line(old, new, line):
    with pytest.raises(ProfileError) as error:
        Profile.from_csv(PROFILE.replace(old, new))
    assert error.value.line == line


def test_a_layout_must_multiply_to_the_degree():
    with pytest.raises(ProfileError, match="degree"):
        Profile.from_csv(LAYOUTS.replace("2,4,1", "2,2,1"))


def test_schedule_log():
    lines = read_log(LOG)
    assert [type(x).__name__ for x in lines].count("RunLine") == 2
    assert "".join(msgspec.json.encode(x).decode() + "\n" for x in lines) == LOG


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"kind":"header"', '"kind":"heading"'),
        ('"gpus":[0,1]', '"gpus":[0,2]'),
        ('"gpus":[0,1]', '"gpus":[1,1]'),
        ('"batch":2', '"batch":1'),
        ("[0,3]", "[0]"),
        ('"steps":1,"batch":2', '"steps":0,"batch":2'),
        ('"end_us":90000', '"end_us":3'),
        ('"request":"r2","at_us"', '"request":"r1","at_us"'),
        ('"finish_us"', '"finished_us"'),
    ],
)
def test_a_broken_schedule_log_is_refused(old, new):
    assert old in LOG
    with pytest.raises(LogError):
        read_log(LOG.replace(old, new))
    with pytest.raises(LogError):
        read_log(LOG.split("\n", 1)[1])


def test_summary():
    summary = msgspec.json.decode(SUMMARY, type=Summary)
    assert msgspec.json.encode(summary).decode() == SUMMARY
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(SUMMARY.replace('"met":1,"att', '"hit":1,"att', 1), type=Summary)


def test_what_the_simulator_writes_passes():
    result = run(case([(0, 512, 10**7), (5_000, 1024, 10**7)]))
    lines = read_log(result.log.text())
    assert sum(type(x) is RunLine for x in lines) >= 6
    summary = msgspec.json.decode(msgspec.json.encode(result.summary), type=Summary)
    assert summary.requests == summary.met == 2 and 0 < summary.utilisation <= 1
    assert summary.latency_s.p50 <= summary.latency_s.p99


CASE = """
[cluster]
workers = 2
gpu = "h100"
models = [{ name = "flux.1-dev", degrees = [1, 2] }]
[profile]
file = "flux.csv"
[workload]
trace = "trace.jsonl"
[settings]
policy = "fixed-2"
policy_settings = { overtake = false }
"""


def test_case(tmp_path):
    (tmp_path / "flux.csv").write_text(FLUX_CSV)
    (tmp_path / "trace.jsonl").write_text(TRACE)
    (tmp_path / "case.toml").write_text(CASE)
    result = run(load_case(tmp_path / "case.toml"))
    assert [e.request for e in result.ended] == ["r000000"]
    inline = CASE.replace('trace = "trace.jsonl"', f"requests = [{toml_request()}]")
    (tmp_path / "inline.toml").write_text(inline)
    assert run(load_case(tmp_path / "inline.toml")).digests == result.digests
    (tmp_path / "bad.toml").write_text(CASE + "straddle = 3.0\n")
    with pytest.raises(SettingError, match="straddle"):
        load_case(tmp_path / "bad.toml")


def toml_request():
    fields = msgspec.to_builtins(read_trace(TRACE)[0])
    return (
        "{" + ", ".join(f"{k} = {msgspec.json.encode(v).decode()}" for k, v in fields.items()) + "}"
    )
