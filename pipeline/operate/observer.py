"""Health as it is observed: every configured backend is asked in the background, and what was last seen is kept."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import engines
from pipeline.config import Address, Settings
from pipeline.operate import registry
from pipeline.operate.registry import ModelStatus
from pipeline.runs.folder import DEFAULT_OUTPUT
from pipeline.serve.artefacts import Artefact, written_after

# a dead server refuses the connection at once; a slow answer counts as one only the second time, for busy is not dead
PERIOD, TIMEOUT = 1.0, 1.5
_PATIENCE = 2


@dataclass(frozen=True)
class Observation:
    """What is known of one backend: its models, whether its configured model answers, since when (wall clock), how fresh."""

    address: Address
    healthy: bool = False
    models: tuple[ModelStatus, ...] = ()
    detail: str = "not asked yet"
    changed_at: float = 0.0
    checked_at: float = 0.0
    timeouts: int = 0

    def artefact(self, model: str) -> Artefact | None:
        """The fine-tune behind a model name here, as last seen - also while the backend is down."""
        status = registry.same_model(self.models, model)
        return status.artefact if status else None


class Observer:
    """Asks the backends every :data:`PERIOD` seconds while its task runs; readers get the latest observation."""

    def __init__(self, addresses: Sequence[Address], output: Path = DEFAULT_OUTPUT, period: float = PERIOD) -> None:
        self.seen = {address.backend: Observation(address) for address in addresses}
        self.output = output
        self.period = period
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def of(cls, settings: Settings, output: Path = DEFAULT_OUTPUT) -> "Observer":
        """Watch every backend that has a URL."""
        addresses = [settings.address(name) for name in engines.NAMES]
        return cls([address for address in addresses if address.base_url], output)

    async def __aenter__(self) -> "Observer":
        """Start asking; each backend has a task of its own, so that a hanging one does not delay the others."""
        self._tasks = [asyncio.create_task(self._watch(name)) for name in self.seen]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def stale(self) -> bool:
        """True when what is said of any backend is not an observation."""
        return any(self.outdated(seen) for seen in self.seen.values())

    def outdated(self, seen: Observation) -> bool:
        """True when this backend has not been asked for so long that what is said of it is not an observation."""
        return time.time() - seen.checked_at > 5 * (self.period + TIMEOUT)

    async def ask(self, name: str) -> None:
        """Ask one backend once and keep what it says; when the question itself breaks, it counts as unavailable."""
        before = self.seen[name]
        try:
            statuses = await registry.check(before.address, timeout=TIMEOUT, output=self.output)
            statuses = [self._credible(before, status) for status in statuses]
        except Exception as error:  # whatever it is, watching goes on; its words may hold a key, its type does not
            words = f"the check of {name} broke off ({type(error).__name__}): please report it"
            statuses = [ModelStatus(before.address.model, False, detail=words, kind="check")]
        self.seen[name] = _after(before, statuses)

    def _credible(self, before: Observation, status: ModelStatus) -> ModelStatus:
        """The status, without an artefact that was exported after this server was seen up: it cannot have loaded that one."""
        ours = status.artefact
        if ours is None or not before.healthy or ours == before.artefact(status.name):
            return status
        late = written_after(self.output / ours.run / ours.file, before.changed_at)
        return replace(status, artefact=None) if late else status

    async def _watch(self, name: str) -> None:
        while True:
            await self.ask(name)
            if not (self.seen[name].healthy and self.seen[name].timeouts):
                await asyncio.sleep(self.period)


def _after(before: Observation, statuses: list[ModelStatus]) -> Observation:
    now = time.time()
    wanted = registry.same_model(statuses, before.address.model)
    if wanted is None:
        # no model is configured: any that answers will do
        wanted = next((status for status in statuses if status.available), statuses[0])
    timeouts = before.timeouts + 1 if wanted.kind == "timeout" else 0
    if before.healthy and 0 < timeouts < _PATIENCE:
        return replace(before, checked_at=now, timeouts=timeouts)
    if any(status.available for status in statuses):
        # a name that is not served now is still known for what it was, so that its fine-tune can be had elsewhere
        known = {model.name: model.artefact for model in before.models}
        models = [s if s.available or s.artefact else replace(s, artefact=known.get(s.name)) for s in statuses]
    else:
        # of a backend that is down the models are known for when it returns
        models = [replace(model, available=False, loaded=False, detail=wanted.detail) for model in before.models]
    changed = now if wanted.available != before.healthy or not before.changed_at else before.changed_at
    return Observation(before.address, wanted.available, tuple(models), wanted.detail, changed, now, timeouts)
