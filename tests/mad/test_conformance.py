"""Every registered layer holds to every check, and every check finds a layer that does not."""

import importlib

import pytest
import torch
from torch import nn

from mad.checks import CHECKS, Subject, check_layer, outcome
from mad.layers.layer import Accounting, Layer
from mad.registry import LAYERS
from workbench.errors import ConfigError, GateFailed
from workbench.run import RunOptions
from workbench.tables import read_csv

conformance = importlib.import_module("mad.conformance")

FAST = [name for name in CHECKS if name != "overfit"]
VARIANTS = [
    "mh-hyena,num_heads=4,layout=paper",
    "hyena,kernel=fft",
    "mh-hyena,num_heads=4,kernel=fft",
    "sliding-attention,window=3",
    "attention,backend=eager,rotary_dim=0",
    "linear-attention,feature_map=elu,normalize=sum",
    *(
        f"mh-linear-attention,num_heads=4,feature_map={kind}"
        for kind in ("elu", "relu", "identity", "hedgehog", "t2r", "dpfp", "taylor")
    ),
]


@pytest.mark.parametrize("text", [*LAYERS, *VARIANTS])
def test_a_layer_holds_to_every_check(text):
    wrong = [one for one in check_layer(text, FAST) if one.status != "ok"]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("text", LAYERS)
def test_a_layer_learns_one_batch(text):
    (one,) = check_layer(text, ["overfit"])
    assert one.status == "ok", one.detail


# ---------------------------------------------------------------- layers that fail, one per check


class Sound(Layer):
    """A running sum with a weight per channel: the layer that the wrong ones below derive from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.scale * x.cumsum(dim=1)

    def initial_state(self, batch, *, device=None, dtype=None):
        return {"sum": torch.zeros(batch, len(self.scale), device=device, dtype=dtype)}

    def step(self, x, state):
        total = state["sum"] + x
        return self.scale * total, {"sum": total}

    def state_floats(self, length):
        return len(self.scale)


class WrongShape(Sound):
    def forward(self, x):
        return super().forward(x)[:, :-1]


class Peeks(Sound):
    def forward(self, x):
        return self.scale * (x.cumsum(dim=1) + 0.01 * x.mean(dim=1, keepdim=True))


class Constant(Sound):
    def forward(self, x):
        return self.scale.expand_as(x)


class MixesBatch(Sound):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


class Random(Sound):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-3 * torch.rand(()))


class EvenOnly(Sound):
    def forward(self, x):
        if x.shape[1] % 2:
            raise ValueError("odd length")
        return super().forward(x)


class Unused(Sound):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.idle = nn.Parameter(torch.ones(3))


class OtherStep(Sound):
    def step(self, x, state):
        y, state = super().step(x, state)
        return 1.000001 * y, state


class InPlace(Sound):
    def step(self, x, state):
        state["sum"] += x
        return self.scale * state["sum"], {"sum": state["sum"]}


class OtherGradient(Sound):
    def forward(self, x):
        return self.scale * (x + (x.cumsum(dim=1) - x).detach())


class WrongState(Sound):
    def state_floats(self, length):
        return len(self.scale) + 1


class WrongParameters(Sound):
    def accounting(self, length):
        return Accounting(3, 3, self.state_floats(length), 0)


class SingleOnly(Sound):
    def forward(self, x):
        return super().forward(x).float()


class Branches(Sound):
    def forward(self, x):
        return super().forward(x) if float(self.scale.sum()) > 0 else x


class Drowns(Sound):
    """Adds so large a constant to the residual stream that nothing of it is left."""

    def forward(self, x):
        return 1e9 + 0 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "check", "detail"),
    [
        (WrongShape, "shape", "expected the same"),
        (Peeks, "causality", "before a change"),
        (Constant, "causality", "does not depend"),
        (MixesBatch, "independence", "alone"),
        (Random, "determinism", "differ"),
        (EvenOnly, "lengths", "odd length"),
        (Unused, "gradient", "no gradient reaches idle"),
        (OtherStep, "step", "step against parallel form"),
        (InPlace, "step", "changed the state"),
        (OtherGradient, "step", "gradient of step"),
        (WrongState, "accounting", "33 are stated"),
        (WrongParameters, "accounting", "3 parameters are stated, 32 are there"),
        (SingleOnly, "dtypes", "float64 in"),
        (Branches, "vmap", "RuntimeError"),
        (Drowns, "overfit", "nats after 300 steps"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_check_can_fail(layer, check, detail, monkeypatch):
    monkeypatch.setattr("mad.layers.channel.Wrong", layer, raising=False)
    with torch.random.fork_rng(devices=[]):
        one = outcome(Subject("mad.layers.channel:Wrong"), check)
    assert one.status == "failed"
    assert detail in one.detail


def test_the_sound_layer_is_sound(monkeypatch):
    monkeypatch.setattr("mad.layers.channel.Sound", Sound, raising=False)
    wrong = [one for one in check_layer("mad.layers.channel:Sound") if one.status != "ok"]
    assert not wrong


def test_a_plain_module_skips_what_it_does_not_offer(monkeypatch):
    monkeypatch.setattr("mad.layers.channel.Plain", nn.Linear, raising=False)

    class Plain(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.map = nn.Linear(width, width)

        def forward(self, x):
            return self.map(x)

    monkeypatch.setattr("mad.layers.channel.Plain", Plain)
    found = {one.check: one.status for one in check_layer("mad.layers.channel:Plain", FAST)}
    assert {name for name, status in found.items() if status == "skipped"} == {"step", "accounting"}
    assert "failed" not in found.values()


# ---------------------------------------------------------------- the script


def at(folder, *layers: str, **changes):
    options = RunOptions(root=folder, device="cpu", threads=1)
    return conformance.Experiment(layers=layers, run=options, **changes)


def test_the_script_writes_a_table_and_ends_with_status_three_on_failure(tmp_path, monkeypatch):
    result = conformance.main(at(tmp_path, "mlp", checks=("shape", "step")))
    assert (result["ok"], result["failed"], result["skipped"]) == (2, 0, 0)
    (table,) = tmp_path.glob("mad/conformance-*/tables/checks.csv")
    assert [row["check"] for row in read_csv(table)] == ["shape", "step"]

    monkeypatch.setattr("mad.layers.channel.Peeks", Peeks, raising=False)
    bad = at(tmp_path, "mad.layers.channel:Peeks", checks=("causality",))
    for _ in range(2):  # found again, still a failure
        with pytest.raises(GateFailed, match="1 checks failed; first: .*Peeks: causality"):
            conformance.main(bad)


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nearest: mh-attention"):
        at(tmp_path, "mh-atention")
    with pytest.raises(ConfigError, match="nearest: causality"):
        conformance.main(at(tmp_path, "mlp", checks=("causalty",)))
    with pytest.raises(ConfigError, match="width=0"):
        at(tmp_path, "mlp", width=0)
    with pytest.raises(ConfigError, match="not divisible"):
        conformance.main(at(tmp_path, "attention,num_heads=3"))
