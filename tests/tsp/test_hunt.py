"""Random programs of operations, views, writes, casts, draws and autocast: the plain network, or a refusal.

``TSP_HUNT=5000`` looks at that many more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from hunt import DIFFERENT, EQUAL, INPUTS, OPERATIONS, RAW, REFUSED, SETTINGS, apart, judge

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.tsp.plan import Plan
from maisi_tools.tsp.whole import Whole
from thorough import examples

EXAMPLES = int(os.environ.get("TSP_HUNT", examples(150)))

INSTRUCTIONS = st.tuples(
    st.sampled_from(list(OPERATIONS)), st.integers(0, 3), st.sampled_from([1, 0, 2, 3]), st.integers(0, 199)
)
COUNTS: dict[str, int] = {}


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="TSP_HUNT" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    instructions=st.lists(INSTRUCTIONS, min_size=1, max_size=6),
    returned=st.lists(st.integers(0, 5), max_size=2),
    form=st.integers(0, 2),
    volume=st.sampled_from(["float32", *INPUTS]),
    setting=st.sampled_from(list(SETTINGS)),
    outer=st.booleans(),
    inference=st.booleans(),
)
def test_a_random_network_is_the_plain_one_or_refused(**case):
    outcome = judge(**case)
    COUNTS[outcome.kind] = COUNTS.get(outcome.kind, 0) + 1
    assert outcome.kind in (EQUAL, REFUSED), outcome.detail


def test_most_are_not_refused():
    """After the hunt above: a refusal of everything would pass it."""
    if not COUNTS:
        pytest.skip("the hunt was not run")
    print(COUNTS)
    assert COUNTS[EQUAL] > 3 * COUNTS.get(REFUSED, 0) and not {DIFFERENT, RAW} & COUNTS.keys()


# --- the kinds, each by a case that was silently wrong, or raised ----------------------------------------------------


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(2, 2, 3, padding=1)
        self.register_buffer("scratch", torch.ones(1))
        self.function = function
        self.eval()

    def forward(self, x):
        return self.function(self, x)


def _ensemble(net, x):
    found = []
    for step in (1.0, 2.0, 3.0):
        net.load_state_dict({name: torch.full_like(value, step) for name, value in net.state_dict().items()})
        found.append(net.conv(x))
    return found


def _scratch(net, x):
    found = []
    for _ in range(3):
        net.scratch.mul_(2)
        found.append(x * net.scratch)
    return found


def _data(net, x):
    first = x * net.scratch
    net.scratch.data = torch.full((1,), 5.0)
    return first, x * net.scratch


def _view_of_a_weight(net, x):
    part = net.scratch[:1]
    first = x + part
    net.scratch.fill_(9)
    return first, x + part


def _accumulated(net, x):
    total = torch.zeros(2)
    for _ in range(2):
        total += x.mean((0, 2, 3, 4))
        x = x + total.view(-1, 1, 1, 1)
    return x, total


def _draws(net, x):
    y = (x * 1).normal_()
    return y + torch.rand(1), x.clone().bernoulli_(0.5), torch.empty_like(x).random_(3), torch.rand(2)


def _inner_autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        h = net.conv(x)
        with torch.autocast("cpu", enabled=False):
            y = h.float() + 1001
        return h, y, x + 1001


EQUALS = {
    "an ensemble by load_state_dict": _ensemble,
    "a buffer that grows": _scratch,
    "a parameter's data replaced": _data,
    "a view of a weight": _view_of_a_weight,
    "an accumulator": _accumulated,
    "draws in place": _draws,
    "autocast within": _inner_autocast,
    "a copy that is one": lambda net, x: (x.to(x.dtype, copy=True).add_(1), x),
    "a channels-last copy": lambda net, x: (x.contiguous(memory_format=torch.channels_last_3d).add_(1), x),
    "strides of a permuted volume": lambda net, x: (x.transpose(2, 4).stride(), x.transpose(2, 4).is_contiguous(), x),
    "keywords alone": lambda net, x: (torch.softmax(input=x, dim=1), torch.flip(input=x, dims=(2,))),
    "a formatted mean": lambda net, x: (f"{x.double().mean():.3f}", x),
    "padded integer pooling": lambda net, x: functional.max_pool3d((x * 9).long(), 3, 2, 1),
    "an argument written into": lambda net, x: functional.relu(x, inplace=True) * 2,
    "the argument itself": lambda net, x: x,
    "interpolation by three": lambda net, x: functional.interpolate(x, scale_factor=3, mode="trilinear"),
}


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("kind", EQUALS)
def test_what_was_silently_wrong_is_equal(kind, splits):
    x = torch.randn(1, 2, 6, 5, 4)
    plain, split = x.clone(), x.clone()
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = Net(EQUALS[kind])(plain)
        torch.manual_seed(1)
        found = TSPInferer(splits=splits)(split, Net(EQUALS[kind]))
    assert not apart(wanted, found, rough="autocast" in kind)
    assert torch.equal(plain, split)


def test_a_copy_is_not_the_callers_tensor():
    x = torch.randn(1, 2, 6, 5, 4)
    for function in (torch.clone, lambda x: x.to(x.dtype, copy=True), lambda x: x * 1):
        found = TSPInferer(splits=2)(x, function)
        assert torch.equal(found, x) and found.data_ptr() != x.data_ptr()
    assert TSPInferer(splits=2)(x, lambda x: x) is x


def _behind_dropout(x):
    y = functional.dropout(x, 0.5, False)
    torch.relu_(y)
    return x + y


ALIASES = {
    "dropout": _behind_dropout,
    **{
        name: lambda x, view=view: (view(x).add_(1), x)
        for name, view in {
            "diagonal": lambda x: x.diagonal(dim1=3, dim2=4),
            "as_strided": lambda x: x.as_strided((4, 2), (2, 1)),
            "ravel": torch.ravel,
            "unfold": lambda x: x.unfold(2, 2, 2),
            "hsplit": lambda x: x.hsplit([1])[0],
            "dsplit": lambda x: x.dsplit([1])[0],
            "conj": torch.conj,
            "+x": lambda x: +x,
            "adjoint": lambda x: x.adjoint(),
            "mH": lambda x: x.mH,
            "atleast_3d": torch.atleast_3d,
            "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:, :1])[0],
        }.items()
    },
}


@pytest.mark.parametrize("name", ALIASES)
def test_writing_into_an_alias_is_seen_or_refused(name):
    x = torch.randn(1, 2, 6, 5, 5)
    wanted = ALIASES[name](x * 1)
    try:
        found = TSPInferer(splits=2)(x, lambda x: ALIASES[name](x * 1))
    except TSPError as error:
        assert "shares its memory with another one in use" in str(error)
    else:
        assert not apart(wanted, found)


def test_a_view_whose_owner_has_gone_still_has_its_other_views():
    def network(x):
        v = (x * 1)[:, :1]
        w = v[..., :2]
        v.mul_(3)
        return w

    with pytest.raises(TSPError, match="shares its memory with another one in use"):
        TSPInferer(splits=2)(torch.randn(1, 2, 6, 5, 4), network)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64])
def test_another_type_than_the_weights_is_refused_by_torch_itself(dtype):
    volume = (torch.randn(1, 2, 6, 5, 4) * 100).to(dtype)
    net = Net(lambda net, x: net.conv(x))
    with torch.no_grad():
        with pytest.raises(RuntimeError) as plain:
            net(volume)
        with pytest.raises(RuntimeError) as split:
            TSPInferer(splits=2)(volume, net)
    assert type(split.value) is type(plain.value) and not isinstance(split.value, TSPError)


def test_an_integer_volume_through_a_convolution_that_is_not_returned_raises_too():
    with torch.no_grad(), pytest.raises(RuntimeError, match="should be the same|expected scalar type|not implemented"):
        TSPInferer(splits=2)(torch.ones(1, 2, 6, 5, 4).short(), Net(lambda net, x: (net.conv(x), x * 2)[1]))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 2), nn.InstanceNorm3d(2, affine=True)])
def test_norms_in_double_precision(norm):
    volume = torch.randn(1, 2, 6, 5, 4).double()
    with torch.no_grad():
        found = TSPInferer(splits=3)(volume, norm.double().eval())
        torch.testing.assert_close(found, norm(volume), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("splits", [None, 2])
def test_what_torch_has_not_in_half_precision_is_computed_in_float32(splits):
    volume, net = torch.randn(1, 2, 8, 6, 4), Net(lambda net, x: functional.avg_pool3d(net.conv(x), 2))
    with torch.no_grad():
        found = TSPInferer(splits=splits, dtype="bfloat16")(volume, net)
        assert found.dtype == torch.float32 and not apart(net(volume), found, rough=True)


def test_an_empty_batch():
    net = Net(lambda net, x: net.conv(x).relu())
    with torch.no_grad():
        assert TSPInferer(splits=3)(torch.randn(0, 2, 6, 5, 4), net).shape == (0, 2, 6, 5, 4)


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
@pytest.mark.parametrize("how", [{"scale_factor": 2}, {"scale_factor": 3}, {"size": (6, 7, 9)}, {"size": (6, 5, 8)}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_spreads_as_far_as_in_torch(mode, how, bad):
    volume = torch.zeros(1, 2, 6, 5, 4)
    volume[0, 0, 2:4, 3, 1] = volume[0, 1, 0, 0, 3] = bad
    wanted = functional.interpolate(volume, mode=mode, **how)
    for axis in (0, 1, 2):
        found = TSPInferer(splits=2, axis=axis)(volume, lambda x: functional.interpolate(x, mode=mode, **how))
        assert torch.equal(found.isfinite(), wanted.isfinite())
        if bad != bad or how == {"scale_factor": 2}:
            assert torch.equal(found.isnan(), wanted.isnan())


def test_results_that_cannot_be_opened_and_handles_that_were_kept_are_refused():
    volume, kept = torch.randn(1, 2, 6, 5, 4), []

    class Own:
        def __init__(self, value):
            self.value = value

    with pytest.raises(TSPError, match="returns tensors inside a Own"):
        TSPInferer(splits=2)(volume, Own)
    with pytest.raises(TSPError, match="returns tensors inside a generator"):
        TSPInferer(splits=2)(volume, lambda x: (part for part in [x]))

    def keeping(x):
        found = x + kept[-1] if kept else x * 1
        kept.append(found)
        return found

    inferer = TSPInferer(splits=2)
    inferer(volume, keeping)
    with pytest.raises(TSPError, match="kept from an earlier call"):
        inferer(volume, keeping)


def test_a_network_that_counts_its_calls_is_called_once():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    volume, network, inferer = torch.ones(1, 1, 4, 4, 4), Counting().eval(), TSPInferer()
    for call in (1, 2, 3):
        assert inferer(volume, network).unique().tolist() == [call] and network.calls == call


@pytest.mark.parametrize("kind", ["a tensor", "a view", "a table of numpy", "a sparse tensor"])
def test_a_network_that_writes_into_what_stays_is_called_once(kind):
    table = np.ones(1, np.float32)
    tensor = torch.ones(2)
    sparse = torch.ones(1).to_sparse()
    kept = {
        "a tensor": lambda: tensor,
        "a view": lambda: tensor[:1],
        "a table of numpy": lambda: torch.from_numpy(table),
        "a sparse tensor": lambda: sparse,
    }[kind]
    if kind == "a tensor":
        tensor = tensor[0].clone()

    def network(x):
        kept().mul_(2)
        return x * (kept().to_dense() if kind == "a sparse tensor" else kept())

    volume, inferer = torch.ones(1, 1, 4, 4, 4), TSPInferer()
    for call in (1, 2, 3):
        assert inferer(volume, network).unique().tolist() == [2**call]
        assert isinstance(inferer.report.plan, Plan)


def test_what_a_network_writes_into_and_lets_go_keeps_it_from_nothing():
    """As MONAI's U-Net adds the embedding of the modality to that of the timestep, in place."""

    def network(x):
        embedding = torch.ones(1)
        embedding += 1
        return x * functional.relu(embedding)

    inferer = TSPInferer()
    assert inferer(torch.ones(1, 1, 4, 4, 4), network).unique().tolist() == [2]
    assert isinstance(inferer.report.plan, Whole)


