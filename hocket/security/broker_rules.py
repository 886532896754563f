"""The broker's permissions by role, as a nats-server configuration.

A client is who its certificate says (`verify_and_map`: the DNS name `hocket-<role>`), so there are
no passwords. Each role has an account of its own, and in it inboxes of its own:

    workers ── heartbeats, reports ──▶ control ── assignments, truncations ──▶ workers
    gateways, operators, workers ── reads; media, uploads ──▶ JetStream, in control's account

A subject is one account's: what another one is to hear, or may ask for, is listed as an export and
an import. That is why nobody but control has anything put where control or its streams listen: the
broker answers as itself wherever an asker says, permissions or not, but only in the asker's
account. So JetStream's API has another name there (`API`), and no other account has consumers,
which would deliver in control's.

Within an account permissions say the rest. Whom a role may answer is listed, too: `allow_responses`
would let whoever gets a message publish on any subject that its sender named for the answer. Only
workers answer, and only workers ask them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hocket.messaging.bus import Subjects
from hocket.security.certificates import common_name

API = "JS.control.API"  # what other accounts call $JS.API
_API = "$JS.API"
_ACCOUNTS = {
    "control": "control",
    "worker": "workers",
    "gateway": "gateways",
    "operator": "operators",
}
Rules = dict[str, list[str]]


def inbox_of(role: str) -> str:
    """Prefix of the inboxes on which a role gets answers."""
    return f"_INBOX_{role}"


def api_of(role: str) -> str:
    """How a role calls JetStream's API; empty: by its own name."""
    return "" if role == "control" else API


def permissions(role: str, cluster: str, worker: str = "*") -> Rules:
    """Subjects that a role may publish and subscribe to in a cluster; of a `worker`, as itself."""
    subjects = Subjects(cluster)
    own = f"{inbox_of(role)}.>"
    reads = [f"{API}.{call}" for call in _reads(role, subjects)]
    match role:
        case "control":
            publish = [f"hocket.v1.{cluster}.>", "$KV.>", "$JS.>", "$O.>"]
            return {"publish": publish, "subscribe": [f"hocket.v1.{cluster}.>", own]}
        case "worker":
            publish = [subjects.heartbeat(worker), subjects.report(worker), subjects.latent("*")]
            publish += _media(subjects)
            publish.append(own)  # answers to other workers
            listen = [subjects.assign(worker), subjects.truncate(worker), subjects.latent(worker)]
            return {"publish": [*publish, *reads], "subscribe": [*listen, own]}
        case "gateway":
            return {"publish": [*_inputs(subjects), *reads], "subscribe": [own]}
        case "operator":
            return {"publish": reads, "subscribe": [f"hocket.v1.{cluster}.>", own]}
    raise AssertionError(f"the broker knows no role {role}")


def configuration(
    cluster: str, folder: Path, listen: str, store: str, hosts: Mapping[str, int] | None = None
) -> str:
    """Text of a nats-server configuration that uses the broker's certificates in `folder`.

    `hosts`: where workers have certificates of their hosts, how many each has at most: they speak
    and listen as HOST-0, HOST-1, … and nobody else's certificate is a worker's.
    """
    return "\n".join(
        (
            f"# nats-server -c {folder / 'nats-server.conf'}",
            f"listen: {json.dumps(listen)}",
            f"jetstream {{ store_dir: {json.dumps(store)} }}",
            "tls {",
            f"  cert_file: {json.dumps(str(folder / 'cert.pem'))}",
            f"  key_file: {json.dumps(str(folder / 'key.pem'))}",
            f"  ca_file: {json.dumps(str(folder / 'ca.pem'))}",
            "  verify_and_map: true",
            "}",
            f"accounts: {json.dumps(_accounts(cluster, hosts or {}), indent=2)}",
            "",
        )
    )


