"""Hugging Face side: a registered ``quantization_config`` and quantiser, and saving of compressed
models.

After ``import lplr_q`` a folder written by :func:`save_compressed` loads with plain
``AutoModelForCausalLM.from_pretrained(folder)``; no base model is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear, quantised_layers
from workbench import storage
from workbench.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "lplr_q"
VERSION = 1


def replace_linears(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Put an empty compressed layer in the place of every named linear.

    Raises:
        DataError: a name that is no linear of this model, or of another shape.
    """
    for name, settings in modules.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise DataError(f"{name} is compressed in the file but not in this model") from None
        shape = (settings["in_features"], settings["out_features"])
        if not isinstance(old, nn.Linear) or (old.in_features, old.out_features) != shape:
            raise DataError(f"{name}: the file holds a {shape} linear layer, the model {old}")
        new = LPLRQuantizedLinear.from_settings(settings, dtype=old.weight.dtype)
        _replace(model, name, new)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def register() -> None:
    """Register configuration and quantiser with transformers; safe to call again."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config(METHOD)
    class LPLRConfig(QuantizationConfigMixin):
        """Per-module settings of every compressed layer."""

        def __init__(
            self, modules: dict[str, dict[str, Any]], version: int = VERSION, **others: Any
        ) -> None:
            self.quant_method: Any = METHOD
            self.version = version
            self.modules = modules
            self.notes = others.get("notes", {})
            if version > VERSION:
                raise DataError(
                    f"the model was written by format version {version}, this is {VERSION}; "
                    "update fivefold"
                )

    @auto.register_quantizer(METHOD)
    class LPLRQuantizer(HfQuantizer):
        """Swaps linears for compressed layers before the weights are read."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                replace_linears(model, self.quantization_config.modules)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for parameter in model.parameters():  # embeddings and norms stay as they are
                parameter.requires_grad_(False)
            return model

        def is_serializable(self) -> Any:
            """Compressed models can be saved again."""
            return True

        @property
        def is_trainable(self) -> Any:
            """The codes do not train."""
            return False


def exact_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest of float16, bfloat16, float32 that holds every parameter exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(bool((p == p.to(dtype).to(p.dtype)).all()) for p in model.parameters()):
            return dtype
    return torch.float32


def compression_config(model: nn.Module, notes: dict[str, Any] | None = None) -> Any:
    """The ``quantization_config`` of a model that holds compressed layers.

    Raises:
        ConfigError: it holds none.
    """
    register()
    from transformers.quantizers import auto

    modules = {name: layer.settings() for name, layer in quantised_layers(model)}
    if not modules:
        raise ConfigError(f"{type(model).__name__} holds no compressed layer; compress it first")
    return auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](modules=modules, notes=notes or {})


CARD = """---
library_name: transformers
tags: [lplr_q]
---
Compressed with lplr_q (W = Q + L R): {bits:.3f} bits per weight in the linear layers of the
decoder blocks.

```python
import lplr_q  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    notes: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Write config, weights, tokenizer and model card; everything that is not compressed is stored
    too.

    Returns what the file takes: see :func:`storage_report`.
    """
    folder = Path(folder)
    model.config.quantization_config = compression_config(model, notes)
    dtype = exact_dtype(model)
    kept = {name: p.data for name, p in model.named_parameters()}
    config_dtype = model.config.dtype
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            storage.write_safetensors(path, storage.read_safetensors(path), {"format": "pt"})
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]
        model.config.dtype = config_dtype
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = storage_report(folder)
    card = CARD.format(bits=report["bits_per_weight"])
    storage.write_text(folder / "README.md", card)
    return report


def storage_report(folder: Path | str) -> dict[str, float]:
    """Bits per weight from the *files*: tensor bytes of the compressed layers, and of the whole
    model.

    ``bits_per_weight`` counts codes, scales and signs of the compressed layers;
    ``model_bits_per_weight`` everything in the safetensors files; ``header_bytes`` is what the
    files' tables of contents add.
    """
    folder = Path(folder)
    config = storage.read_json(folder / "config.json")
    modules = config["quantization_config"]["modules"]
    weights = sum(s["in_features"] * s["out_features"] for s in modules.values())
    compressed = other = other_count = header_bytes = 0
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "I8": 1}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no safetensors file")
    for path in files:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = storage.parse_json(handle.read(length).decode("utf-8"))
        header_bytes += 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            low, high = entry["data_offsets"]
            module, _, leaf = name.rpartition(".")
            if module in modules and leaf != "bias":
                compressed += high - low
            else:
                other += high - low
                other_count += (high - low) // sizes[entry["dtype"]]
    return {
        "bits_per_weight": 8 * compressed / weights,
        "model_bits_per_weight": 8 * (compressed + other) / (weights + other_count),
        "compressed_bytes": compressed,
        "other_bytes": other,
        "header_bytes": header_bytes,
        "weights": weights,
        "file_bytes": sum(path.stat().st_size for path in files),
    }
