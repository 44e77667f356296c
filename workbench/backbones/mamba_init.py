"""A structured start for micro-mamba2 and micro-mamba: recall written into the short convolutions.

A state-space layer is an associative memory (S ← a S + x Bᵀ, y = S C), but models of this size do
not begin to use it as one within any budget tried. So the first layers begin as that memory, and
training decides what becomes of it: nothing is frozen, and no part of the architecture is special.

The residual stream of 160 channels is divided, at the start only:

    0        a constant                       1-72     content code of the word
    73-96    function and category code       97-159   context slot: content of the word three back

Layer 0   the convolution has a single tap at lag 3, the state is bypassed (D = 1): fills the slot.
Layer 1   x = the content of this word; B = the things in the slot at lags 0-2, that is three to
          five words back ("the ball is in the park"); C = the things one or two words back, or four
          or five ("... the ball ? A").  B and C are tied: both have one state per thing (and per
          topic), read from the word codes, with a threshold in the convolution's bias, so that two
          different things share almost nothing.  Decay is slow (half-life 700 words).
Others    the usual weights, outputs scaled down.

micro-mamba has 16 states per channel, too few for that: its layers 1-4 hold a quarter of the key
each (see `initialise_mamba`).

Recall of 8 / 16 / 24 / 40 facts, one seed, held-out documents (chance is 1 in 84):

    micro-mamba2, untrained       .90  -    .78  .46     layer 1 alone, 12 documents each
    after 0.08 M tokens           .78  -    .61  -       from the usual weights: .00 and .00
    after 0.16 M tokens           .61  -    .55  -       the first steps at full rate damage it
    as shipped, 0.8 M tokens      .79  .73  .66  .69     still rising when the budget ended
    micro-mamba, as shipped       .01  .02  .02  .03     its circuit does not survive: 0.8 M tokens

SiLU is undone by pairs of channels of opposite sign, silu(u) − silu(−u) = u, and the gated norm of
Mamba-2, which would turn silence into noise, by channels of constant size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import ConfigError
from workbench.microworld import grammar
from workbench.microworld.prng import hash64
from workbench.tokenizer import BOS_ID, EOS_ID, PAD_ID, word_ids

WIDTH = 160
INNER = 2 * WIDTH
STD = 0.05  # row norm of the embedding is STD · √WIDTH
CONSTANT = 3.0  # value of channel 0, in units of STD
CONTENT = slice(1, 73)
CATEGORY = slice(73, 97)
SLOT = slice(97, 160)
N_CONTENT, N_CATEGORY, N_SLOT = 72, 24, 63
CONTENT_SHARE = 0.8  # of a content word's norm; the rest is its category
THING_SHARE, TOPIC_SHARE = 0.87, 0.5  # a thing's content: its own code and its topic's
NUMBER_FREQUENCIES = (1, 2, 3, 4, 5, 7, 10, 13, 20, 25, 30, 40)

MATCH = 8.0  # B and C before the threshold, for the right thing
THRESHOLD = 0.5  # of MATCH
TOPIC_THRESHOLD = 0.8  # of MATCH, for a topic as a key: only the topic word itself passes
TOPIC_QUERY_THRESHOLD = 0.25  # of MATCH: any thing of the topic passes
GATE = 4.0  # pre-activation of the gates of the written channels: silu(4) = 3.9
CONSTANT_CHANNELS = 32
CONSTANT_SIZE = 8.0
SLOW = 1e-3  # rate of forgetting per word: half-life ln 2 / SLOW
VALUE_GAIN = 0.05  # output weight of the recalled word
QUIET = 0.1  # scale of everything random
MEMORY_LAYERS = (1, 2, 3, 4)  # of micro-mamba; micro-mamba2 needs layer 1 only
KEY_SCALE = 0.5  # of the keys of micro-mamba before B and C
RECALLED_SIZE = 2.0  # of a recalled word, in units of its own code


def micro_mamba2_config(vocabulary_size: int) -> Any:
    """1.59 M parameters: width 160, 8 layers, 10 heads of 32 channels, state 64, tied."""
    from transformers import Mamba2Config

    return Mamba2Config(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        num_hidden_layers=8,
        state_size=64,
        head_dim=32,
        num_heads=10,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
        initializer_range=STD,
        residual_in_fp32=True,
        rms_norm=True,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def micro_mamba_config(vocabulary_size: int) -> Any:
    """1.60 M parameters: width 160, 8 layers, inner width 320, state 16, tied."""
    from transformers import MambaConfig

    return MambaConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        num_hidden_layers=8,
        state_size=16,
        expand=2,
        conv_kernel=4,
        initializer_range=STD,
        residual_in_fp32=True,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


@dataclass(frozen=True)
class Codes:
    """What the circuit needs to know of the embedding."""

    table: Float[Tensor, "vocab width"]
    """The embedding."""
    keys: Float[Tensor, "keys content"]
    """Orthonormal own codes of the 48 things, then of the 4 topics."""
    slot: Float[Tensor, "slot content"]
    """Orthonormal map from content to slot; its first rows are `keys`."""


def _unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(columns, rows, generator=generator))
    return q.T.contiguous()


def word_codes(vocabulary_size: int, generator: torch.Generator) -> Codes:
    """Token codes of equal norm: function words, content words and pieces of text apart."""
    ids = word_ids()
    table = torch.zeros(vocabulary_size, WIDTH)
    free = slice(CONTENT.start, CATEGORY.stop)
    table[:, free] = _unit((vocabulary_size, free.stop - free.start), generator)
    codes = _unit((len(grammar.FUNCTION_WORDS), N_CATEGORY), generator)
    for word, code in zip(grammar.FUNCTION_WORDS, codes, strict=True):
        table[ids[word]] = 0
        table[ids[word], CATEGORY] = code
    shouting = table[ids["capitals"], CATEGORY].clone()
    category_share = math.sqrt(1 - CONTENT_SHARE**2)

    def write(word: str, content: Tensor, category: Tensor) -> None:
        table[ids[word]] = 0
        table[ids[word], CONTENT] = CONTENT_SHARE * torch.nn.functional.normalize(content, dim=0)
        table[ids[word], CATEGORY] = category_share * category

    things = [thing for topic in grammar.TOPICS.values() for thing in topic]
    slot = _orthonormal(N_SLOT, N_CONTENT, generator)
    keys = slot[: len(things) + len(grammar.TOPICS)]
    own = dict(zip((*things, *grammar.TOPICS), keys, strict=True))
    for kind, words in grammar.CONTENT_WORDS.items():
        category = _unit((N_CATEGORY,), generator)
        for word, code in zip(words, _unit((len(words), N_CONTENT), generator), strict=True):
            if kind in grammar.TOPICS:
                code = THING_SHARE * own[word] + TOPIC_SHARE * own[kind]
            write(word, code, category)
            if word in grammar.CAPITALISED:
                write(grammar.CAPITALISED[word], code, shouting)
        if kind in grammar.TOPICS:
            write(kind, own[kind], _unit((N_CATEGORY,), generator))
    # answers of the rules carry content, so that the memory can deliver them
    replies = (grammar.REFUSE, grammar.UNKNOWN, *grammar.SUFFIXES)
    category = _unit((N_CATEGORY,), generator)
    for word, code in zip(replies, _unit((len(replies), N_CONTENT), generator), strict=True):
        write(word, code, category)
    category = _unit((N_CATEGORY,), generator)
    for number in grammar.NUMBERS:
        angles = 2 * math.pi * torch.tensor(NUMBER_FREQUENCIES) * int(number) / 100
        code = torch.zeros(N_CONTENT)
        code[: 2 * len(NUMBER_FREQUENCIES)] = torch.cat([angles.cos(), angles.sin()])
        write(number, code, category)
    table *= STD * math.sqrt(WIDTH)
    table[:, 0] = CONSTANT * STD
    return Codes(table, keys, slot)


def _normalised_size(n_parts: float) -> float:
    """Size after RMS normalisation of a part of the residual stream of the size of a word code."""
    # the stream then holds `n_parts` such parts and the constant
    return math.sqrt(WIDTH) / math.sqrt(n_parts + CONSTANT**2 / WIDTH)


def initialise_mamba2(model: Any, seed: int) -> None:
    """Write the circuit into a freshly built Mamba2ForCausalLM.

    Raises:
        ConfigError: the model has other sizes than `micro_mamba2_config`.
    """
    config = model.config
    shape = (config.hidden_size, config.state_size, config.head_dim, config.n_groups)
    if shape != (WIDTH, 64, 32, 1) or config.conv_kernel != 4 or config.num_hidden_layers < 2:
        raise ConfigError(
            f"width, state, channels per head, groups are {shape}, convolution {config.conv_kernel}"
            "; the structured start is written for (160, 64, 32, 1) and 4"
        )
    generator = torch.Generator().manual_seed(hash64(f"mamba2 start {seed}") >> 1)
    codes = word_codes(config.vocab_size, generator)
    with torch.no_grad():
        model.backbone.embeddings.weight.copy_(codes.table)
        mixers = [layer.mixer for layer in model.backbone.layers]
        for mixer in mixers:
            mixer.out_proj.weight.mul_(QUIET)
        _write_slot(mixers[0], codes)
        _write_memory(mixers[1], codes, generator)


def _parts(mixer: Any) -> dict[str, Tensor]:
    """Views of the rows of in_proj and of the convolution: z, x, B, C and dt."""
    sizes = [INNER, INNER, 64, 64, mixer.num_heads]
    blocks = mixer.in_proj.weight.split(sizes)
    rows: dict[str, Tensor] = dict(zip(("z", "x", "B", "C", "dt"), blocks, strict=True))
    taps = mixer.conv1d.weight[:, 0].split(sizes[1:4])
    bias = mixer.conv1d.bias.split(sizes[1:4])
    for name, tap, shift in zip(("x", "B", "C"), taps, bias, strict=True):
        rows[f"taps {name}"], rows[f"bias {name}"] = tap, shift
    return rows


def _constant_channels(mixer: Any, parts: dict[str, Tensor]) -> None:
    """The last head always says CONSTANT_SIZE and no output reads it: a floor for the norm."""
    last = slice(INNER - CONSTANT_CHANNELS, INNER)
    parts["x"][last] = 0
    parts["bias x"][last] = CONSTANT_SIZE
    mixer.D[-1] = 1.0
    mixer.dt_bias[-1] = -7.0  # its state stays empty
    _open_gates(parts, last)
    mixer.out_proj.weight[:, last] = 0


def _open_gates(parts: dict[str, Tensor], channels: slice) -> None:
    parts["z"][channels] = 0
    parts["z"][channels, 0] = GATE / (CONSTANT / math.sqrt(WIDTH) * _normalised_size(1.5))


def _write_slot(mixer: Any, codes: Codes) -> None:
    parts = _parts(mixer)
    for name in ("z", "x", "B", "C", "dt"):
        parts[name].mul_(QUIET)
    channels = slice(0, 2 * N_SLOT)
    parts["x"][channels] = 0
    parts["x"][channels, CONTENT] = torch.cat([codes.slot, -codes.slot])
    parts["taps x"][channels] = torch.tensor([1.0, 0, 0, 0])  # lag 3
    _open_gates(parts, channels)
    mixer.D[:4] = 1.0
    mixer.dt_bias[:4] = -7.0
    _constant_channels(mixer, parts)
    floor = CONSTANT_SIZE * math.sqrt(CONSTANT_CHANNELS / INNER)  # the gates are a common factor
    gain = floor * STD * math.sqrt(WIDTH) / _normalised_size(1.0)
    mixer.out_proj.weight[:, channels] = 0
    mixer.out_proj.weight[SLOT, channels] = gain * torch.cat(
        [torch.eye(N_SLOT), -torch.eye(N_SLOT)], dim=1
    )


def _write_memory(mixer: Any, codes: Codes, generator: torch.Generator) -> None:
    parts = _parts(mixer)
    for name in ("z", "x", "B", "C", "dt"):
        parts[name].mul_(QUIET)
    n_keys = len(codes.keys)
    n_things = n_keys - len(grammar.TOPICS)
    size = CONTENT_SHARE * _normalised_size(1.5)
    thing_gain = MATCH / (size * THING_SHARE)
    gains = torch.full((n_keys, 1), thing_gain)
    gains[n_things:] = MATCH / size
    for name in ("B", "C"):
        parts[name][:n_keys] = 0
        parts[name][:n_keys, SLOT] = torch.nn.functional.pad(
            gains * torch.eye(n_keys), (0, N_SLOT - n_keys)
        )
        parts[f"bias {name}"][:n_keys] = -THRESHOLD * MATCH
    parts["C"][:n_keys, CONTENT] = gains * codes.keys
    parts["bias B"][n_things:n_keys] = -TOPIC_THRESHOLD * MATCH
    parts["bias C"][n_things:n_keys] = -TOPIC_QUERY_THRESHOLD * MATCH
    parts["taps B"][:n_keys] = torch.tensor([0.0, 1, 1, 1])  # the slot at lags 0-2
    parts["taps C"][:n_keys] = torch.tensor([0.0, 1, 1, 0])  # content and slot at lags 1 and 2

    values = _orthonormal(64, N_CONTENT, generator)
    channels = slice(0, 128)
    parts["x"][channels] = 0
    parts["x"][channels, CONTENT] = torch.cat([values, -values])
    parts["taps x"][channels] = torch.tensor([0.0, 0, 0, 1])  # this word
    _open_gates(parts, channels)
    mixer.D[:4] = 0.0
    mixer.A_log[:4] = math.log(SLOW)
    mixer.dt_bias[:4] = math.log(math.e - 1)  # Δ = 1
    _constant_channels(mixer, parts)
    mixer.out_proj.weight[:, channels] = 0
    mixer.out_proj.weight[CONTENT, channels] = VALUE_GAIN * torch.cat([values.T, -values.T], dim=1)


def initialise_mamba(model: Any, seed: int) -> None:
    """Write the circuit into a freshly built MambaForCausalLM.

    One layer's state of 16 cannot keep 52 keys apart, four layers' can: the key of a thing is a
    row of a 64 × 52 matrix with orthonormal columns, of which layer l holds 16 rows; the layers'
    outputs add up in the residual stream, so what one confuses the others cancel.

    Raises:
        ConfigError: the model has other sizes than `micro_mamba_config`.
    """
    config = model.config
    shape = (config.hidden_size, config.state_size, config.intermediate_size)
    if shape != (WIDTH, 16, INNER) or config.conv_kernel != 4 or config.num_hidden_layers < 5:
        raise ConfigError(
            f"width, state, inner width are {shape}, convolution {config.conv_kernel}; the "
            f"structured start is written for ({WIDTH}, 16, {INNER}), 4 and at least 5 layers"
        )
    generator = torch.Generator().manual_seed(hash64(f"mamba start {seed}") >> 1)
    codes = word_codes(config.vocab_size, generator)
    n_layers = len(MEMORY_LAYERS)
    keys = _orthonormal(len(codes.keys), 16 * n_layers, generator).T.split(16)
    with torch.no_grad():
        model.backbone.embeddings.weight.copy_(codes.table)
        mixers = [layer.mixer for layer in model.backbone.layers]
        for mixer in mixers:
            mixer.out_proj.weight.mul_(QUIET)
        _write_slot_1(mixers[0], codes)
        for index, key in zip(MEMORY_LAYERS, keys, strict=True):
            _write_memory_1(mixers[index], codes, key)


def _gate_row() -> Tensor:
    row = torch.zeros(WIDTH)
    row[0] = GATE / (CONSTANT / math.sqrt(WIDTH) * _normalised_size(1.5))
    return row


def _empty_channels(mixer: Any, channels: slice) -> None:
    """Channels that only pass their convolution on: no state, and no part in B, C and Δ."""
    mixer.D[channels] = 1.0
    mixer.dt_proj.weight[channels] = 0
    mixer.dt_proj.bias[channels] = -7.0
    mixer.x_proj.weight[:, channels] = 0
    mixer.conv1d.weight[channels] = 0
    mixer.conv1d.bias[channels] = 0
    mixer.in_proj.weight[channels] = 0
    gates = slice(INNER + channels.start, INNER + channels.stop)
    mixer.in_proj.weight[gates] = _gate_row()
    mixer.out_proj.weight[:, channels] = 0


def _write_slot_1(mixer: Any, codes: Codes) -> None:
    channels = slice(0, 2 * N_SLOT)
    _empty_channels(mixer, channels)
    mixer.in_proj.weight[channels, CONTENT] = torch.cat([codes.slot, -codes.slot])
    mixer.conv1d.weight[channels, 0, 0] = 1.0  # lag 3
    gain = STD * math.sqrt(WIDTH) / (_normalised_size(1.0) * GATE)
    signs = torch.cat([torch.eye(N_SLOT), -torch.eye(N_SLOT)], dim=1)
    mixer.out_proj.weight[SLOT, channels] = gain * signs


def _write_memory_1(mixer: Any, codes: Codes, key: Tensor) -> None:
    n_keys = len(codes.keys)
    n_things = n_keys - len(grammar.TOPICS)
    values = slice(0, 2 * N_CONTENT)
    writing = slice(values.stop, values.stop + n_keys)
    reading = slice(writing.stop, writing.stop + n_keys)
    _empty_channels(mixer, slice(0, reading.stop))
    size = CONTENT_SHARE * _normalised_size(1.5)
    gains = torch.full((n_keys, 1), MATCH / (size * THING_SHARE))
    gains[n_things:] = MATCH / size
    eye = torch.nn.functional.pad(torch.eye(n_keys), (0, N_SLOT - n_keys))
    inputs, taps, bias = mixer.in_proj.weight, mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    inputs[writing, SLOT] = gains * eye
    inputs[reading, SLOT] = gains * eye
    inputs[reading, CONTENT] = gains * codes.keys
    taps[writing] = torch.tensor([0.0, 1, 1, 1])  # the slot at lags 0-2
    taps[reading] = torch.tensor([0.0, 1, 1, 0])  # content and slot at lags 1 and 2
    for channels, topics in ((writing, TOPIC_THRESHOLD), (reading, TOPIC_QUERY_THRESHOLD)):
        bias[channels] = -THRESHOLD * MATCH
        bias[channels.stop - n_keys + n_things : channels.stop] = -topics * MATCH
    rank = mixer.time_step_rank
    mixer.x_proj.weight[rank : rank + 16, writing] = KEY_SCALE * key
    mixer.x_proj.weight[rank + 16 :, reading] = KEY_SCALE * key
    mixer.x_proj.weight[rank:, reading.stop :] *= QUIET

    content = torch.eye(N_CONTENT)
    inputs[values, CONTENT] = torch.cat([content, -content])
    taps[values, 3] = 1.0
    mixer.D[values] = 0.0
    mixer.D[values.stop : reading.stop] = 0.0
    mixer.A_log[values] = math.log(SLOW)
    mixer.dt_proj.bias[values] = math.log(math.e - 1)  # Δ = 1
    # what one right key returns: the content code of the word, as large as in the embedding
    returned = (MATCH * THRESHOLD * KEY_SCALE) ** 2 * GATE * size
    gain = RECALLED_SIZE * CONTENT_SHARE * STD * math.sqrt(WIDTH) / returned
    mixer.out_proj.weight[CONTENT, values] = gain * torch.cat([content, -content], dim=1)
