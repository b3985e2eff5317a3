import copy
import json
import struct

import numpy as np
import pytest
import torch
from torch import nn

from saap import (
    GroupwiseLinear,
    SaapError,
    dequantize,
    discover,
    load,
    prune,
    quantize,
    save,
    to_groupwise,
    use_int4_kernels,
)
from saap.int4.kernels import Int4Linear
from saap.int4.quantize import pack

IDS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(3))
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def slow_quantize(weight, group_size, levels=15):
    """One group after another; scale and zero are rounded to float16 before the codes are made."""
    out, width = weight.shape
    groups = -(-width // group_size)
    codes = np.zeros((out, width), np.uint8)
    scale, zero = np.zeros((out, groups), np.float16), np.zeros((out, groups), np.float16)
    for o in range(out):
        for g in range(groups):
            part = weight[o, g * group_size : (g + 1) * group_size]
            scale[o, g] = (part.max() - part.min()) / np.float32(levels)
            zero[o, g] = part.min()
            for k, w in enumerate(part):
                a, b = np.float32(scale[o, g]), np.float32(zero[o, g])
                codes[o, g * group_size + k] = 0 if a == 0 else min(max(np.rint((w - b) / a), 0), levels)
    return codes, scale, zero


def slow_weight(codes, scale, zero, group_size):
    group = np.arange(codes.shape[1]) // group_size
    return codes.astype(np.float32) * scale.astype(np.float32)[:, group] + zero.astype(np.float32)[:, group]


def random_weight(width, spread=1.0, offset=0.0, seed=0):
    return np.random.default_rng(seed).normal(offset, spread, (6, width)).astype(np.float32)


CASES = [(64, 32, 1.0, 0.0), (96, 32, 0.02, 0.0), (50, 32, 1.0, 3.0), (33, 32, 1.0, 0.0), (7, 32, 1.0, 0.0),
         (64, 3, 1.0, -2.0), (64, 2, 1e-6, 0.0), (64, 32, 0.01, 500.0)]  # fmt: skip


@pytest.mark.parametrize(("width", "group_size", "spread", "offset"), CASES)
def test_quantize_equals_a_slow_loop_over_the_groups(width, group_size, spread, offset):
    weight = random_weight(width, spread, offset)
    found = quantize(torch.from_numpy(weight), group_size)
    assert [t.dtype for t in found] == [torch.uint8, torch.float16, torch.float16]
    for mine, slow in zip(found, slow_quantize(weight, group_size), strict=True):
        assert np.array_equal(mine.numpy(), slow)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (50, 16), (7, 5)])
