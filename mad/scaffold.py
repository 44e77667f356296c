"""Files that a new layer or task begins with: code, settings, test. They work as they are written.

`mad.new_layer` and `mad.new_task` write them; the names in the templates are replaced.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import asdict
from pathlib import Path

from mad.registry import LAYERS, TASKS, LayerSpec
from workbench import storage
from workbench.errors import ConfigError

LAYER_CODE = '''"""The layer `@name@`: a gate per channel between a token and the one before it.

    y_t = W (g ⊙ x_t + (1 − g) ⊙ x_{t−1}),   g = sigmoid(γ)

Replace the equation, keep the methods: `forward` is the parallel form for training, `step` takes
one token and the state, and both must agree.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.layer import Layer, State


class @Class@(Layer):
    """Gated token shift; par d² + d, state d."""

    def __init__(self, width: int, *, start: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((width,), start))
        self.out = nn.Linear(width, width, bias=False)

    def mix(self, now: Tensor, before: Tensor) -> Tensor:
        """The equation, for any leading axes."""
        g = self.gate.sigmoid()
        return self.out(g * now + (1 - g) * before)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """All tokens at once; nothing stands before the first."""
        return self.mix(x, F.pad(x[:, :-1], (0, 0, 1, 0)))

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """What is carried from token to token, batch first."""
        return {"before": torch.zeros(batch, len(self.gate), device=device, dtype=dtype)}

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token and the state after it; the given state is left as it was."""
        return self.mix(x, state["before"]), {"before": x}

    def state_floats(self, length: int) -> int:
        """Floats in the state of one sequence after `length` tokens."""
        del length
        return len(self.gate)

    def mixing_flops_per_token(self, length: int) -> int:
        """Operations beyond those of the linear maps."""
        del length
        return 4 * len(self.gate)
'''

LAYER_SETTINGS = """# A small training run with the layer `@name@`, from the folder of @module@.py:
#   python -m mad.train --config @module@.yaml
#   python -m mad.conformance --layers @module@:@Class@
layers: ["@module@:@Class@,start=0.5", swiglu, "@module@:@Class@", swiglu]
task: in-context-recall
vocab_size: 8
seq_len: 16
num_train_examples: 2560
num_test_examples: 256
dim: 32
batch_size: 64
epochs: 4
lr: 1e-2
"""

LAYER_TEST = '''"""The layer `@name@`: what every layer must hold to, and its equation by hand."""

import pytest
import torch
from @module@ import @Class@

from mad import check_layer


@pytest.mark.parametrize("width", [32, 64])
def test_it_holds_to_every_check(width):
    outcomes = check_layer("@module@:@Class@", width=width)
    assert not [one for one in outcomes if one.status != "ok"]


def test_its_equation_by_hand():
    layer = @Class@(2)
    torch.nn.init.eye_(layer.out.weight)
    x = torch.tensor([[[2.0, 4.0], [6.0, 8.0]]])
    assert layer(x).tolist() == [[[1.0, 2.0], [4.0, 6.0]]]  # gates of one half
'''

TASK_CODE = '''"""The task `@name@`: say the token that stood some positions back.

A row of V = 8, L = 6 with delay 2:

    inputs    3  1  4  1  5  2
    answers   -  -  3  1  4  1
"""

from dataclasses import dataclass

import numpy as np

from mad.tasks.task import IGNORE, Rows, Split, Task
from workbench.errors import ConfigError


@dataclass(frozen=True)
class @Class@(Task):
    """Random tokens; at every position the token `delay` positions before it is asked for."""

    vocab_size: int = 8
    """Number of tokens V."""
    seq_len: int = 32
    """Length L."""
    delay: int = 2
    """Positions to look back."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size={self.vocab_size}; expected at least 2")
        if not 1 <= self.delay < self.seq_len:
            raise ConfigError(
                f"delay={self.delay} must be at least 1 and less than seq_len={self.seq_len}"
            )

    @property
    def length(self) -> int:
        """Positions the model reads."""
        return self.seq_len

    def draw(self, rng: np.random.Generator, rows: int, split: Split = "train") -> Rows:
        """All rows at once, from `rng` alone; the splits have the same law."""
        del split
        inputs = rng.integers(0, self.vocab_size, (rows, self.seq_len))
        answers = np.full_like(inputs, IGNORE)
        answers[:, self.delay :] = inputs[:, : -self.delay]
        return Rows(inputs, answers, answers)

    def legacy_row(self, rng: np.random.Generator, split: Split = "train") -> Rows:
        """A new task has no published order of random calls: one row as `draw` makes it."""
        return self.draw(rng, 1, split)

    def expected_scored(self) -> float:
        """L − delay positions of a row are scored."""
        return float(self.seq_len - self.delay)

    def chance(self) -> float:
        """1 / V."""
        return 1 / self.vocab_size
