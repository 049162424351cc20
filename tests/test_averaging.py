"""The running average against float64 means, Alg. 1's recursion and torch's AveragedModel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from imagenet_swa.averaging import WeightAverage, capture_weights

HALF_ULP = 2.0**-24  # of a fp32 number, relative to it


def small_network(seed: int = 0) -> nn.Sequential:
    """Parameters, running statistics and a counter."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def move(network: nn.Module, seed: int) -> None:
    """Other parameters, other running statistics, a counter that counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 10)
            else:
                tensor.add_(seed + 1)


def captured_run(num_captures: int) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A network in its pretrained state, and `num_captures` captures of its later states."""
    network = small_network()
    moving = small_network()
    captures = []
    for seed in range(num_captures):
        move(moving, seed)
        captures.append(capture_weights(moving))
    return network, captures


def parameter_names(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def assert_is_mean(found: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """`found` is the mean up to what rounding the running average to fp32 can do.

    Update j rounds by at most half an ulp of a number not above the largest summand m, and enters the average of k with weight
    j / k; the sum over j = 1 .. k is (k + 1) / 2 halves of an ulp of m. One half more for folding in the pretrained weights.
    """
    stacked = torch.stack([tensor.double() for tensor in tensors])
    bound = HALF_ULP * stacked.abs().amax(0) * ((len(tensors) + 1) / 2 + 1)
    assert found.dtype == torch.float32
    assert ((found.double() - stacked.mean(0)).abs() <= bound).all()


@pytest.mark.parametrize("interrupted_after", [None, 0, 1, 3])
@pytest.mark.parametrize("num_captures", [1, 2, 7, 30])
def test_average_is_the_mean_of_the_captures(num_captures: int, interrupted_after: int | None):
    """The average is the plain mean of the captures, or of them and the pretrained weights, also when its state was saved and
    loaded on the way.
    """
    network, captures = captured_run(num_captures)
    average = WeightAverage(network)
    for number, captured in enumerate(captures):
        if number == interrupted_after:
            state, count = average.state(), average.num_averaged
            average = WeightAverage(small_network(seed=99))
            average.load_state(state, count)
        average.update(captured)
    assert average.num_averaged == num_captures
    pretrained = capture_weights(network)
    without, with_pretrained = (average.weights(include_pretrained=choice) for choice in (False, True))
    for name in parameter_names(network):
        assert_is_mean(without[name], [captured[name] for captured in captures])
        assert_is_mean(with_pretrained[name], [pretrained[name], *(captured[name] for captured in captures)])


def test_saved_state_continues_bit_for_bit():
    """Averages that go on from a saved state equal uninterrupted ones to the last bit."""
    network, captures = captured_run(6)
    whole, first_half = WeightAverage(network), WeightAverage(network)
    for captured in captures:
        whole.update(captured)
    for captured in captures[:3]:
        first_half.update(captured)
    saved = {name: tensor.clone() for name, tensor in first_half.state().items()}
    second_half = WeightAverage(small_network(seed=99))
    second_half.load_state(saved, 3)
    for captured in captures[3:]:
        second_half.update(captured)
    for name, tensor in whole.state().items():
        assert torch.equal(second_half.state()[name], tensor)


@settings(deadline=None, max_examples=30)
@given(num_captures=st.integers(0, 12), seed=st.integers(0, 1000))
def test_average_is_the_recursion_of_algorithm_1(num_captures: int, seed: int):
    """With the pretrained weights, the average is w_SWA <- (w_SWA n + w) / (n + 1) from w_SWA = w_hat, n = 1, 2, ...; it is
    (n w_without + w_hat) / (n + 1).
    """
    network, moving = small_network(seed), small_network(seed)
    average = WeightAverage(network)
    recursion = {name: p.detach().double() for name, p in network.named_parameters()}
    for n in range(1, num_captures + 1):
        move(moving, seed + n)
        average.update(capture_weights(moving))
        for name, parameter in moving.named_parameters():
            recursion[name] = (recursion[name] * n + parameter.detach().double()) / (n + 1)
    found = average.weights(include_pretrained=True)
    pretrained = capture_weights(network)
    for name, wanted in recursion.items():
        # Numbers around 10, at most 50; half an ulp of 50 is 50 x 2^-24, see assert_is_mean for the count.
        assert torch.allclose(found[name].double(), wanted, rtol=0, atol=50 * HALF_ULP * (num_captures + 4) / 2)
        if num_captures:
            without = average.weights(include_pretrained=False)[name].double()
            blended = (num_captures * without + pretrained[name].double()) / (num_captures + 1)
            assert torch.allclose(found[name].double(), blended, rtol=0, atol=50 * HALF_ULP)


@pytest.mark.parametrize("include_pretrained", [False, True])
def test_average_is_torchs_averaged_model(include_pretrained: bool):
    """torch's AveragedModel, fed the same networks, holds the same parameters.

    Its first update copies, so that the pretrained network counts only where it is fed first.
    """
    network = small_network()
    average, theirs = WeightAverage(network), AveragedModel(network)
    if include_pretrained:
        theirs.update_parameters(network)
    for seed in range(5):
        move(network, seed)
        average.update(capture_weights(network))
        theirs.update_parameters(network)
    ours = average.weights(include_pretrained=include_pretrained)
    for name, parameter in theirs.module.named_parameters():
        assert torch.allclose(ours[name], parameter, rtol=0, atol=50 * HALF_ULP * 6)


@pytest.mark.parametrize("include_pretrained", [False, True])
def test_buffers_are_those_of_the_latest_capture(include_pretrained: bool):
    """Counters and running statistics are copied from the latest capture, not averaged, and keep their types."""
    network, captures = captured_run(4)
    average = WeightAverage(network)
    for captured in captures:
        average.update(captured)
    found = average.weights(include_pretrained=include_pretrained)
    buffers = [name for name, _ in network.named_buffers()]
    assert buffers == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    for name in buffers:
        assert torch.equal(found[name], captures[-1][name])
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert found["1.num_batches_tracked"].item() == 1 + 2 + 3 + 4


def test_bf16_networks_are_averaged_in_fp32_and_keep_moving():
    """After many captures one more still moves the average of a bf16 network, by steps too small for bf16."""
    network = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    neighbours = (1.0, 1.0 + 2.0**-7)  # in bf16 there is no number between them
    average = WeightAverage(network)
    values = [neighbours[0]] * 299 + [neighbours[1]]
    for value in values:
        nn.init.constant_(network.weight, value)
        average.update(capture_weights(network))
    weight = average.weights(include_pretrained=False)["weight"]
    assert weight.dtype == torch.float32
    assert average.state()["pretrained/weight"].dtype == capture_weights(network)["weight"].dtype == torch.float32
    assert weight.item() == pytest.approx(1 + 2.0**-7 / 300, abs=2.0**-23)
    assert weight.item() > 1


def test_average_without_captures():
    """Before any capture the average with the pretrained weights is these, bit for bit, and that of the captures an error."""
    network = small_network()
    average = WeightAverage(network)
    for name, tensor in average.weights(include_pretrained=True).items():
        assert torch.equal(tensor, network.state_dict()[name])
    with pytest.raises(ValueError, match="no weights captured yet"):
        average.weights(include_pretrained=False)


def test_captures_own_their_memory():
    """Training on does not change what was captured, and tied parameters are captured apart."""
    network = small_network()
    network.append(nn.Linear(16, 5))
    network[4].weight = network[3].weight
    captured = capture_weights(network)
    kept = {name: tensor.clone() for name, tensor in captured.items()}
    move(network, 0)
    assert all(torch.equal(captured[name], kept[name]) for name in kept)
    assert not any(torch.equal(captured[name], tensor) for name, tensor in network.state_dict().items())
    assert len({tensor.data_ptr() for tensor in captured.values()}) == len(captured)


def test_average_owns_its_memory():
    """Neither the network, nor a capture after its use, nor the weights handed out are tied to the average."""
    network, (captured, *_) = captured_run(1)
    average = WeightAverage(network)
    average.update(captured)
    wanted = [average.weights(include_pretrained=choice) for choice in (False, True)]
    handed_out = [average.weights(include_pretrained=choice) for choice in (False, True)]
    move(network, 5)
    for tensor in (*captured.values(), *handed_out[0].values(), *handed_out[1].values()):
        tensor.zero_()
    for choice, weights in zip((False, True), wanted, strict=True):
        found = average.weights(include_pretrained=choice)
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_loaded_state_owns_its_memory():
    """What a state was loaded from may change afterwards."""
    network, (captured, *_) = captured_run(1)
    source, target = WeightAverage(network), WeightAverage(network)
    source.update(captured)
    state = {name: tensor.clone() for name, tensor in source.state().items()}
    target.load_state(state, 1)
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(tensor, source.state()[name]) for name, tensor in target.state().items())


def test_captures_are_contiguous_and_complete():
    """A capture has every entry of the state dict by its own name, contiguous also for a channels_last network."""
    network = small_network().to(memory_format=torch.channels_last)
    assert not network.get_parameter("0.weight").is_contiguous()
    captured = capture_weights(network)
    assert list(captured) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(captured[name], tensor)
        assert captured[name].is_contiguous()
        assert captured[name].device.type == "cpu"


def test_tied_parameters_are_averaged_under_both_names():
    """A parameter with two names is averaged under both."""
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    network[1].weight = network[0].weight
    average = WeightAverage(network)
    for value in (1.0, 2.0):
        nn.init.constant_(network.get_parameter("0.weight"), value)
        average.update(capture_weights(network))
    found = average.weights(include_pretrained=False)
    assert found["0.weight"].unique().tolist() == found["1.weight"].unique().tolist() == [1.5]
