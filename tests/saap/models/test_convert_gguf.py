"""GGUF in: refused where transformers' reader would leave out what the file says."""

import gguf
import numpy as np
import pytest

from saap import SaapError, convert_gguf
from saap.models.convert_gguf import _read_once

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(model, file, scaling=None, more=(), sized=True, fields=None):
    """A model as llama.cpp's `llama` architecture, in float32; more: (name, array) of further tensors."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if sized:
        writer.add_vocab_size(config.vocab_size)
    if fields:
        fields(writer)
    if scaling:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[rest]}"
        else:
            stem = NAMES[stem]
        writer.add_tensor(f"{stem}.{leaf}", tensor.float().numpy())
    for name, array in more:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(file):
    with pytest.raises(SaapError) as caught:
        convert_gguf(file, file.parent / "out")
    assert not (file.parent / "out").exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_biases_that_the_class_of_transformers_has_no_place_for_are_named(tiny_llama, tmp_path):
    write(tiny_llama(attention_bias=True), tmp_path / "biased.gguf")
    message = refused(tmp_path / "biased.gguf")
    for name in ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"):
        assert name in message


def test_scaled_rotary_positions_are_named(tiny_llama, tmp_path):
    write(tiny_llama(), tmp_path / "linear.gguf", gguf.RopeScalingType.LINEAR)
    assert "linear" in refused(tmp_path / "linear.gguf")
    write(tiny_llama(), tmp_path / "llama3.gguf", more=[("rope_freqs.weight", np.ones(8, np.float32))])
    assert "rope_freqs.weight" in refused(tmp_path / "llama3.gguf")


def test_a_vocabulary_is_counted_not_read_and_other_long_arrays_are_left_out(tiny_llama, tmp_path):
    """gguf's own reader, which takes ten seconds for 262,144 tokens, must find the same tensors and fields."""
    words = [f"word{number}é" for number in range(5000)]

    def more(writer):
        writer.add_token_list(words)
        writer.add_token_scores([0.5] * len(words))
        writer.add_token_types([1] * len(words))

    write(tiny_llama(vocab_size=5000), tmp_path / "words.gguf", sized=False, fields=more)
    plain = gguf.GGUFReader(tmp_path / "words.gguf")
    with _read_once(tmp_path / "words.gguf") as reader:
        assert gguf.GGUFReader(tmp_path / "words.gguf") is reader
        assert reader.fields.keys() - plain.fields.keys() == {"llama.vocab_size"}
        assert reader.fields["llama.vocab_size"].contents() == 5000
        for name, field in plain.fields.items():
            if name.startswith("tokenizer.ggml."):
                assert reader.fields[name].data == []
            else:
                assert reader.fields[name].contents() == field.contents()
        for mine, theirs in zip(reader.tensors, plain.tensors, strict=True):
            assert mine.name == theirs.name
            np.testing.assert_array_equal(mine.data, theirs.data)
    assert gguf.GGUFReader is type(plain)