'''

TASK_SETTINGS = """# A small training run on the task `@name@`, from the folder of @module@.py:
#   python -m mad.train --config @module@.yaml
task: "@module@:@Class@"
options: ["delay=2"]
layers: ["mh-hyena,num_heads=4", swiglu, "mh-hyena,num_heads=4", swiglu]
num_train_examples: 2560
num_test_examples: 256
dim: 32
batch_size: 64
epochs: 4
lr: 1e-2
"""

TASK_TEST = '''"""The task `@name@`: law, reproducibility and answers by hand."""

import numpy as np
import pytest
from @module@ import @Class@

from mad import generate
from mad.tasks.task import IGNORE
from workbench.errors import ConfigError


def test_answers_by_hand():
    rows = generate(@Class@(delay=2), 50, "train", seed=0)
    assert (rows.answers[:, :2] == IGNORE).all()
    assert (rows.answers[:, 2:] == rows.inputs[:, :-2]).all()
    assert rows.inputs.min() >= 0
    assert rows.inputs.max() < 8


def test_a_row_depends_on_its_index_and_split_alone():
    task = @Class@()
    whole = generate(task, 1500, "train", seed=0)
    part = generate(task, 400, "train", seed=0, start=1100)
    assert (whole.inputs[1100:] == part.inputs).all()
    other = generate(task, 1500, "test", seed=0)
    assert (whole.inputs != other.inputs).any()


def test_the_stated_figures_are_those_of_the_rows():
    task = @Class@(vocab_size=5, seq_len=12, delay=3)
    rows = generate(task, 4000, "test", seed=1)
    scored = (rows.answers != IGNORE).sum(axis=1)
    assert scored.mean() == pytest.approx(task.expected_scored(), abs=0.1)
    answers = rows.answers[rows.answers != IGNORE]
    shares = np.bincount(answers, minlength=5) / len(answers)
    assert shares == pytest.approx(task.chance(), abs=0.02)  # guessing cannot do better


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="delay=0"):
        @Class@(delay=0)
'''


def names_of(name: str, taken: dict) -> dict[str, str]:
    """Registered name, module and class of something new: my-mixer, my_mixer, MyMixer.

    Raises:
        ConfigError: the name is no name, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"name {name[:80]!r}: expected small letters and digits, parts joined by a dash, such "
            "as my-mixer"
        )
    module = name.replace("-", "_")
    if name in taken or keyword.iskeyword(module):
        raise ConfigError(f"name {name!r} is taken; choose another")
    return {"name": name, "module": module, "Class": name.title().replace("-", "")}


def fill(template: str, names: dict[str, str]) -> str:
    """The template with `@key@` replaced."""
    for key, value in names.items():
        template = template.replace(f"@{key}@", value)
    return template


def layer_files(name: str) -> dict[str, str]:
    """File names and contents of a new layer."""
    names = names_of(name, LAYERS)
    module = names["module"]
    return {
        f"{module}.py": fill(LAYER_CODE, names),
        f"{module}.yaml": fill(LAYER_SETTINGS, names),
        f"test_{module}.py": fill(LAYER_TEST, names),
    }


def task_files(name: str) -> dict[str, str]:
    """File names and contents of a new task."""
    names = names_of(name, TASKS)
    module = names["module"]
    return {
        f"{module}.py": fill(TASK_CODE, names),
        f"{module}.yaml": fill(TASK_SETTINGS, names),
        f"test_{module}.py": fill(TASK_TEST, names),
    }


def write_new(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write the files; one that exists with the same content stays.

    Raises:
        ConfigError: a file exists and says something else, or the folder is none.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder")
    paths = [folder / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        if path.exists() and path.read_bytes() != text.encode("utf-8"):
            raise ConfigError(f"{path} exists already and is not overwritten; move it aside")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, files.values(), strict=True):
        if not path.exists():
            storage.write_text(path, text)
    return paths


# ---------------------------------------------------------------- defaults as files


def written(value: object) -> str:
    """An option's value as `--layers` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, str)):
        return str(value)
    raise ConfigError(f"option value {value!r} cannot be written behind a layer's name")


def layer_settings(name: str, spec: LayerSpec) -> str:
    """A settings file that names a layer with every option at its default."""
    options = "".join(f",\n    {key}={written(v)}" for key, v in asdict(spec.options).items())
    return (
        f"# Every option of {name} ({spec.build}), at its default; change what you like:\n"
        f"#   python -m mad.conformance --config configs/mad/layers/{name}.yaml\n"
        "# The same file serves mad.account and mad.profile.\n"
        f"layers:\n  - >-\n    {name}{options}\n"
    )


def all_layer_settings() -> dict[str, str]:
    """Contents of configs/mad/layers, by file name."""
    return {f"{name}.yaml": layer_settings(name, spec) for name, spec in LAYERS.items()}
