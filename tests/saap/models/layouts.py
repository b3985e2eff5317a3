"""What goes together in each family, written down a second time, and a dense model without it."""

import copy

import torch


def layers(model):
    return model.transformer.h if "bloom" in model.config.model_type else model.model.layers


def coupled(model, layer):
    """kind → one list per unit of (linear, axis, slice): written down from the papers' and transformers' layouts."""
    if "bloom" in model.config.model_type:
        a, m = layer.self_attention, layer.mlp
        d = model.config.hidden_size // model.config.n_head
        fused = [slice(3 * d * h, 3 * d * (h + 1)) for h in range(a.dense.in_features // d)]
        columns = [slice(d * h, d * (h + 1)) for h in range(len(fused))]
        channels = [slice(j, j + 1) for j in range(m.dense_h_to_4h.out_features)]
        return {
            "attention": [[(a.query_key_value, 0, f), (a.dense, 1, c)] for f, c in zip(fused, columns, strict=True)],
            "mlp": [[(m.dense_h_to_4h, 0, j), (m.dense_4h_to_h, 1, j)] for j in channels],
        }
    if hasattr(layer, "block_type"):  # a hybrid: attention of either kind is left whole
        m = layer.mlp
        rows = [slice(j, j + 1) for j in range(m.down_proj.in_features)]
        return {"mlp": [[(m.gate_proj, 0, j), (m.up_proj, 0, j), (m.down_proj, 1, j)] for j in rows]}
    a, m = layer.self_attn, layer.mlp
    d = a.head_dim
    n_rep, queries = a.num_key_value_groups, a.o_proj.in_features // d
    fused = hasattr(a, "qkv_proj")
    q, k, v = [a.qkv_proj] * 3 if fused else (a.q_proj, a.k_proj, a.v_proj)
    k_from, v_from = (queries * d, (queries + queries // n_rep) * d) if fused else (0, 0)
    alone = getattr(model.config, "heads", "kv") == "query" or (
        model.config.model_type[:5] != "saap_" and queries == n_rep
    )
    attention = []
    if alone:  # k and v stay
        units = [slice(h * d, (h + 1) * d) for h in range(queries)]
        attention = [[(q, 0, unit), (a.o_proj, 1, unit)] for unit in units]
    else:
        for h in range(queries // n_rep):
            query = slice(h * n_rep * d, (h + 1) * n_rep * d)
            key, value = (slice(start + h * d, start + (h + 1) * d) for start in (k_from, v_from))
            attention.append([(q, 0, query), (k, 0, key), (v, 0, value), (a.o_proj, 1, query)])
    width = m.down_proj.in_features
    gate, up, up_from = (
        (m.gate_up_proj, m.gate_up_proj, width) if hasattr(m, "gate_up_proj") else (m.gate_proj, m.up_proj, 0)
    )
    mlp = [
        [(gate, 0, slice(j, j + 1)), (up, 0, slice(up_from + j, up_from + j + 1)), (m.down_proj, 1, slice(j, j + 1))]
        for j in range(width)
    ]
    return {"attention": attention, "mlp": mlp}


def each_group(model):
    for layer, module in enumerate(layers(model)):
        for kind, units in coupled(model, module).items():
            for unit, parts in enumerate(units):
                yield layer, kind, unit, parts


def take(tensor, axis, piece):
    return tensor[piece] if axis == 0 else tensor[:, piece]


def over_some(forward, norm, gone):
    """An RMS norm of the places that are not gone, written down from its definition."""
    here = torch.ones(len(norm.weight))
    for piece in gone:
        here[piece] = 0
    return lambda x: (
        norm.weight
        * x
        * here
        * ((x * here).square().sum(-1, keepdim=True) / here.sum() + norm.variance_epsilon).rsqrt()
    )


@torch.no_grad()
def silenced(model, keep):
    """The dense model, the output columns of its removed groups zeroed.

    OLMo's norms of q and k run over all heads: they are given the heads that stay, and zeros in the places of others.
    """
    model = copy.deepcopy(model)
    gone = {}
    for (*_, parts), kept in zip(list(each_group(model)), keep, strict=True):
        for linear, _, piece in [] if kept else parts:
            gone.setdefault(id(linear), []).append(piece)
    for layer in layers(model) if "olmo" in model.config.model_type else []:
        for norm, linear in (
            (layer.self_attn.q_norm, layer.self_attn.q_proj),
            (layer.self_attn.k_norm, layer.self_attn.k_proj),
        ):
            norm.forward = over_some(norm.forward, norm, gone.get(id(linear), []))
    for (_, _, _, parts), kept in zip(list(each_group(model)), keep, strict=True):
        for linear, axis, piece in parts:
            if axis == 1 and not kept:
                linear.weight[:, piece] = 0
    return model