# --- branches that no test reached -----------------------------------------------------------------------------------


def _attend(**how):
    def network(x):
        tokens = x.flatten(2).transpose(1, 2)
        return functional.scaled_dot_product_attention(tokens, tokens * 0.5, tokens + 1, **how)

    return network


BRANCHES = {
    "attention to the past": _attend(is_causal=True),
    "attention with a scale": _attend(scale=3.0),
    "attention with a mask": _attend(attn_mask=torch.arange(120) % 3 > 0),
    "average without the border": lambda x: functional.avg_pool3d(x, 3, 2, 1, count_include_pad=False),
    "average with the border": lambda x: functional.avg_pool3d(x, 3, 2, 1),
    "average by a divisor": lambda x: functional.avg_pool3d(x, 3, 2, 1, divisor_override=5),
    "rrelu": lambda x: functional.rrelu(x, 0.1, 0.7),
    "statistics of the batch": lambda x: functional.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_of_rules(name, axis):
    volume = torch.randn(1, 2, 6, 5, 4) * 2
    for splits in (1, 3):
        assert not apart(BRANCHES[name](volume), TSPInferer(splits=splits, axis=axis)(volume, BRANCHES[name]))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: functional.rrelu(x, training=True), "rrelu is random in training mode"),
        (lambda x: functional.batch_norm(x, torch.zeros(2), torch.ones(2), training=True), "batch norm is in training"),
        (lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "attention drops out at random"),
    ],
)
def test_training_is_refused(network, message):
    with pytest.raises(TSPError, match=message):
        TSPInferer(splits=2)(torch.randn(1, 2, 6, 5, 4), network)