def test_every_number_of_bits_is_stored_in_as_many(width, group_size, bits):
    """Codes as of a slow loop; a row of the file is one number in base 2^bits, its lowest byte first."""
    weight = random_weight(width)
    codes, scale, zero = quantize(torch.from_numpy(weight), group_size, bits)
    for mine, slow in zip((codes, scale, zero), slow_quantize(weight, group_size, 2**bits - 1), strict=True):
        assert np.array_equal(mine.numpy(), slow)
    packed = pack(codes, bits)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert bytes(stored) == number.to_bytes(-(-width * bits // 8), "little")
    linear = GroupwiseLinear(width, 6, group_size, bits=bits)
    linear.codes, linear.scale, linear.zero = packed, scale, zero
    assert torch.equal(linear.unpacked(), codes)
    expected = slow_weight(codes.numpy(), scale.numpy(), zero.numpy(), group_size)
    np.testing.assert_allclose(linear.weight().numpy(), expected, rtol=1e-6, atol=1e-6)
    # half precision multiplies with centred codes and pooled inputs: the same but for 8 bits of each weight and input
    x = torch.from_numpy(random_weight(width, seed=3))
    exact = x @ torch.from_numpy(expected).T
    assert (linear(x.bfloat16()).float() - exact).norm() < 2**-6 * (x.norm() * np.linalg.norm(expected)) / 6**0.5


@pytest.mark.parametrize(("width", "group_size", "spread", "offset"), CASES)
def test_the_error_is_half_a_step_and_what_float16_takes_from_scale_and_zero(width, group_size, spread, offset):
    weight = random_weight(width, spread, offset, seed=1)
    codes, scale, zero = (t.numpy() for t in quantize(torch.from_numpy(weight), group_size))
    error = np.abs(slow_weight(codes, scale, zero, group_size) - weight)
    for g in range(scale.shape[1]):
        part = weight[:, g * group_size : (g + 1) * group_size]
        low, step = part.min(1), (part.max(1) - part.min(1)) / 15
        lost = 15 * np.abs(scale[:, g] - step) + np.abs(zero[:, g] - low)
        bound = np.maximum(scale[:, g], step) / 2 + lost + 1e-6 * np.abs(part).max()
        assert (error[:, g * group_size : (g + 1) * group_size] <= bound[:, None]).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
def test_a_constant_group_becomes_its_value_in_float16(value):
    weight = random_weight(64)
    weight[2, 32:] = value
    codes, scale, zero = (t.numpy() for t in quantize(torch.from_numpy(weight), 32))
    assert scale[2, 1] == 0
    assert (slow_weight(codes, scale, zero, 32)[2, 32:] == np.float16(value)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_a_weight_float16_cannot_hold_is_refused(bad):
    weight = random_weight(64)
    weight[1, 5] = bad
    with pytest.raises(SaapError):
        quantize(torch.from_numpy(weight), 32)


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_packed_codes_hold_the_even_input_low_and_unpack_again(width):
    codes = torch.from_numpy(np.random.default_rng(width).integers(0, 16, (5, width), np.uint8))
    packed = pack(codes)
    for row, packed_row in zip(codes.tolist(), packed.tolist(), strict=True):
        pairs = [*row, 0] if width % 2 else row
        assert packed_row == [low + 16 * high for low, high in zip(pairs[::2], pairs[1::2], strict=True)]
    linear = GroupwiseLinear(width, 5, 32)
    linear.codes = packed
    assert torch.equal(linear.unpacked(), codes)


def shape(tiny_llama, name):
    model = tiny_llama(attention_bias=name == "biases", mlp_bias=name == "biases", tie_word_embeddings=name == "tied")
    if name == "pruned":
        model = prune(model, np.arange(len(discover(model))) % 3 != 1)
    return model


@pytest.mark.parametrize("name", ["plain", "pruned", "biases", "tied"])
@pytest.mark.parametrize("group_size", [32, 20])
def test_an_int4_model_computes_with_the_weights_its_codes_stand_for(tiny_llama, name, group_size):
    model = shape(tiny_llama, name)
    small = to_groupwise(model, group_size)
    oracle = copy.deepcopy(model)
    for path, linear in oracle.named_modules():
        if path.endswith(BLOCK_LINEARS):
            weight = slow_weight(*slow_quantize(linear.weight.detach().numpy(), group_size), group_size)
            linear.weight.data = torch.from_numpy(weight)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, oracle(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_int4_copy_shares_nothing_with_its_source(tiny_llama):
    model = tiny_llama(attention_bias=True)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    small = to_groupwise(model, 32)
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    small.generation_config.max_new_tokens = 77
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == []
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == []
    assert float(model.model.rotary_emb.inv_freq.sum()) > 0
    assert model.config.to_dict() == config
    assert model.generation_config.max_new_tokens != 77


@pytest.mark.parametrize("name", ["plain", "pruned", "biases", "tied"])
@pytest.mark.parametrize("group_size", [32, 20])
def test_the_file_holds_four_bits_a_weight_and_thirty_two_a_group(tiny_llama, tmp_path, name, group_size):
    model = shape(tiny_llama, name)
    small = to_groupwise(model, group_size)
    save(small, tmp_path)
    expected = 0
    for path, tensor in model.named_parameters():
        if path.removesuffix(".weight").endswith(BLOCK_LINEARS):
            out, width = tensor.shape
            expected += out * (-(-width // 2)) + out * (-(-width // group_size)) * 4
        else:
            expected += 4 * tensor.numel()
    raw = (tmp_path / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    assert len(raw) - 8 - header == expected
    assert json.loads((tmp_path / "config.json").read_text())["groupwise"] == {"bits": 4, "group_size": group_size}
    state, again = small.state_dict(), load(tmp_path)
    assert all(torch.equal(tensor, state[path]) for path, tensor in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, small(IDS).logits)


@pytest.mark.parametrize("name", ["plain", "biases"])
def test_dequantised_layers_give_identical_logits(tiny_llama, name):
    small = to_groupwise(shape(tiny_llama, name), 32)
    with torch.no_grad():
        expected = small(IDS).logits
        plain = dequantize(small)
        assert not any(isinstance(m, GroupwiseLinear) for m in plain.modules())
        assert torch.equal(plain(IDS).logits, expected)


@pytest.mark.parametrize("groups", [1, 8, 100])
def test_a_number_of_groups_instead_of_their_size_holds_for_every_width(tiny_llama, tmp_path, groups):
    model = shape(tiny_llama, "pruned")
    small = to_groupwise(model, None, groups=groups, bits=3)
    for path, linear in model.named_modules():
        if path.endswith(BLOCK_LINEARS):
            found, width = small.get_submodule(path), linear.in_features
            assert found.group_size == -(-width // groups)
            expected = quantize(linear.weight, -(-width // groups), 3)
            assert torch.equal(found.scale, expected[1])
            assert torch.equal(found.unpacked(), expected[0])
    assert small.config.groupwise == {"bits": 3, "groups": groups}
    save(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(IDS).logits, small(IDS).logits)


@pytest.mark.parametrize("form", [{"bits": 1, "group_size": 32}, {"bits": 4}, {"bits": 4, "groups": 0}, {"bit": 4}])
def test_a_file_that_claims_an_impossible_form_is_refused(tiny_llama, tmp_path, form):
    save(to_groupwise(tiny_llama(), 32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"groupwise": form}))
    with pytest.raises(SaapError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize("group_size", [1, 0, -32])
def test_an_impossible_group_size_is_refused(tiny_llama, group_size):
    with pytest.raises(SaapError, match="group_size"):
        to_groupwise(tiny_llama(), group_size)


def filled(width, out, group_size, bias=False, bits=4):
    linear = GroupwiseLinear(width, out, group_size, bias, bits)
    codes, linear.scale, linear.zero = quantize(torch.randn(out, width) * 0.1, group_size, bits)
    linear.codes = pack(codes, bits)
    if bias:
        nn.init.normal_(linear.bias)
    return linear


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("width", [256, 288])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_int4_kernel_is_within_bfloat16_of_the_exact_path(group_size, bias, width, device):
    torch.manual_seed(0)
    width = width // group_size * group_size
    linear = filled(width, 48, group_size, bias).to(device)
    assert Int4Linear.fits(linear)
    for shape_ in ((5, width), (2, 3, width), (width,)):
        x = torch.randn(shape_, device=device)
        exact = x.double() @ linear.weight(torch.float64).T + (linear.bias.double() if bias else 0)
        y = Int4Linear(linear)(x)
        assert (y.shape, y.dtype) == (exact.shape, x.dtype)
        # x, scale and zero keep 8 bits each
        assert (y - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize(
    ("width", "out", "group_size", "bits"),
    [(250, 48, 32, 4), (256, 40, 32, 4), (240, 48, 16, 4), (96, 48, 64, 4), (256, 48, 32, 8)],
)
def test_layers_the_kernel_cannot_run_are_left_as_they_are(width, out, group_size, bits):
    torch.manual_seed(0)
    model = nn.Sequential(filled(256, 32, 32), filled(width, out, group_size, bits=bits))
    assert use_int4_kernels(model) == 1
    assert [type(m) for m in model] == [Int4Linear, GroupwiseLinear]


@pytest.mark.parametrize("bits", [4, 3])
def test_an_exported_graph_gives_the_same_and_has_only_what_other_runtimes_have(tiny_llama, bits):
    """ONNX and ExecuTorch have neither shifts nor bytes that are read as another dtype."""
    model = to_groupwise(tiny_llama(), 32, bits=bits)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        assert torch.equal(exported.module()(x), layer(x))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "shift" in name or "view.dtype" in name], names
