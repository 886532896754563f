"""Names of spans and of their attributes: what services write and `hocket trace` and `hocket
timeline` read.

One request is one trace. `STEP` is recorded by a group's first member, one span a step and request,
for every node of the workflow (the text and VAE nodes have one step).
"""

from __future__ import annotations

# Spans of the gateway.
GENERATE = "Generate"  # the whole call
SUBMITTED = "submitted"  # event of it: checked, and on its way to control
ANSWERED = "answered"  # event of it: control promised, or refused
MEDIA_FETCH = "media fetch"
# Spans of control.
ADMIT = "admit"
QUEUE = "queue"  # from acceptance to the first assignment
ROUND = "round"  # one for each round in which the request was planned
# Spans of a worker.
STEP = "step"
GROUP = "group"  # making a communicator
LOAD = "load"  # getting weights onto the device; may lie before, or beside, another job's steps
TRANSFER = "transfer"  # fetching a latent from its holder
RECALL = "recall"  # embeddings of prompts that the worker had encoded before
PUBLISH = "publish"  # writing media to the object store

REQUEST = "hocket.request_id"
MODEL = "hocket.model"
SHAPE = "hocket.shape"  # "128x128"
NODE = "hocket.node"  # of the workflow; "text", "dit" and "vae" of a plain chain
OPERATION = "hocket.operation"  # what the node does: "denoise"; of a plain chain its node
STEP_INDEX = "hocket.step"  # steps behind the job after this one
STEPS = "hocket.steps"
DEGREE = "hocket.degree"
WORKERS = "hocket.workers"  # names, first member first
WORKER = "hocket.worker"
MEMBERS_US = "hocket.members_us"  # of a step: how much was each worker's own, in their order
PREDICTED_US = "hocket.predicted_us"
DEADLINE_US = "hocket.deadline_us"
ROUND_NUMBER = "hocket.round"
TERM = "hocket.term"
SEQUENCE = "hocket.sequence"  # of the assignment
OUTCOME = "hocket.outcome"
BYTES = "hocket.bytes"
PART = "hocket.part"  # weights: "model/node"
EVICTED = "hocket.evicted"  # parts that made room
WAITED_US = "hocket.waited_us"  # how long the steps had to wait for it
FROM = "hocket.from"
TO = "hocket.to"
