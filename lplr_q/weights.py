"""Where the matrices come from: a module in memory, or the model's files read one slice at a time.

Reading from the files means that a worker never holds more of the model than the matrix it works
on, and that nobody holds the model twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q.activation_aware.discovery import linear_weight
from workbench import storage
from workbench.errors import DataError
from workbench.models import check_folder, check_safetensors, weights_digest

CONV1D_MODELS = {"gpt2", "openai-gpt"}
CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class ModuleWeights:
    """Matrices of a module."""

    model: nn.Module

    def __call__(self, name: str) -> Float[Tensor, "m n"]:
        """(outputs, inputs) in float32; shares memory when the module is in float32 on the CPU."""
        return linear_weight(self.model.get_submodule(name)).float().cpu()

    def digest(self) -> str:
        """SHA-256 of all weights."""
        return weights_digest(self.model)


@dataclass(frozen=True)
class TensorWeights:
    """Matrices sent along with a task."""

    tensors: Mapping[str, Tensor]

    def __call__(self, name: str) -> Float[Tensor, "m n"]:
        """The matrix of this name."""
        return self.tensors[name]


@dataclass(frozen=True)
class FolderWeights:
    """Matrices read from the safetensors files of a model folder when they are asked for."""

    folder: Path
    file_of: Mapping[str, str]
    """Tensor name to file name."""
    transposed: bool
    """Whether the model stores c_attn, c_proj and c_fc as (inputs, outputs)."""

    @classmethod
    def open(cls, folder: Path | str) -> FolderWeights:
        """Read the tables of contents.

        Raises:
            DataError: no safe model folder, damaged files, or a model that is compressed already.
        """
        folder = Path(folder)
        config = check_folder(folder)
        if "quantization_config" in config:
            raise DataError(f"{folder}: already quantised; compress the original model")
        file_of = {
            tensor: path.name
            for path in sorted(folder.glob("*.safetensors"))
            for tensor in check_safetensors(path)
        }
        return cls(folder, file_of, config.get("model_type") in CONV1D_MODELS)

    def tensor_name(self, name: str) -> str:
        """Name in the file of a layer's weight; files may lack the prefix of the causal model.

        Raises:
            DataError: no such weight.
        """
        parts = name.split(".")
        for skip in range(len(parts)):
            key = ".".join([*parts[skip:], "weight"])
            if key in self.file_of:
                return key
            if parts[skip].isdigit():
                break
        raise DataError(f"{self.folder}: no weight of {name} in its safetensors files")

    def __call__(self, name: str) -> Float[Tensor, "m n"]:
        """(outputs, inputs) in float32, read now."""
        from safetensors import safe_open

        key = self.tensor_name(name)
        with safe_open(str(self.folder / self.file_of[key]), "pt") as handle:
            stored: Any = handle.get_slice(key)
            weight: Tensor = stored[:]
        if self.transposed and name.rpartition(".")[2] in CONV1D_LAYERS:
            weight = weight.T
        if weight.ndim != 2:
            raise DataError(f"{self.folder}: {key} of shape {tuple(weight.shape)} is no matrix")
        return weight.to(torch.float32).contiguous()

    def digest(self) -> str:
        """SHA-256 over the SHA-256 of every weight file."""
        digest = hashlib.sha256()
        for name in sorted(set(self.file_of.values())):
            digest.update(f"{name} {storage.sha256(self.folder / name)}".encode())
        return digest.hexdigest()


Weights = ModuleWeights | TensorWeights | FolderWeights
