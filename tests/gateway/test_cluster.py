"""Questions to the leader that get no answer, and whose fault it is said to be."""

from __future__ import annotations

import pytest

from gateway.cluster import ClusterWatch
from gateway.grpc_link import Doors
from hocket.errors import BrokerAway, ControlUnavailable, NotReady


@pytest.mark.parametrize(("away", "told"), [(True, BrokerAway), (False, ControlUnavailable)])
async def test_a_broker_that_is_away_is_named(away: bool, told: type[NotReady]) -> None:
    """A Cancel is answered once its end is stored: without a broker that is never."""

    async def ready(_: bool) -> None:
        """Nobody listens."""

    doors = Doors([], None)
    cluster = ClusterWatch(doors, ready, lambda: away)
    with pytest.raises(NotReady) as caught:
        await cluster.ask(lambda control: control.CancelRequest(None), timeout_s=0.01)
    assert type(caught.value) is told
    await doors.close()
