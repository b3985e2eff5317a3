"""The sums over ∂L/∂W of one matrix, plain and as a GPU kernel, against ∂L/∂W in float64."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from saap.models.products import FastLinears, product
from saap.scoring import salience


def make(out, inside, dtype, samples=3, tokens=37, scale=1.0):
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, inside, generator=generator).to(dtype)
    delta = (scale * 1e-2 * torch.randn(samples, tokens, out, generator=generator)).to(dtype)
    return weight, delta, torch.randn(samples, tokens, inside, generator=generator).to(dtype)


def exact(weight, delta, x, axis, hessian, scale):
    s = weight.double() * torch.einsum("bto,bti->boi", delta.double() / scale, x.double())
    second = s - s.square() / 2
    return (s if hessian == "none" else second).sum(2 - axis), second.abs().sum(2 - axis)


CASES = [
    (out, inside, dtype, axis, hessian, scale)
    for out, inside in ((200, 130), (64, 300))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for axis in (0, 1)
    for hessian, scale in (("none", 1.0), ("fisher", 1024.0))
]


def check(sums, cases=CASES, device="cpu"):
    """Whether `sums` agrees with `exact`: to float32's rounding of what is summed, of Σ |s|."""
    for out, inside, dtype, axis, hessian, scale in cases:
        tensors = make(out, inside, dtype, scale=scale)
        signed, element = sums(*(t.to(device) for t in tensors), axis, hessian, scale)
        plain_signed, plain_element = exact(*tensors, axis, hessian, scale)
        torch.testing.assert_close(element.cpu().double(), plain_element, rtol=1e-5, atol=0)
        assert ((signed.cpu() - plain_signed).abs() <= 1e-5 * plain_element).all(), (out, dtype, axis, hessian)


@pytest.mark.parametrize("tile", [1 << 20, 700, 1])
def test_channel_sums_are_those_of_the_whole_gradient_whatever_the_tile(monkeypatch, tile):
    monkeypatch.setattr(salience, "TILE", tile)
    check(lambda w, d, x, axis, hessian, scale: salience.channel_sums(w, d, x, axis, hessian=hessian, scale=scale))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_gives_the_same_sums():
    """On a GPU as it is; without one in Triton's interpreter, which has to be asked for before Triton is imported."""
    program = (
        "import torch\n"
        "from saap.scoring import salience_triton\n"
        "from tests.saap.scoring.test_salience import CASES, check\n"
        "sums = lambda w, d, x, axis, hessian, scale: "
        "salience_triton.channel_sums(w, d, x, axis, hessian == 'fisher', scale)\n"
        "if torch.cuda.is_available():\n"
        "    check(sums, device='cuda')\n"
        "else:\n"  # the interpreter multiplies no bfloat16
        "    check(sums, [case for case in CASES[:12] if case[2] != torch.bfloat16])\n"
    )
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | interpreted, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_products_are_products_whatever_the_strides_and_dtypes():
    generator = torch.Generator().manual_seed(3)
    a, b, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 3, 17), (30, 17), (30,)))
    expected = (a.double() @ b.double().T + bias.double()).float()
    for left in (a, a.transpose(0, 1).contiguous().transpose(0, 1)):
        for right in (b, b.T.contiguous().T, torch.cat([b, b], 1)[:, :17]):
            torch.testing.assert_close(product(left, right, bias), expected)
    half = product(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected - bias, rtol=0.02, atol=0.05)


def test_linear_layers_by_onednn_have_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(17, 30), torch.nn.SiLU(), torch.nn.Linear(30, 9, bias=False))
    x = torch.randn(2, 5, 17, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    with FastLinears():
        y = layer(x)
        (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(found, expected)
