"""Muon is torch's own, only faster; what is trained by which optimizer, and that states come back."""

import dataclasses

import pytest
import torch

from tests.toy_lm.test_train import TINY
from toy_lm.model import Transformer
from toy_lm.optimizer import Muon, Optimizer


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 48)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_muon_moves_as_torchs_does(shape, weight_decay):
    ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    muon = Muon(ours, lr=torch.tensor(0.02), weight_decay=weight_decay)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for parameter, other in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        muon.step()
        reference.step()
    for parameter, other in zip(ours, theirs, strict=True):
        # One bf16 rounding (2^-8) of a step of about 0.02 * 0.2 * sqrt(48) / sqrt(32), four times.
        torch.testing.assert_close(parameter, other, atol=4 * 2**-8 * 0.02, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_trained_and_only_matrices_decay(optimizer):
    model = Transformer(TINY.model)
    config = dataclasses.replace(TINY.train, optimizer=optimizer, weight_decay=0.5)
    whole = Optimizer(model, config, torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    whole.set_learning_rate(torch.tensor([0.1]))
    whole.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.dim() == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected)
    assert {name.split(".", 2)[2] for name in whole.state()} == set(before)
    muon = {name.split(".", 2)[2] for name in whole.state() if "momentum_buffer" in name}
    assert (len(muon) == 14) == (optimizer == "muon") and not any("embed" in name for name in muon)


def test_a_state_comes_back():
    model = Transformer(TINY.model)
    config = dataclasses.replace(TINY.train, optimizer="muon")
    first, second = (Optimizer(model, config, torch.device("cpu")) for _ in range(2))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    first.step()
    second.load_state(first.state())
    state, other = first.state(), second.state()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
