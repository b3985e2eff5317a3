import pytest
import torch

from saap import GroupwiseLinear, PooledAdapter, add_adapters, merge_adapters, quantize, to_groupwise
from saap.int4.quantize import pack

IDS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(4))


def adapted(width, out, group_size, rank=4, alpha=6.0):
    torch.manual_seed(0)
    base = GroupwiseLinear(width, out, group_size)
    codes, base.scale, base.zero = quantize(torch.randn(out, width), group_size)
    base.codes = pack(codes)
    adapter = PooledAdapter(base, rank, alpha)
    torch.nn.init.normal_(adapter.b)
    return adapter


def dense_weight(adapter):
    """Ŵ + s·B·A, each column of B·A repeated over its group of inputs."""
    base, update = adapter.base, adapter.b @ adapter.a
    columns = [update[:, i // base.group_size] for i in range(base.in_features)]
    return base.weight() + 6.0 / 4 * torch.stack(columns, 1)


SHAPES = [(64, 24, 32), (50, 24, 32), (33, 10, 32), (20, 10, 32)]


@pytest.mark.parametrize(("width", "out", "group_size"), SHAPES)
def test_the_adapter_adds_an_update_constant_on_each_group_of_inputs(width, out, group_size):
    adapter, x = adapted(width, out, group_size), torch.randn(3, 5, width)
    torch.testing.assert_close(adapter(x), x @ dense_weight(adapter).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("width", "out", "group_size"), SHAPES)
def test_gradients_equal_autograd_through_the_explicit_dense_weight(width, out, group_size):
    adapter, x = adapted(width, out, group_size), torch.randn(3, width, requires_grad=True)
    pull = torch.randn(3, out)
    wanted = [adapter.a, adapter.b, x]
    mine = torch.autograd.grad((adapter(x).tanh() * pull).sum(), wanted)
    plain = torch.autograd.grad(((x @ dense_weight(adapter).T).tanh() * pull).sum(), wanted)
    for found, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(params=[32, 20], ids=["even groups", "ragged groups"])
def trained(request, tiny_llama):
    """An int4 model with adapters that are no longer zero, and its parameters to train."""
    model = to_groupwise(tiny_llama(attention_bias=True), request.param)
    parameters = add_adapters(model, rank=4, alpha=8.0)
    torch.manual_seed(1)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)
    return model, parameters


def test_an_adapter_changes_nothing_before_training(tiny_llama):
    model = to_groupwise(tiny_llama(), 32)
    with torch.no_grad():
        before = model(IDS).logits
        add_adapters(model, rank=4, alpha=8.0)
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 2e-2)], ids=str)
def test_the_merged_model_gives_the_logits_of_the_unmerged(trained, dtype, bound):
    """float16 zeros keep 11 bits of a weight's offset; the logits here are of the order of one."""
    model, _ = trained
    with torch.no_grad():
        unmerged = model(IDS).logits
        bare = merge_adapters(model, dtype)(IDS).logits
        assert (bare - unmerged).abs().max() < bound
        for module in model.modules():
            assert not isinstance(module, PooledAdapter)
            if isinstance(module, GroupwiseLinear):
                assert module.zero.dtype == dtype


def test_merging_moves_the_logits_by_what_was_learned(trained):
    model, parameters = trained
    with torch.no_grad():
        merged = merge_adapters(model, torch.float32)(IDS).logits
        for parameter in parameters:
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, GroupwiseLinear):
                module.zero.zero_()
        assert (merged - model(IDS).logits).abs().max() > 0.1


def test_gradients_reach_the_adapters_and_nothing_else(trained):
    model, parameters = trained
    model(IDS, labels=IDS).loss.backward()
    trained_ids = {id(p) for p in parameters}
    assert len(trained_ids) == 2 * 7 * 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained_ids)


def test_the_product_is_made_outside_of_autocast(monkeypatch):
    """On a GPU autocast gives sums back in float32, which the product with bfloat16 then refuses."""
    adapter, seen = adapted(64, 16, 32), []
    pool = adapter.base.pool
    monkeypatch.setattr(adapter.base, "pool", lambda x: seen.append(torch.is_autocast_enabled("cpu")) or pool(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(torch.ones(2, 64))
    assert seen == [False]
    assert y.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_adapter_trains_under_autocast_on_a_gpu():
    adapter = adapted(64, 16, 32).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y = adapter(torch.ones(2, 64, device="cuda"))
    y.float().sum().backward()
    assert torch.isfinite(adapter.b.grad).all()
