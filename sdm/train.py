"""Train the adaptor over J shuffled splits at once and keep the best epoch of each.

Every split j is an independent training run: its own halves, standardisation, start values,
batch order and kept epoch. They share one optimiser over stacked parameters, which is the same
arithmetic, because Adam's state is kept per element and the loss is a sum over j of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdm.activation import SOFTMAX_SIMILARITY, sdm_loss
from sdm.adaptor import Adaptor, fuse, initial_parameters
from sdm.cdf import distance_quantile, per_class_sorted
from sdm.matching import Support, match
from sdm.model import Calibration, SDMModel, calibrate
from workbench.errors import DataError, DivergedError
from workbench.optim import clip
from workbench.seeding import Streams

PARAMETERS = ("weight", "bias", "head_weight", "head_bias")


def make_splits(
    labels: Int[Tensor, " points"],
    n_iterations: int,
    n_classes: int,
    streams: Streams,
    *,
    stratify: bool = True,
) -> tuple[Int[Tensor, "runs train"], Int[Tensor, "runs calibration"]]:
    """Positions of the training and calibration half of each iteration.

    Stratified halves hold half of every class (the method assumes balanced classes); plain ones
    cut one permutation in the middle.

    Raises:
        DataError: a class has fewer than 2 points in a half.
    """
    y = labels.cpu().numpy()
    halves: list[tuple[np.ndarray, np.ndarray]] = []
    for j in range(n_iterations):
        rng = streams("sdm/split", index=j)
        if stratify:
            parts = [rng.permutation(np.flatnonzero(y == c)) for c in range(n_classes)]
            cuts = [(len(part) + c % 2) // 2 for c, part in enumerate(parts)]
            first = np.concatenate([part[:cut] for part, cut in zip(parts, cuts, strict=True)])
            second = np.concatenate([part[cut:] for part, cut in zip(parts, cuts, strict=True)])
        else:
            order = rng.permutation(len(y))
            first, second = order[: len(y) // 2], order[len(y) // 2 :]
        for name, half in (("training", first), ("calibration", second)):
            check_classes(y[half], n_classes, f"{name} half of iteration {j}")
        halves.append((np.sort(first), np.sort(second)))
    train = torch.from_numpy(np.stack([first for first, _ in halves]))
    return train, torch.from_numpy(np.stack([second for _, second in halves]))


def check_classes(labels: np.ndarray, n_classes: int, where: str) -> None:
    """Refuse a set in which a class has fewer than two points.

    Raises:
        DataError: naming the class and the counts.
    """
    counts = np.bincount(labels, minlength=n_classes)
    if counts.min() < 2:
        listing = ", ".join(f"{c}: {n}" for c, n in enumerate(counts[:10]))
        raise DataError(
            f"class {int(counts.argmin())} has {counts.min()} points in the {where}; "
            f"at least 2 are needed (points per class: {listing})"
        )


def refuse_divergence(epoch: int, batch: object, **values: Tensor) -> None:
    """`Run.require_finite` for a training without a run: nothing is kept.

    Raises:
        DivergedError: one of the values is not finite.
    """
    bad = [name for name, value in values.items() if not bool(torch.isfinite(value))]
    if bad:
        raise DivergedError(
            f"{', '.join(bad)} not finite in epoch {epoch}; lower the learning rate"
        )


class Trainer:
    """J adaptors in training; `run_epoch` advances all of them, `models` fits what was kept."""

    def __init__(
        self,
        features: Float[Tensor, "points width"],
        labels: Int[Tensor, " points"],
        splits: tuple[Int[Tensor, "runs train"], Int[Tensor, "runs calibration"]],
        streams: Streams,
        *,
        n_classes: int,
        exemplar_dim: int = 1000,
        learning_rate: float = 1e-5,
        batch_size: int = 50,
        warm_up_epochs: int = 0,
        max_similarity: int | None = 2048,
        balanced_accuracy: bool = False,
    ):
        self.features, self.labels = features.float(), labels
        self.train_index, self.calibration_index = splits
        self.streams = streams
        self.batch_size, self.warm_up_epochs = batch_size, warm_up_epochs
        self.max_similarity, self.balanced_accuracy = max_similarity, balanced_accuracy
        self.n_classes = n_classes
        runs, n_train = self.train_index.shape
        device = features.device

        self.centre = torch.empty(runs, dtype=torch.float64, device=device)
        self.scale = torch.empty(runs, dtype=torch.float64, device=device)
        for j in range(runs):
            entries = self.features[self.train_index[j]].double()
            self.centre[j], self.scale[j] = entries.mean(), entries.std()
        if not bool((self.scale > 0).all()):
            raise DataError("all features have the same value (σ = 0); nothing can be learnt")

        width = features.shape[1]
        starts = [
            initial_parameters(width, exemplar_dim, n_classes, streams.torch("sdm/init", index=j))
            for j in range(runs)
        ]
        self.parameters = {
            name: torch.stack([start[name] for start in starts]).to(device).requires_grad_()
            for name in PARAMETERS
        }
        self.optimizer = torch.optim.Adam(
            list(self.parameters.values()), lr=learning_rate, eps=1e-8, fused=device.type != "mps"
        )
        self.similarity = torch.full((runs, n_train), SOFTMAX_SIMILARITY, device=device)
        self.distance = torch.ones((runs, n_train), device=device)
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.best_metric = [-math.inf] * runs
        self.best_epoch = [0] * runs

    @property
    def n_iterations(self) -> int:
        """J."""
        return len(self.train_index)

    @property
    def best_iteration(self) -> int:
        """The split with the best kept metric; the later one of equals."""
        return max(range(self.n_iterations), key=lambda j: (self.best_metric[j], j))

    def adaptor(self, j: int, parameters: dict[str, Tensor] | None = None) -> Adaptor:
        """The maps of iteration j, by default as they are now."""
        chosen = self.parameters if parameters is None else parameters
        maps = {name: chosen[name][j].detach() for name in PARAMETERS}
        return Adaptor(centre=self.centre[j], scale=self.scale[j], **maps)

    def run_epoch(
        self, epoch: int, require_finite: Callable[..., None] | None = None
    ) -> dict[str, float]:
        """One pass over every training half, then fresh q and d; epochs count from 1.

        Returns the mean training loss and, for the best iteration so far, the calibration metric.

        Raises:
            DivergedError: a loss or gradient is not finite; the update is not made. A run's own
                `require_finite(epoch, batch, **values)` also keeps the batch.
        """
        loss = self._pass(epoch, require_finite or refuse_divergence)
        metrics = []
        for j in range(self.n_iterations):
            adaptor = self.adaptor(j)
            support, similarity, distance = self._match_training(j, adaptor)
            if epoch > self.warm_up_epochs:
                self.similarity[j], self.distance[j] = similarity.float(), distance.float()
            metric = self._metric(adaptor, j, support)
            metrics.append(metric)
            if metric >= self.best_metric[j]:
                self.best_metric[j], self.best_epoch[j] = metric, epoch
                for name in PARAMETERS:
                    self.best[name][j] = self.parameters[name][j].detach()
        return {
            "train/loss": loss,
            "calibration/metric_mean": float(np.mean(metrics)),
            "calibration/metric_best": max(self.best_metric),
            "train/similarity_median": float(self.similarity.median()),
            "train/distance_mean": float(self.distance.mean()),
        }

    def _pass(self, epoch: int, require_finite: Callable[..., None]) -> float:
        """Adam over all mini-batches of all iterations."""
        runs, n_train = self.train_index.shape
        order = torch.stack(
            [
                torch.from_numpy(self.streams(f"sdm/order/{j}", index=epoch).permutation(n_train))
                for j in range(runs)
            ]
        ).to(self.features.device)
        centre, scale = (v.float()[:, None, None] for v in (self.centre, self.scale))
        total = torch.zeros(runs, device=self.features.device)
        for start in range(0, n_train, self.batch_size):
            rows = order[:, start : start + self.batch_size]  # (runs, batch)
            index = self.train_index.gather(1, rows)
            weight, offset = fuse(*(self.parameters[name] for name in PARAMETERS))
            x = (self.features[index] - centre) / scale
            logits = x @ weight.mT + offset[:, None]  # (runs, batch, classes)
            q, d = self.similarity.gather(1, rows), self.distance.gather(1, rows)
            losses = sdm_loss(logits, self.labels[index], q, d).mean(1)
            self.optimizer.zero_grad(set_to_none=True)
            loss = losses.sum()
            loss.backward()
            norm = clip(self.parameters.values(), 0)
            require_finite(epoch, {"rows": index}, loss=loss.detach(), gradient_norm=norm)
            self.optimizer.step()
            total += losses.detach() * rows.shape[1]
        return float(total.mean()) / n_train

    def _match_training(self, j: int, adaptor: Adaptor) -> tuple[Support, Tensor, Tensor]:
        """Support of iteration j and q, d of its own points, each left out of its own search."""
        index = self.train_index[j]
        hidden, labels = self.features[index], self.labels[index]
        support = Support(adaptor.points(hidden), labels, adaptor.logits(hidden).argmax(1))
        found = match(
            support,
            support.points,
            support.predictions,
            self_index=torch.arange(len(index), device=hidden.device),
            max_similarity=self.max_similarity,
        )
        arrays = per_class_sorted(found.distance, labels, self.n_classes, found.similarity > 0)
        return support, found.similarity, distance_quantile(found.distance, arrays)

    def _metric(self, adaptor: Adaptor, j: int, support: Support) -> float:
        """Minus the mean over classes of the mean SDM loss on the calibration half."""
        known = self._calibrate(adaptor, j, support)
        if self.balanced_accuracy:
            values = (known.predictions == known.labels).double()
        else:
            logits = adaptor.logits(self.features[self.calibration_index[j]])
            values = -sdm_loss(logits, known.labels, known.similarity, known.distance)
        means = [float(values[known.labels == c].mean()) for c in range(self.n_classes)]
        return float(np.mean(means))

    def _calibrate(self, adaptor: Adaptor, j: int, support: Support) -> Calibration:
        index = self.calibration_index[j]
        return calibrate(
            adaptor,
            support,
            self.features[index],
            self.labels[index],
            max_similarity=self.max_similarity,
        )

    def models(self, target_accuracy: float, *, finite_sample: bool = False) -> list[SDMModel]:
        """The kept epoch of every iteration with its support, calibration arrays and region."""
        fitted = []
        for j in range(self.n_iterations):
            adaptor = self.adaptor(j, self.best)
            support, _, _ = self._match_training(j, adaptor)
            known = self._calibrate(adaptor, j, support)
            region = known.region(target_accuracy, finite_sample=finite_sample)
            fitted.append(SDMModel(adaptor, support, known, region, self.max_similarity))
        return fitted

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from epoch to epoch."""
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "similarity": self.similarity,
            "distance": self.distance,
            "best": self.best,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.similarity = state["similarity"].to(self.similarity).clone()
        self.distance = state["distance"].to(self.distance).clone()
        self.best = {name: state["best"][name].to(self.best[name]).clone() for name in PARAMETERS}
        self.best_metric = [float(value) for value in state["best_metric"]]
        self.best_epoch = [int(value) for value in state["best_epoch"]]
