"""The campaign as Ray Tune sees it: a searcher, and a scheduler for early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raysweep.search.campaign import Campaign, bundles_of
from raysweep.search.growth import Growth, PlacementRequest
from raysweep.search.interruption import INTERRUPTED, Interruption
from raysweep.search.ledger import Bundle
from raysweep.study.cells import Resources
from raysweep.training.ray_train import end_groups

NODES_SECONDS = 5.0
"""Least time between two looks at the cluster's nodes."""


class CampaignSearcher(Searcher):
    """Hands Tune the campaign's proposals as trial configs, and tells it their outcomes.

    A config holds plain values only: `cell`, `learning_rate`, `batch_sequences`, `seed`; and of
    trials on several workers the `group` that they run in, and whether it must be on `one_node`.
    """

    def __init__(
        self,
        campaign: Campaign,
        nodes: Callable[[], Mapping[str, Bundle]],
        interruption: Interruption,
        start_group: Callable[[str, Resources, bool], Any],
    ) -> None:
        super().__init__(metric="loss", mode="min")
        self._start_group = start_group
        self.campaign = campaign
        self._nodes = nodes
        self._interruption = interruption
        self._growth = Growth(PlacementRequest)
        self._looked = -math.inf
        self.groups: dict[str, Any] = {}
        """The groups of workers there are: they end with their handles here."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial; None while nothing fits or all waits on running trials."""
        if self._interruption.signum is not None:
            return Searcher.FINISHED
        if self.campaign.done:
            self._growth.withdraw()
            return Searcher.FINISHED
        proposal = self.campaign.ask(trial_id)
        ledger = self.campaign.ledger
        if ended := ledger.take_ended():
            end_groups([self.groups.pop(group) for group in ended if group in self.groups])
        if proposal is None:
            return None
        spec = proposal.spec
        config = {
            "cell": spec.cell.name,
            "learning_rate": spec.learning_rate,
            "batch_sequences": spec.batch_sequences,
            "seed": spec.seed,
        }
        if (group := ledger.group_of(trial_id)) is not None:
            one_node = ledger.on_one_node(bundles_of(spec.cell))
            config |= {"group": group, "one_node": one_node}
            if group not in self.groups:
                self.groups[group] = self._start_group(group, spec.cell.resources, one_node)
        return config

    def look(self, trials: Sequence[Trial]) -> None:
        """See, now and then, which nodes there are, and ask for more where trials wait for room.

        Tune asks for no suggestion while a trial of its own waits, so it must not be `suggest` that
        looks: then requests that were granted would keep the very room that this trial waits for.
        While one waits nothing is asked for besides.
        """
        now = time.monotonic()
        if now - self._looked < NODES_SECONDS:
            return
        self._looked = now
        campaign = self.campaign
        campaign.ledger.update(self._nodes())
        if any(trial.status == Trial.PENDING for trial in trials):
            self._growth.withdraw()
        else:
            self._growth.update(campaign.waiting(), campaign.running, campaign.ledger.nodes)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Called once a trial is over for good; retries do not show here."""
        if error:
            self.campaign.tell(trial_id, "crashed")
        elif not result or "status" not in result:
            self.campaign.tell(trial_id, "stopped")
        elif result["status"] != INTERRUPTED:  # else it is not over: the next run takes it up
            branches = result.get("branches", ())
            self.campaign.tell(trial_id, result["status"], result.get("loss"), branches)

    def __deepcopy__(self, memo: dict[int, Any]) -> CampaignSearcher:
        """Tune copies its searcher; the progress display must see the one that is in use."""
        return self

    def save(self, checkpoint_path: str) -> None:
        """Nothing: rows are the only truth, and a campaign is rebuilt from them."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class EarlyStop(FIFOScheduler):
    """Tune's scheduler: trials start as they come, and end early where the campaign says so."""

    def __init__(self, campaign: Campaign) -> None:
        super().__init__()
        self._campaign = campaign

    def __deepcopy__(self, memo: dict[int, Any]) -> EarlyStop:
        """Tune copies its scheduler; the campaign must stay the one in use."""
        return self

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        """Called with each progress report."""
        if "percent" not in result:
            return self.CONTINUE
        prune = self._campaign.report(trial.trial_id, result["percent"], result["train_loss"])
        return self.STOP if prune else self.CONTINUE
