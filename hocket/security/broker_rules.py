"""The broker's permissions by role, as a nats-server configuration.

A client is who its certificate says (`verify_and_map`: the DNS name `hocket-<role>`), so there are
no passwords. Each role has inboxes of its own: nobody reads the answers to another role. Nobody but
control writes promises, the diary, the leader's key, assignments or truncations.

Whom a role may answer is listed, too: `allow_responses` would let whoever gets a message publish on
any subject that its sender named for the answer. Only workers answer, and only workers ask them.
The broker's own answers go wherever an asker says. So a worker, who writes media, has no read that
hands them out as they are (`DIRECT.GET`, consumers), and does not configure their stream.
"""

from __future__ import annotations

import json
from pathlib import Path

from hocket.bus import Subjects
from hocket.security.certificates import common_name


def inbox_of(role: str) -> str:
    """Prefix of the inboxes on which a role gets answers."""
    return f"_INBOX_{role}"


def permissions(role: str, cluster: str) -> dict[str, list[str]]:
    """Subjects that a role may publish and subscribe to in a cluster."""
    subjects = Subjects(cluster)
    media, leader = f"OBJ_{subjects.media_bucket}", f"KV_{subjects.leader_bucket}"
    own = f"{inbox_of(role)}.>"
    match role:
        case "control":
            publish = [f"hocket.v1.{cluster}.>", "$KV.>", "$JS.>", "$O.>"]
            return {"publish": publish, "subscribe": [f"hocket.v1.{cluster}.>", own]}
        case "worker":
            publish = [
                subjects.heartbeat("*"),
                subjects.report("*"),
                subjects.latent("*"),
                f"$O.{subjects.media_bucket}.>",
                own,  # answers to other workers
                "$JS.API.INFO",
                *(f"$JS.API.STREAM.{verb}.{media}" for verb in ("INFO", "MSG.GET", "PURGE")),
            ]
            listen = [subjects.assign("*"), subjects.truncate("*"), subjects.latent("*"), own]
            return {"publish": publish, "subscribe": listen}
        case "gateway":
            publish = [f"$JS.API.STREAM.{verb}.{media}" for verb in ("INFO", "MSG.GET")]
            publish += [f"$JS.API.DIRECT.GET.{media}", f"$JS.API.DIRECT.GET.{media}.>"]
            return {"publish": [*publish, *_reading(leader)], "subscribe": [own]}
        case "operator":  # reads: `bench replay`, `hocket status`
            publish = _reading("*")
            return {"publish": publish, "subscribe": [f"hocket.v1.{cluster}.>", own]}
    raise AssertionError(f"the broker knows no role {role}")


def _reading(stream: str) -> list[str]:
    """What reading a stream, a bucket or an object store takes."""
    return [
        "$JS.API.INFO",
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.API.CONSUMER.CREATE.{stream}",
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.DELETE.{stream}.*",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.ACK.{stream}.>",
        f"$JS.FC.{stream}.>",
    ]


def configuration(cluster: str, folder: Path, listen: str, store: str) -> str:
    """Text of a nats-server configuration that uses the broker's certificates in `folder`."""
    users = [
        {"user": common_name(role), "permissions": _as_rules(permissions(role, cluster))}
        for role in ("control", "worker", "gateway", "operator")
    ]
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
            f"authorization {{ users: {json.dumps(users, indent=2)} }}",
            "",
        )
    )


def _as_rules(allowed: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    return {verb: {"allow": sorted(set(names))} for verb, names in allowed.items()}
