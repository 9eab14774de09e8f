"""What was measured and chosen, as plain values: for a checkpoint, and for a file that spares measuring again."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_efficient.moe.planning.device import DeviceCost
from lightning_efficient.moe.planning.links import Links
from lightning_efficient.moe.planning.predict import Prediction
from lightning_efficient.moe.planning.shape import LayerShape
from lightning_efficient.moe.schedule import Schedule, schedule_named
from lightning_efficient.moe.topology import MoETopology

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """The schedule of a layer, and why.

    Args:
        shape: of the layer.
        schedule: that was chosen.
        reason: one clause.
        predictions: of the candidates; empty where nothing was measured.
        measured: seconds of the layer itself, by label, for those that were tried.
        doubtful: whether measurements were no ground to choose by.
    """

    shape: LayerShape
    schedule: Schedule
    reason: str
    predictions: tuple[Prediction, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    doubtful: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "shape": self.shape.as_dict(),
            "schedule": self.schedule.label,
            "reason": self.reason,
            "predictions": [
                {
                    "schedule": each.schedule.label,
                    "forward_s": each.forward_s,
                    "backward_s": each.backward_s,
                    "parts": dict(each.parts),
                    "exposed_s": each.exposed_s,
                }
                for each in self.predictions
            ],
            "measured": dict(self.measured),
            "doubtful": self.doubtful,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choice:
        """Read what :meth:`as_dict` wrote."""
        return cls(
            LayerShape(**values["shape"]),
            schedule_named(values["schedule"]),
            values["reason"],
            tuple(
                Prediction(**{**each, "schedule": schedule_named(each["schedule"])}) for each in values["predictions"]
            ),
            dict(values["measured"]),
            values["doubtful"],
        )


@dataclass(slots=True)
class Plan:
    """What holds for a job on certain machines.

    Args:
        setting: what it was measured with: it holds no more where any of that changes.
        links: what they cost; None: not measured.
        devices: what a layer's own work costs, by kind of layer.
        choices: by shape.
    """

    setting: Mapping[str, Any] = field(default_factory=dict)
    links: Links | None = None
    devices: dict[LayerShape, DeviceCost] = field(default_factory=dict)
    choices: dict[LayerShape, Choice] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, which ``torch.load(..., weights_only=True)`` and JSON can read."""
        return {
            "schema": SCHEMA,
            "setting": dict(self.setting),
            "links": None if self.links is None else self.links.as_dict(),
            "devices": [{"kind": kind.as_dict(), **cost.as_dict()} for kind, cost in self.devices.items()],
            "choices": [choice.as_dict() for choice in self.choices.values()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Read what :meth:`as_dict` wrote.

        Raises:
            ValueError: it is of another layout.
        """
        if values.get("schema") != SCHEMA:
            raise ValueError(f"a plan of layout {values.get('schema')!r}: this release reads {SCHEMA}. Measure anew.")
        choices = [Choice.from_dict(each) for each in values["choices"]]
        return cls(
            dict(values["setting"]),
            None if values["links"] is None else Links.from_dict(values["links"]),
            {LayerShape(**each["kind"]): DeviceCost.from_dict(each) for each in values["devices"]},
            {choice.shape: choice for choice in choices},
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, all or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self.as_dict(), file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: Path, setting: Mapping[str, Any]) -> Plan:
        """Read a file; an empty plan where there is none, where it was written in another setting, or is damaged.

        Args:
            path: of the file.
            setting: what holds now.
        """
        try:
            plan = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(setting)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"The plan in {path} cannot be read ({error}): links and layers are measured again, and it is written "
                "anew. Delete the file if this comes back.",
                stacklevel=2,
            )
            return cls(setting)
        return plan if plan.setting == dict(setting) else cls(setting)


def setting_of(topology: MoETopology, device: torch.device) -> dict[str, Any]:
    """Return what measurements depend on besides the layer. All ranks call it; the same on all.

    Args:
        topology: the groups.
        device: that layers run on.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    here = f"{socket.gethostname()}: {name}"
    hosts: list[Any] = [here]
    backend = "none"
    if topology.world.size > 1:
        hosts = [None] * topology.world.size
        dist.all_gather_object(hosts, here, group=topology.world.process_group)
        backend = dist.get_backend(topology.world.process_group)
    return {
        "hosts": hosts,
        "world_size": topology.world_size,
        "sizes": asdict(topology.sizes),
        "backend": backend,
        "torch": str(torch.__version__),
    }