def _accounts(cluster: str, hosts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    subjects = Subjects(cluster)
    told = [subjects.assign("*"), subjects.truncate("*")]
    said = [subjects.heartbeat("*"), subjects.report("*")]
    own = f"hocket.v1.{cluster}.>"
    services: dict[str, list[str]] = {}
    for role in ("worker", "gateway", "operator"):
        for call in _reads(role, subjects):
            services.setdefault(f"{_API}.{call}", []).append(_ACCOUNTS[role])
    accounts: dict[str, dict[str, Any]] = {
        "control": {
            "jetstream": "enabled",
            "exports": [
                *({"service": s, "accounts": sorted(who)} for s, who in services.items()),
                *({"service": s, "accounts": ["workers"]} for s in _media(subjects)),
                *({"service": s, "accounts": ["gateways"]} for s in _inputs(subjects)),
                *({"stream": s, "accounts": ["workers"]} for s in told),
                {"stream": own, "accounts": ["operators"]},
            ],
            "imports": _heard("workers", said),
        },
        "workers": {
            "exports": [{"stream": s, "accounts": ["control", "operators"]} for s in said],
            "imports": [
                *_asked("worker", subjects),
                *({"service": _from("control", s)} for s in _media(subjects)),
                *_heard("control", told),
            ],
        },
        "gateways": {
            "imports": [
                *_asked("gateway", subjects),
                *({"service": _from("control", s)} for s in _inputs(subjects)),
            ]
        },
        "operators": {
            "imports": [
                *_asked("operator", subjects),
                *_heard("control", [own]),
                *_heard("workers", said),
            ]
        },
    }
    for role, account in _ACCOUNTS.items():
        accounts[account]["users"] = _users(role, cluster, hosts)
    return accounts


def _users(role: str, cluster: str, hosts: Mapping[str, int]) -> list[dict[str, Any]]:
    if role != "worker" or not hosts:
        return [_user(common_name(role), [permissions(role, cluster)])]
    found = []
    for host, count in hosts.items():
        named = [permissions(role, cluster, f"{host}-{number}") for number in range(count)]
        found.append(_user(common_name(f"worker-{host}"), named))
    return found


def _user(name: str, allowed: list[Rules]) -> dict[str, Any]:
    return {"user": name, "permissions": _as_rules(allowed)}


def _reads(role: str, subjects: Subjects) -> list[str]:
    """Calls of JetStream's API that a role may make, behind the API's name."""
    media, leader = f"OBJ_{subjects.media_bucket}", f"KV_{subjects.leader_bucket}"
    inputs = f"OBJ_{subjects.input_bucket}"
    reads = ("STREAM.INFO.{}", "STREAM.MSG.GET.{}", "DIRECT.GET.{}", "DIRECT.GET.{}.>")
    match role:
        case "worker":
            return [
                *(f"STREAM.{verb}.{media}" for verb in ("INFO", "MSG.GET", "PURGE")),
                *(call.format(inputs) for call in reads),
            ]
        case "gateway":
            return [
                *(call.format(bucket) for bucket in (media, inputs) for call in reads),
                f"STREAM.MSG.GET.{leader}",
            ]
        case "operator":
            return ["STREAM.INFO.*", "STREAM.MSG.GET.*", "DIRECT.GET.*", "DIRECT.GET.*.>"]
    return []


def _media(subjects: Subjects) -> list[str]:
    """Where the pieces and the descriptions of media are stored."""
    return [f"$O.{subjects.media_bucket}.{kind}.*" for kind in "CM"]


def _inputs(subjects: Subjects) -> list[str]:
    """Where the pieces and the descriptions of uploaded inputs are stored."""
    return [f"$O.{subjects.input_bucket}.{kind}.*" for kind in "CM"]


def _asked(role: str, subjects: Subjects) -> list[dict[str, Any]]:
    return [
        {"service": _from("control", f"{_API}.{call}"), "to": f"{API}.{call}"}
        for call in _reads(role, subjects)
    ]


def _heard(account: str, subjects: list[str]) -> list[dict[str, Any]]:
    return [{"stream": _from(account, subject)} for subject in subjects]


def _from(account: str, subject: str) -> dict[str, str]:
    return {"account": account, "subject": subject}


def _as_rules(allowed: list[Rules]) -> dict[str, dict[str, list[str]]]:
    return {
        verb: {"allow": sorted({name for rules in allowed for name in rules[verb]})}
        for verb in ("publish", "subscribe")
    }
