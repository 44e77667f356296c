"""A fitted estimator as one folder: safetensors for arrays, JSON for the rest, hashes over all.

config.json              settings, classes, region of every iteration, sha256 of the other files
weights.safetensors      maps of all iterations
support.safetensors      training points, labels and predictions of all iterations
calibration.safetensors  calibration arrays of all iterations
splits.json              rows of the training and calibration half of every iteration
history.jsonl            one line per epoch
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sdm.adaptor import Adaptor
from sdm.calibrate import Region
from sdm.matching import Support
from sdm.model import Calibration, SDMModel
from workbench import storage
from workbench.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from sdm.estimator import SDMClassifier

FORMAT = 1
SUPPORT_FIELDS = ("points", "labels", "predictions")


def save(classifier: SDMClassifier, folder: Path | str) -> Path:
    """Write a fitted classifier; `config.json` comes last and completes the folder."""
    folder = Path(folder)
    models: list[SDMModel] = classifier.models_
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "support": {}, "calibration": {}}
    for j, model in enumerate(models):
        for name, value in model.adaptor.tensors().items():
            parts["weights"][f"{j}.{name}"] = value
        for name in SUPPORT_FIELDS:
            parts["support"][f"{j}.{name}"] = getattr(model.support, name)
        for field in fields(Calibration):
            parts["calibration"][f"{j}.{field.name}"] = getattr(model.calibration, field.name)
    files = [
        storage.write_safetensors(folder / f"{part}.safetensors", tensors)
        for part, tensors in parts.items()
    ]
    splits = {
        "train": classifier.train_index_.tolist(),
        "calibration": classifier.calibration_index_.tolist(),
    }
    files.append(storage.write_json(folder / "splits.json", splits))
    lines = [json.dumps(row) for row in getattr(classifier, "history_", [])]
    files.append(storage.write_text(folder / "history.jsonl", "".join(f"{r}\n" for r in lines)))
    config = {
        "format": FORMAT,
        "version": "v2",
        "parameters": classifier.get_params(),
        "classes": classifier.classes_.tolist(),
        "n_features_in": classifier.n_features_in_,
        "best_iteration": classifier.best_iteration_,
        "best_epochs": classifier.best_epochs_,
        "distances": "Euclidean, not squared",
        "regions": [_region_to_json(model.region) for model in models],
        "files": {file.name: storage.sha256(file) for file in files},
    }
    storage.write_json(folder / "config.json", config)
    return folder


def _region_to_json(region: Region) -> dict[str, Any]:
    state = region.state()
    state["minimum"] = region.minimum if region.exists else None
    return state


def load(classifier: SDMClassifier, folder: Path | str) -> SDMClassifier:
    """Fill an unfitted classifier from a folder, every file verified.

    Raises:
        CheckpointError: the folder is incomplete, altered or of another format.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no estimator here (config.json is missing)")
    try:
        config = storage.read_json(folder / "config.json")
        if config["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {config['format']}, expected {FORMAT}")
        for name, digest in config["files"].items():
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, though config.json lists it")
            if storage.sha256(file) != digest:
                raise CheckpointError(f"{file}: altered, its SHA-256 is not the one in config.json")
        classifier.set_params(**config["parameters"])
        classifier.classes_ = np.asarray(config["classes"])
        classifier.n_features_in_ = int(config["n_features_in"])
        classifier.best_iteration_ = int(config["best_iteration"])
        classifier.best_epochs_ = list(config["best_epochs"])
        splits = storage.read_json(folder / "splits.json")
        classifier.train_index_ = np.asarray(splits["train"])
        classifier.calibration_index_ = np.asarray(splits["calibration"])
        classifier.history_ = [
            storage.parse_json(line)
            for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        classifier.models_ = _load_models(folder, config)
    except (KeyError, TypeError, ValueError, DataError) as error:
        raise CheckpointError(f"{folder}: not a complete estimator ({error})") from None
    return classifier


def _load_models(folder: Path, config: dict[str, Any]) -> list[SDMModel]:
    # Copies, because mapped tensors may be unaligned and then sum in another order.
    parts = {
        part: {
            name: value.clone()
            for name, value in storage.read_safetensors(folder / f"{part}.safetensors").items()
        }
        for part in ("weights", "support", "calibration")
    }
    cap = int(config["parameters"]["max_similarity"])
    models = []
    for j, region in enumerate(config["regions"]):
        maps = {f.name: parts["weights"][f"{j}.{f.name}"] for f in fields(Adaptor)}
        support = {name: parts["support"][f"{j}.{name}"] for name in SUPPORT_FIELDS}
        known = {f.name: parts["calibration"][f"{j}.{f.name}"] for f in fields(Calibration)}
        minimum = float("inf") if region["minimum"] is None else region["minimum"]
        limits = {
            **region,
            "minimum": minimum,
            "thresholds": tuple(region["thresholds"]),
            "kept": tuple(region["kept"]),
        }
        models.append(
            SDMModel(
                Adaptor(**maps), Support(**support), Calibration(**known), Region(**limits), cap
            )
        )
    return models
