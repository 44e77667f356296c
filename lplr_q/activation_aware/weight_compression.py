"""Hessians of a whole model, and one decoder block after the other to be compressed.
[CALDERA, README of the published code]

    compressor = ActivationAwareWeightCompressor(
        ModelParameters("micro-mistral"),
        DataParameters("microworld:doc", devset_size=16, context_length=512),
        LPLRParams(rank=16, iters=3, L_bits=4, R_bits=4, hadamard_transform=True),
        "hessians",
    )
    quantizer = compressor.get_layer_quantizer(0)

Construction collects the Hessians of all layers in one pass over the text, one block at a time, and
stores them; with ``compute_hessians=False`` the stored ones are read, block by block, when they are
asked for. The model is loaded once, when its weights are needed first.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lplr_q.activation_aware.dataclasses import (
    DataParameters,
    LPLRParams,
    ModelParameters,
    SubLayerInfo,
)
from lplr_q.activation_aware.discovery import (
    decoder_blocks,
    linear_shape,
    unfuse_experts,
    unfused_names,
)
from lplr_q.activation_aware.hessian import collect_hessians
from lplr_q.activation_aware.layer_quantization import ActivationAwareLayerQuant
from lplr_q.activation_aware.moments import Calibration, StoredMoments, load_hessians
from lplr_q.calibration import calibration_blocks, fingerprint
from lplr_q.hf import require_uncompressed
from lplr_q.weights import CONV1D_LAYERS, FolderWeights, ModuleWeights
from workbench.errors import ConfigError, DataError
from workbench.models import load_model, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.run import Run


class ActivationAwareWeightCompressor:
    """Hessians of a model and, layer by layer, the objects that compress it.

    Args:
        model_params: which model; ``include`` and ``exclude`` choose the linear layers.
        data_params: which text the Hessians are of.
        quant_params: how each matrix is decomposed.
        hessian_save_path: folder of the Hessians, written or (``compute_hessians=False``) read.
        start_layer: first decoder block to be compressed.
        stop_layer: the first one that is not; None: up to the last.
        compute_hessians: False says that they are there.
        seed: of the random signs.
        quant_device: where matrices are decomposed unless `get_layer_quantizer` is told.
        model, tokenizer: in place of loading ``model_params.base_model``; experts that the given
            model holds fused are left alone.
        progress: wraps the loop over blocks, e.g. ``tqdm``.

    Raises:
        ConfigError: layers that the model does not have.
        DataError: Hessians that are missing, damaged, or of another model.
    """

    def __init__(
        self,
        model_params: ModelParameters,
        data_params: DataParameters,
        quant_params: LPLRParams,
        hessian_save_path: Path | str,
        start_layer: int = 0,
        stop_layer: int | None = None,
        compute_hessians: bool = True,
        *,
        seed: int = 0,
        quant_device: torch.device | str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Callable[[Iterable], Iterator] = iter,
    ) -> None:
        if start_layer < 0 or (stop_layer is not None and stop_layer <= start_layer):
            raise ConfigError(
                f"start_layer={start_layer}, stop_layer={stop_layer}: no layer lies between them"
            )
        self.model_params, self.data_params = model_params, data_params
        self.quant_params = quant_params
        self.hessian_save_path = Path(hessian_save_path)
        self.start_layer, self.stop_layer, self.seed = start_layer, stop_layer, seed
        self.quant_device = quant_device
        self._model, self._tokenizer = model, tokenizer
        self._weights: ModuleWeights | FolderWeights | None = None
        if compute_hessians:
            self.calibration = self._collect(progress)
        else:
            self.calibration = self._read()
        self._require_layers()

    # ------------------------------------------------------------ model

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded at the first use; fused experts are taken apart."""
        if self._model is None:
            dtype = self.model_params.dtype
            with hub_token(self.model_params.access_token()):
                self._model, self._tokenizer = load_model(
                    self.model_params.base_model,
                    device=self.model_params.device,
                    dtype=None if dtype is None else getattr(torch, dtype),
                )
            unfuse_experts(self._model)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ConfigError: a model was given without one.
        """
        model = self.model
        if self._tokenizer is None:
            raise ConfigError(f"{type(model).__name__} was given without tokenizer; give both")
        return self._tokenizer

    @property
    def weights(self) -> ModuleWeights | FolderWeights:
        """Where matrices come from: the model, or its files as long as it is not loaded."""
        if self._weights is None:
            kind, place = resolve(self.model_params.base_model)
            if self._model is None and kind == "folder" and not self._has_experts():
                self._weights = FolderWeights.open(place)
            else:
                require_uncompressed(self.model)
                self._weights = ModuleWeights(self.model)
        return self._weights

    def _has_experts(self) -> bool:
        """Whether the Hessians are of experts, whose files may hold them fused."""
        return bool(unfused_names(self.calibration.key_of))

    # ------------------------------------------------------------ Hessians

    def _collect(self, progress: Callable[[Iterable], Iterator]) -> Calibration:
        model, data = self.model, self.data_params
        self._require_blocks(len(decoder_blocks(model)[1]))
        return collect_calibration(
            model,
            self.tokenizer,
            data,
            include=self._include(),
            exclude=self.model_params.exclude,
            name=self.model_params.base_model,
            folder=self.hessian_save_path,
            progress=progress,
        )

    def _include(self) -> str:
        """The pattern of the parameters, restricted to the layers to be compressed."""
        prefix, blocks = decoder_blocks(self.model)
        layers = range(len(blocks))[self.start_layer : self.stop_layer]
        if len(layers) == len(blocks):
            return self.model_params.include
        numbers = "|".join(map(str, layers))
        return rf"^(?={re.escape(prefix)}\.(?:{numbers})\.)(?=.*(?:{self.model_params.include}))"

    def _read(self) -> Calibration:
        try:
            return load_hessians(self.hessian_save_path)
        except DataError as error:
            raise DataError(f"{error}; or leave out compute_hessians=False") from None

    def _require_blocks(self, count: int) -> None:
        last = count if self.stop_layer is None else self.stop_layer
        if self.start_layer >= count or last > count:
            raise ConfigError(
                f"start_layer={self.start_layer}, stop_layer={self.stop_layer}: "
                f"{self.model_params.base_model} has layers 0 to {count - 1}"
            )

    def _require_layers(self) -> None:
        if not self.layers:
            have = sorted({layer_index(name) for name in self.calibration.key_of})
            raise DataError(
                f"{self.hessian_save_path}: Hessians of layers {have}, none from "
                f"{self.start_layer} up to {self.stop_layer or 'the last'}"
            )

    # ------------------------------------------------------------ layers

    @property
    def layers(self) -> list[int]:
        """Indices of the decoder blocks to be compressed."""
        stop = self.stop_layer
        found = {layer_index(name) for name in self.calibration.key_of}
        return sorted(i for i in found if i >= self.start_layer and (stop is None or i < stop))

    def get_layer_quantizer(
        self, layer_idx: int, device: torch.device | str | None = None, label: str | None = None
    ) -> ActivationAwareLayerQuant:
        """The object that compresses one decoder block, computing on ``device``.

        Raises:
            ConfigError: a layer outside of those to be compressed.
        """
        if layer_idx not in self.layers:
            raise ConfigError(
                f"layer {layer_idx} is not among those to be compressed, {self.layers}"
            )
        names = [n for n in self.calibration.key_of if layer_index(n) == layer_idx]
        return ActivationAwareLayerQuant(
            layer_idx,
            [self._info(name) for name in names],
            self.quant_params,
            weight_of=self.weights,
            moment_of=self.calibration.of,
            bias_of=lambda name: bias_of(self.weights, name),
            device=device if device is not None else self.quant_device,
            label=label,
            seed=self.seed,
        )

    def _info(self, name: str) -> SubLayerInfo:
        width, tokens = self._width_and_tokens(name)
        shape = shape_of(self.weights, name)
        if shape[1] != width:
            raise DataError(
                f"layer {layer_index(name)}, {short_name(name)}: Hessian of width {width} in "
                f"{self.hessian_save_path} for a weight with {shape[1]} inputs; it belongs to "
                "another model"
            )
        return SubLayerInfo(
            layer_idx=layer_index(name),
            sublayer=short_name(name),
            name=name,
            key=self.calibration.key_of[name],
            shape=shape,
            tokens=tokens,
        )

    def _width_and_tokens(self, name: str) -> tuple[int, int]:
        """Of the Hessian of a layer; stored ones are not read for it."""
        moments = self.calibration.moments
        if isinstance(moments, StoredMoments):
            entry = moments.entries[self.calibration.key_of[name]]
            return entry["width"], entry["count"]
        moment = self.calibration.of(name)
        return len(moment.mean), moment.count


# ---------------------------------------------------------------- names and matrices


def layer_index(name: str) -> int:
    """Index of the decoder block in the full name of a linear layer.

    >>> layer_index("model.layers.3.self_attn.q_proj")
    3
    """
    return int(next(part for part in name.split(".") if part.isdigit()))


def short_name(name: str) -> str:
    """Name inside the decoder block.

    >>> short_name("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj'
    """
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[place + 1 :])


def shape_of(weights: ModuleWeights | FolderWeights, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a matrix, without reading it."""
    if isinstance(weights, ModuleWeights):
        return linear_shape(weights.model.get_submodule(name))
    from safetensors import safe_open

    key = weights.tensor_name(name)
    with safe_open(str(weights.folder / weights.file_of[key]), "pt") as handle:
        stored: Any = handle.get_slice(key)
        m, n = stored.get_shape()
    if weights.transposed and name.rpartition(".")[2] in CONV1D_LAYERS:
        m, n = n, m
    return m, n


def bias_of(weights: ModuleWeights | FolderWeights, name: str) -> Tensor | None:
    """The bias of the linear layer ``name``, if it has one."""
    if isinstance(weights, ModuleWeights):
        bias = getattr(weights.model.get_submodule(name), "bias", None)
        return None if bias is None else bias.detach()
    from safetensors import safe_open

    key = weights.tensor_name(name).removesuffix("weight") + "bias"
    if key not in weights.file_of:
        return None
    with safe_open(str(weights.folder / weights.file_of[key]), "pt") as handle:
        return handle.get_tensor(key)


@contextlib.contextmanager
def hub_token(token: str | None) -> Iterator[None]:
    """HF_TOKEN inside the block; nothing without a token or where one is set."""
    if token is None or os.environ.get("HF_TOKEN"):
        yield
        return
    os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        del os.environ["HF_TOKEN"]


# ---------------------------------------------------------------- the calibration pass


def collect_calibration(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: DataParameters,
    *,
    include: str = ".*",
    exclude: str | None = None,
    name: str = "",
    folder: Path | None = None,
    progress: Callable[[Iterable], Iterator] = iter,
) -> Calibration:
    """Hessians from the text that ``data`` names; written into ``folder`` block by block where one
    is given, under the ``name`` of the model.

    Raises:
        ConfigError: the model is compressed already.
    """
    require_uncompressed(model)
    tokens, counted = calibration_blocks(data, tokenizer)
    origin = None
    if folder is not None:
        origin = fingerprint(name, model, tokens, counted, include=include, exclude=exclude)
    return collect_hessians(
        model,
        tokens,
        mask=counted,
        batch_size=data.batch_size,
        include=include,
        exclude=exclude,
        folder=folder,
        fingerprint=origin,
        progress=progress,
    )


def calibration_of_run(
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: DataParameters,
    *,
    include: str = ".*",
    stored: str | None = None,
) -> Calibration:
    """The Hessians in the folder ``stored``; by default collected into the run's own folder, block
    by block, and found there again after an interruption."""
    if stored is not None:
        calibration = load_hessians(stored)
        run.require_same("hessians", calibration.digest())
    else:
        calibration = collect_calibration(
            model,
            tokenizer,
            data,
            include=include,
            folder=run.path("hessians"),
            progress=lambda items: run.progress(items, "hessians"),
        )
    for line in calibration.warnings():
        run.note(line)
    return calibration
