"""Invariant: weights made in inference mode, of which torch counts no write, are placed as all others are."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from .quantized import NETS, objects, session_for, tensors_of
from .quantized import state_of as state
from .toys import DEVICE, MODES, Low, build, clone, copied, same_values, state_of, tokens, values_of
from .toys import NETS as TOYS


@pytest.mark.parametrize("name", ["wrapper", "nested", "stamped", "own memory", "kept"])
def test_quantized_weights_made_in_inference_mode(sim: ModuleType, name: str) -> None:
    for mode in MODES:
        with torch.inference_mode():
            net, twin = build(NETS[name]), build(NETS[name])
            before = state(net)
            session = session_for(net, mode)
            for i in range(6):
                assert torch.equal(net(tokens(i).to(DEVICE)).cpu(), twin(tokens(i))), f"{mode}, run {i}"
                made_so = [t.is_inference() for tensor in tensors_of(net).values() for t in objects(tensor)]
                assert all(made_so)
                if i == 3:
                    session.free()
            session.detach()
            after = state(net)
            if name == "kept":  # it writes to it
                assert before.pop("leaf.table[2]") != after.pop("leaf.table[2]")
            assert after == before
            assert torch.equal(net(tokens()), twin(tokens()))


@pytest.mark.parametrize("name", TOYS)
def test_plain_weights_made_in_inference_mode(sim: ModuleType, name: str) -> None:
    """As a host loads them that runs its nodes in inference mode. Torch counts no writes to them."""
    for mode in MODES:
        make, inputs = TOYS[name]
        with torch.inference_mode():
            net = build(make)
            twin = clone(net)
            before = state_of(net)
            session = session_for(net, mode)
            for i in range(6):
                assert torch.equal(net(inputs(i).to(DEVICE)).cpu(), twin(inputs(i))), i
                if i == 3:
                    session.free()
            session.detach()
            assert state_of(net) == before
            assert all(t.is_inference() for t in (*net.parameters(), *net.buffers()))
            assert same_values(values_of(twin), net)


def test_a_buffer_that_stays_as_it_is_is_trusted_by_and_by(sim: ModuleType) -> None:
    with torch.inference_mode():
        net = build(Low)
        x = tokens().to(DEVICE)
        with session_for(net, "sequential") as session:
            first = copied(sim, lambda: net(x))["d2h_bytes"]
            assert first == 13 + 64  # its flags and positions
            net(x)
            session.free()
            assert copied(sim, lambda: [net(x) for _ in range(3)])["d2h_bytes"] == 0


@pytest.mark.parametrize("name", TOYS)
def test_weights_made_in_inference_mode_and_moved_outside_of_it(sim: ModuleType, name: str) -> None:
    """As a host leaves them that unloads its models between two prompts: no inference tensors, and yet no count."""
    make, inputs = TOYS[name]
    for mode in MODES:
        with torch.inference_mode():
            net = build(make)
            twin = clone(net)
            net.to(DEVICE)
        net.to("cpu")
        with session_for(net, mode) as session:
            for i in range(6):
                with torch.inference_mode():
                    assert torch.equal(net(inputs(i).to(DEVICE)).cpu(), twin(inputs(i))), (mode, i)
                if i == 3:
                    session.free()
        assert same_values(values_of(twin), net)
