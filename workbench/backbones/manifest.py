"""The shipped weights and what is recorded about them (`backbones.json`)."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.backbones.recipes import Recipe
from workbench.errors import DataError

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = Path(__file__).parent / "backbones.json"


def read_manifest() -> dict[str, Any]:
    """Name → entry of all shipped models."""
    return storage.read_json(MANIFEST) if MANIFEST.is_file() else {}


def load_folder(folder: Path, device: Any = "cpu") -> Any:
    """A saved backbone in float32, for evaluation."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.to(device).eval()


def entry(recipe: Recipe, folder: Path, figures: dict[str, float], n: int) -> dict[str, Any]:
    """The manifest's entry of one model: hashes, recipe, figures, versions."""
    import torch
    import transformers

    file = folder / "model.safetensors"
    if not file.is_file():
        raise DataError(f"{file} is missing; the training did not reach its end")
    return {
        "sha256": storage.sha256(file),
        "bytes": file.stat().st_size,
        "tokenizer_sha256": storage.sha256(folder / "tokenizer.json"),
        "recipe": recipe.digest(),
        "seed": recipe.seed,
        "tokens": recipe.tokens,
        "documents_per_size": n,
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def publish(name: str, folder: Path, record: dict[str, Any]) -> Path:
    """Copy a trained model into the package and write its entry into the manifest."""
    target = WEIGHTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, target / file.name)
    storage.write_json(MANIFEST, {**read_manifest(), name: record})
    return target
