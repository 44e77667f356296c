"""Readers of a conversation: the prompted teacher, the bare model, and the students.

Everybody answers one question, `logits(ids)`: given conversations x (batch, time) *without* prompt,
the logits that predict x_0 … x_{T−1}. What stands in front of x is each reader's own affair:

    Prompted   BOS and the prompt's tokens (teacher; with an empty prompt: the bare model)
    full       BOS; all weights have moved
    lora       BOS; low-rank updates on every linear layer                      [Hu et al. 2021]
    memory     BOS and m trained input embeddings           [prompt tuning, Lester et al. 2021]
    kv         m trained key/value vectors per layer   [prefix tuning; Cartridges 2506.06266]

No reader but `Prompted` has a place to put a prompt, so a student cannot peek. Rows are padded on
the right; attention is causal, so pads never reach a supervised position and no attention mask is
needed.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sycomode.registry import STUDENTS
from workbench.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader(nn.Module, ABC):
    """A model with something in front of the conversation."""

    unpredicted: int = 0
    """Leading tokens without prediction (1 for a KV prefix: no query stands before them)."""

    def __init__(self, model: PreTrainedModel, bos: int):
        super().__init__()
        self.model = model
        self.bos = bos

    @abstractmethod
    def read(self, ids: Int[Tensor, "batch time"], hidden: bool = False) -> Any:
        """The model's output over the positions that predict `ids`."""

    def logits(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits that predict ids[:, 0], ids[:, 1], …"""
        return self.read(ids).logits[:, -ids.shape[1] :]

    def first_hidden(self) -> list[Float[Tensor, "1 width"]]:
        """Hidden states of all layers, embeddings first, just before the conversation."""
        ids = torch.full((1, 1), self.bos, device=self.model.device)
        return [layer[:, -1] for layer in self.read(ids, hidden=True).hidden_states]

    @property
    def prefix_tokens(self) -> int:
        """Positions taken in front of the conversation."""
        return 1

    def _with_bos(self, ids: Tensor) -> Tensor:
        bos = torch.full((ids.shape[0], 1), self.bos, dtype=ids.dtype, device=ids.device)
        return torch.cat([bos, ids[:, :-1]], dim=1)


class Prompted(Reader):
    """The frozen model behind BOS and a prompt, whose keys and values are computed once.

    Scoring n prompt and T conversation tokens costs T instead of n + T per row. Models without a
    key/value cache (state-space layers) and `cached=False` re-read the prompt: the reference path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bos: int,
        prompt: Sequence[int] = (),
        *,
        cached: bool | None = None,
    ):
        super().__init__(model, bos)
        self.prompt = torch.tensor([[bos, *prompt]], device=model.device)
        self.cached = attention_only(model) if cached is None else cached
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._first = torch.empty(0)

    @property
    def prefix_tokens(self) -> int:
        """BOS and the prompt."""
        return self.prompt.shape[1]

    def prefill(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of the prompt per layer, computed on first use."""
        if not self._kept:
            with torch.no_grad():
                output = self.model(self.prompt, use_cache=True)
            self._kept = cache_tensors(output.past_key_values)
            self._first = output.logits[:, -1:]
        return self._kept

    def logits(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits that predict `ids` after the prompt."""
        check_length(self.model, self.prefix_tokens + ids.shape[1])
        if not self.cached:
            return super().logits(ids)
        kept = self.prefill()
        first = self._first.expand(ids.shape[0], -1, -1)
        if ids.shape[1] == 1:
            return first
        cache = expanded_cache(kept, ids.shape[0])
        rest = self.model(ids[:, :-1], past_key_values=cache, use_cache=True).logits
        return torch.cat([first, rest], dim=1)

    def read(self, ids: Int[Tensor, "batch time"], hidden: bool = False) -> Any:
        """The whole input in one go."""
        prompt = self.prompt.expand(ids.shape[0], -1)
        whole = torch.cat([prompt, ids[:, :-1]], dim=1)
        return self.model(whole, use_cache=False, output_hidden_states=hidden)


class Student(Reader):
    """A reader with something to train."""

    kind: str = ""

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable tensors, by name; nothing else has `requires_grad`."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Only what is trained: a checkpoint does not repeat the frozen model."""
        return {name: p.detach() for name, p in self.trained().items()}

    def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Put trained tensors back."""
        mine = self.trained()
        if set(mine) != set(state):
            raise DataError(
                f"{self.kind} student: {len(state)} tensors given, {len(mine)} expected"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state[name])

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the artefact: a folder that PEFT (or transformers, for `full`) loads."""

    @abstractmethod
    def reload(self, directory: Path, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """`logits` of the saved artefact, loaded by the public loaders."""


class Full(Student):
    """All weights move; the artefact is an ordinary checkpoint."""

    kind = "full"

    def __init__(self, model: PreTrainedModel, bos: int):
        super().__init__(copy.deepcopy(model), bos)
        self.model.requires_grad_(True)

    def read(self, ids: Int[Tensor, "batch time"], hidden: bool = False) -> Any:
        """BOS, then the conversation."""
        check_length(self.model, ids.shape[1])
        return self.model(self._with_bos(ids), use_cache=False, output_hidden_states=hidden)

    def save(self, directory: Path) -> None:
        """`save_pretrained`."""
        _write_folder(directory, self.model.save_pretrained)

    def reload(self, directory: Path, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """`from_pretrained`."""
        fresh = type(model).from_pretrained(directory, local_files_only=True, dtype=model.dtype)
        return lambda ids: fresh(self._with_bos(ids)).logits


class Lora(Student):
    """W + (α/r) B A on every linear layer of the blocks, B = 0 at the start; α = 2r."""

    kind = "lora"

    def __init__(self, model: PreTrainedModel, bos: int, *, rank: int, init: torch.Generator):
        from peft import LoraConfig

        linear = [n for n, m in model.named_modules() if _is_linear(m) and "head" not in n]
        if not linear:
            raise ConfigError(f"lora: {type(model).__name__} has no linear layers to adapt")
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=sorted({name.rsplit(".", 1)[-1] for name in linear}),
            task_type="CAUSAL_LM",
            init_lora_weights=True,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        super().__init__(_adapted(model, config), bos)
        with torch.no_grad():
            for name, parameter in self.trained().items():
                if "lora_A" in name:  # PEFT draws A from the global generator: draw it from ours
                    bound = parameter.shape[1] ** -0.5
                    fresh = torch.rand(parameter.shape, generator=init) * 2 * bound - bound
                    parameter.copy_(fresh)

    def read(self, ids: Int[Tensor, "batch time"], hidden: bool = False) -> Any:
        """BOS, then the conversation."""
        check_length(self.model, ids.shape[1])
        return self.model(
            input_ids=self._with_bos(ids), use_cache=False, output_hidden_states=hidden
        )

    def save(self, directory: Path) -> None:
        """A PEFT LoRA folder; vLLM and SGLang serve it if rank ≤ their `max_lora_rank`."""
        _write_folder(directory, self.model.save_pretrained)

    def reload(self, directory: Path, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """`PeftModel.from_pretrained`."""
        fresh = _peft(model, directory)
        return lambda ids: fresh(input_ids=self._with_bos(ids)).logits


class Memory(Student):
    """m input embeddings after BOS; they start from the embeddings of prompt tokens."""

    kind = "memory"

    def __init__(self, model: PreTrainedModel, bos: int, *, start: Float[Tensor, "m width"]):
        super().__init__(model, bos)
        self.tokens = nn.Parameter(start.detach().clone().float())

    @property
    def prefix_tokens(self) -> int:
        """BOS and the memory."""
        return 1 + self.tokens.shape[0]

    def prefix(self) -> Float[Tensor, "1+m width"]:
        """Embeddings of BOS and the memory."""
        embed = self.model.get_input_embeddings()
        bos = embed(torch.tensor([self.bos], device=self.tokens.device))
        return torch.cat([bos, self.tokens.to(bos.dtype)])

    def read(self, ids: Int[Tensor, "batch time"], hidden: bool = False) -> Any:
        """BOS, memory, conversation, as embeddings."""
        check_length(self.model, self.prefix_tokens + ids.shape[1] - 1)
        front = self.prefix().expand(ids.shape[0], -1, -1)
        embeds = torch.cat([front, self.model.get_input_embeddings()(ids[:, :-1])], dim=1)
        return self.model(inputs_embeds=embeds, use_cache=False, output_hidden_states=hidden)

    def save(self, directory: Path) -> None:
        """A PEFT PROMPT_TUNING folder with m + 1 virtual tokens, BOS first: feed it without BOS."""
        from peft import PromptTuningConfig

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.prefix_tokens)
        holder = _adapted(self.model, config)
        with torch.no_grad():
            holder.prompt_encoder["default"].embedding.weight.copy_(self.prefix())
        _write_folder(directory, holder.save_pretrained)

    def reload(self, directory: Path, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """`PeftModel.from_pretrained`, conversations without BOS."""
        fresh = _peft(model, directory)
        return lambda ids: fresh(input_ids=ids[:, :-1]).logits[:, -ids.shape[1] :]


class KeyValue(Student):
    """m key/value vectors per layer; they start from the prompt's own, and the first stays frozen.

    Keys are kept as rotated at positions 0 … m−1; the conversation starts at position m. The frozen
    first position is BOS, where many models rest their attention.
    """

    kind = "kv"
    unpredicted = 1

    def __init__(self, model: PreTrainedModel, bos: int, *, start: list[tuple[Tensor, Tensor]]):
        super().__init__(model, bos)
        if not attention_only(model):
            raise ConfigError(
                f"kv: {model.config.model_type} has layers without a plain key/value cache; "
                "use --student lora, memory or full"
            )
        both = torch.stack([torch.stack(pair) for pair in start]).squeeze(2)  # layer 2 head m dim
        self.register_buffer("anchor", both[:, :, :, :1].detach().clone(), persistent=False)
        self.rows = nn.Parameter(both[:, :, :, 1:].detach().clone().float())

    @property
    def prefix_tokens(self) -> int:
        """The m positions of the prefix."""
        return 1 + self.rows.shape[3]

    def whole(self) -> Float[Tensor, "layer 2 heads m dim"]:
        """Keys and values of all positions, the frozen first included."""
        return torch.cat([self.anchor, self.rows.to(self.anchor.dtype)], dim=3)

    def logits(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """As in `Reader`; the first position has no query and is given zeros (`unpredicted`)."""
        known = self.read(ids).logits
        return torch.cat([torch.zeros_like(known[:, :1]), known], dim=1)

    def read(self, ids: Int[Tensor, "batch time"], hidden: bool = False) -> Any:
        """The conversation over the prefix."""
        if ids.shape[1] < 2:
            raise ConfigError(
                "kv: no query stands before the first token, so objectives at that position "
                "(last_position_kl, hidden_*) cannot be taken; use another student or objective"
            )
        check_length(self.model, self.prefix_tokens + ids.shape[1] - 1)
        pairs = [(layer[0][None], layer[1][None]) for layer in self.whole()]
        cache = expanded_cache(pairs, ids.shape[0])
        return self.model(
            ids[:, :-1], past_key_values=cache, use_cache=True, output_hidden_states=hidden
        )

    def save(self, directory: Path) -> None:
        """A PEFT CARTRIDGE folder (PREFIX_TUNING where PEFT is older): feed it without BOS."""
        import peft

        settings: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.prefix_tokens,
        }
        config_class = getattr(peft, "CartridgeConfig", peft.PrefixTuningConfig)
        holder = _adapted(self.model, config_class(**settings))
        flat = self.whole().permute(3, 0, 1, 2, 4).reshape(self.prefix_tokens, -1)
        encoder = holder.prompt_encoder["default"]
        with torch.no_grad():
            if hasattr(encoder, "load_prompt_embeddings"):
                encoder.load_prompt_embeddings(flat)
            else:
                encoder.embedding.weight.copy_(flat)
        _write_folder(directory, holder.save_pretrained)

    def reload(self, directory: Path, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """`PeftModel.from_pretrained`, conversations without BOS; zeros for the first position."""
        fresh = _peft(model, directory)

        def logits(ids: Tensor) -> Tensor:
            known = fresh(input_ids=ids[:, :-1]).logits
            return torch.cat([torch.zeros_like(known[:, :1]), known], dim=1)

        return logits


def build_student(
    kind: str,
    teacher: Prompted,
    *,
    init: torch.Generator,
    rank: int = 8,
    tokens: int = 16,
    start: str = "prompt",
) -> Student:
    """The untrained student of that kind for the teacher's prompt, which it may use to start from.

    `start` is `prompt` (memory: evenly spaced prompt tokens' embeddings, kv: keys and values of the
    first `tokens` tokens) or `random` (same mean and spread, no content).

    Raises:
        ConfigError: unknown kind, or more tokens than the prompt has to start from.
    """
    model, bos = teacher.model, teacher.bos
    model.requires_grad_(False)
    if kind not in STUDENTS:
        raise unknown_name("student", kind, STUDENTS)
    if kind == "full":
        return Full(model, bos)
    if kind == "lora":
        return Lora(model, bos, rank=rank, init=init)
    n = teacher.prefix_tokens
    least = 2 if kind == "kv" else 1
    if tokens < least:
        raise ConfigError(f"{kind}: needs at least {least} tokens, got {tokens}")
    if kind == "memory":
        if tokens > n - 1:
            raise ConfigError(f"memory: {tokens} tokens cannot start from a prompt of {n - 1}")
        spaced = torch.linspace(1, n - 1, tokens).round().long()
        embeds = model.get_input_embeddings()(teacher.prompt[0, spaced])
        return Memory(model, bos, start=_maybe_random(embeds, start, init))
    if not attention_only(model):
        raise ConfigError(
            f"kv: {model.config.model_type} has layers without a plain key/value cache; "
            "use --student lora, memory or full"
        )
    if tokens > n:
        raise ConfigError(f"kv: {tokens} positions cannot start from a prompt of {n} (with BOS)")
    kept = [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in teacher.prefill()]
    pairs = [(_maybe_random(k, start, init), _maybe_random(v, start, init)) for k, v in kept]
    return KeyValue(model, bos, start=pairs)


def kv_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of keys and values of so many positions: 2 · L · H_kv · d_head · bytes · tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * tokens


def attention_only(model: PreTrainedModel) -> bool:
    """Whether every layer keeps plain keys and values over the whole past."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        hasattr(config, "num_attention_heads")
        and "mamba" not in config.model_type
        and kinds == {"full_attention"}
        and not window
    )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse an input longer than the model's positions, saying by how much."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise DataError(
            f"prompt and conversation take {length} positions, {length - most} more than the "
            f"model's {most}; shorten the prompt or consolidate it in chunks"
        )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree over the *same* parameter tensors.

    PEFT rewrites the tree in place; with copies several students stand on one frozen model.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(shared))


def cache_tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) per layer of a Hugging Face cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def expanded_cache(pairs: Sequence[tuple[Tensor, Tensor]], batch: int) -> Any:
    """A Hugging Face cache that holds one row's keys and values for a whole batch, as views."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(pairs):
        cache.update(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), layer)
    return cache


def _maybe_random(values: Tensor, start: str, init: torch.Generator) -> Tensor:
    if start == "prompt":
        return values
    if start != "random":
        raise unknown_name("start", start, ["prompt", "random"])
    noise = torch.randn(values.shape, generator=init).to(values)
    return values.mean() + values.std() * noise


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@contextlib.contextmanager
def _peft_apart() -> Iterator[None]:
    """PEFT draws from the global generator and warns about transformers: neither gets out."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _adapted(model: PreTrainedModel, config: Any) -> Any:
    """PEFT's model over the same weights."""
    from peft import get_peft_model

    with _peft_apart():
        return get_peft_model(sharing_copy(model), config)


def _peft(model: PreTrainedModel, directory: Path) -> nn.Module:
    from peft import PeftModel

    with _peft_apart():
        return PeftModel.from_pretrained(sharing_copy(model), str(directory)).eval()


def _write_folder(directory: Path, write: Callable[[str], Any]) -> None:
    """Let a library write a folder beside its place, then move it there whole."""
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(str(temporary))
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
