"""What the Prefect server does by itself: a run whose process vanished without a word is marked as crashed."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

HEARTBEAT_SECONDS = 30
"""Between two signs of life of a run; Prefect allows nothing shorter."""
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
ZOMBIES = "distilllens: crash runs without a heartbeat"
_PREFIX = "prefect.flow-run"
_ENDINGS = ("Completed", "Failed", "Cancelled", "Crashed", "Skipped", "TimedOut")
"""State names after which no heartbeat is due. An event is named after the state's own name, so ours belong here too."""


def zombie_automation(tag: str) -> AutomationCore:
    """Marks a run with a tag as crashed when it had a heartbeat and is silent since, without an ending.

    The trigger is the documented one (docs.prefect.io, "detect zombie flows"), narrowed to our own runs: a server may have
    other people's.
    """
    return AutomationCore(
        name=ZOMBIES,
        description=f"A run whose last heartbeat is {SILENCE_SECONDS} s old has lost its process.",
        trigger=EventTrigger(
            after={f"{_PREFIX}.heartbeat"},
            expect={f"{_PREFIX}.heartbeat", *(f"{_PREFIX}.{name}" for name in _ENDINGS)},
            match=ResourceSpecification({"prefect.resource.id": [f"{_PREFIX}.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.id": [f"prefect.tag.{tag}"], "prefect.resource.role": ["tag"]}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENCE_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"No heartbeat for {SILENCE_SECONDS} s: its process is gone. The next run goes on from what is done.",
                force=False,
            )
        ],
    )


def ensure_zombie_automation(tag: str) -> bool:
    """Create the automation unless there is one of its name, which may have been edited; returns whether it was created."""
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(ZOMBIES):
            return False
        client.create_automation(zombie_automation(tag))
    return True
