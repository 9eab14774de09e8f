"""Plays the steps of a rank against its resources: the device, and the links of each group of ranks.

What runs at the same time slows down what it shares a resource with. ``share(a, b)`` says how much: 0, both run at full
speed; 1, together they take the sum of their times. The collectives of one group queue up; a backend works on
``lanes`` of them at once. Latency is nobody's resource. All ranks are taken to do the same at the same time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightning_efficient.moe.planning.steps import Compute, Message, Start, Step, Wait

Cost = Callable[[Compute | Message], tuple[float, float]]
"""Seconds of a step: what it takes whatever else runs, and what the resource takes when nobody shares it."""
Share = Callable[[str, str], float]

DEVICE = "device"
_DONE = 1e-12


@dataclass(slots=True)
class Timeline:
    """How long the steps took.

    Attributes:
        seconds: until the last one has ended.
        busy: seconds of each kind of step by itself, as if nothing ran beside it.
        device: those of the device: what would be left if nothing had to be sent.
    """

    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    device: float = 0.0


@dataclass(slots=True)
class _Task:
    resource: str
    latency: float
    work: float
    flight: int = 0

    @property
    def done(self) -> bool:
        return self.latency <= _DONE and self.work <= _DONE


def play(steps: Sequence[Step], cost: Cost, share: Share, *, lanes: int = 1) -> Timeline:
    """Return how long a rank takes for the steps.

    Args:
        steps: in order; a collective runs from its start, beside what follows, until it is waited for.
        cost: of a computation and of a collective.
        share: how much two resources stand in each other's way, from 0 to 1; of a group with itself, too.
        lanes: collectives of one group that the backend works on at once.
    """
    timeline = Timeline()
    queues: dict[str, deque[_Task]] = defaultdict(deque)
    landed: set[int] = set()
    upcoming = deque(steps)
    on_device: _Task | None = None
    while True:
        while on_device is None and upcoming:
            step = upcoming[0]
            if isinstance(step, Wait) and step.start.flight not in landed:
                break
            upcoming.popleft()
            if isinstance(step, Compute):
                on_device = _Task(DEVICE, *cost(step))
                timeline.busy[step.work] += on_device.latency + on_device.work
                timeline.device += on_device.latency + on_device.work
            elif isinstance(step, Start):
                assert step.forward is not None, "steps hold no collective that sends nothing"
                task = _Task(step.forward.axis, *cost(step.forward), flight=step.flight)
                timeline.busy[f"{step.forward.op} {step.forward.axis}"] += task.latency + task.work
                queues[step.forward.axis].append(task)
        running = [task for queue in queues.values() for task in list(queue)[:lanes]]
        if on_device is not None:
            running.append(on_device)
        if not running:
            assert not upcoming, "a collective is waited for before it is started"
            return timeline
        timeline.seconds += _advance(running, share)
        if on_device is not None and on_device.done:
            on_device = None
        for queue in queues.values():
            for task in [task for task in queue if task.done]:
                landed.add(task.flight)
                queue.remove(task)


def _advance(running: Sequence[_Task], share: Share) -> float:
    """Let time pass until one of the tasks changes, and return how much."""
    rates = []
    for task in running:
        others = (other for other in running if other is not task and other.latency <= _DONE)
        slowed = task.latency <= _DONE
        rates.append(1 / (1 + sum(share(task.resource, other.resource) for other in others)) if slowed else 1.0)
    left = (task.latency if task.latency > _DONE else task.work for task in running)
    passed = min(seconds / rate for seconds, rate in zip(left, rates, strict=True))
    for task, rate in zip(running, rates, strict=True):
        if task.latency > _DONE:
            task.latency -= passed
        else:
            task.work -= passed * rate
    return passed
