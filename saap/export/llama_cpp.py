"""A GGUF file in llama.cpp itself, by the C functions that the wheel `xllamacpp` carries: for checks and timing."""

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from saap.errors import SaapError


class _ModelParams(ctypes.Structure):
    """llama_model_params, as the library fills it in. It is passed by value, and is larger here than in any version."""

    _fields_ = (("rest", c_uint64 * 64),)


class _ContextParams(ctypes.Structure):
    """llama_context_params of the xllamacpp in constraints.txt; what we set has a name."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("_3", c_uint32 * 4),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("_9", c_uint32 * 4),
        ("flash_attn_type", c_int32),
        ("_14", c_uint32 * 12),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_uint64 * 64),
    )

    def is_default(self) -> bool:
        """Whether the fields hold what llama.h says they start with; in another version of the library they do not."""
        sizes = (self.n_ctx, self.n_batch, self.n_ubatch)
        return sizes == (512, 2048, 512) and (self.type_k, self.type_v) == (1, 1)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_Logger = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_silent = _Logger(lambda level, text, data: None)


@lru_cache(maxsize=1)
def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise SaapError("llama.cpp is not installed: pip install -c constraints.txt xllamacpp")
    (file,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    library = ctypes.CDLL(str(file))
    functions: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_ModelParams, []),
        "llama_context_default_params": (_ContextParams, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
        "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
        "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (c_int32, [c_void_p, _Batch]),
        "llama_get_logits": (POINTER(c_float), [c_void_p]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_free": (None, [c_void_p]),
        "llama_model_free": (None, [c_void_p]),
        "llama_log_set": (None, [_Logger, c_void_p]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_silent, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """One model, one sequence, on the CPU; use it in a with statement, or close it.

    context: most tokens of a sequence. exact: attention in float32, not with llama.cpp's usual float16 cache.
    """

    def __init__(self, file: str | Path, *, context: int = 512, threads: int = 1, exact: bool = False) -> None:
        self.library = _library()
        self.context, self.position = context, 0
        self._model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        if not self._model:
            raise SaapError(f"llama.cpp cannot load {file}")
        params = self.library.llama_context_default_params()
        if not params.is_default():
            raise SaapError("this xllamacpp lays its settings out in another way: install the one in constraints.txt")
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.flash_attn_type = params.type_k = params.type_v = 0  # none, and float32
        self._context = self.library.llama_init_from_model(self._model, params)
        if not self._context:
            raise SaapError(f"llama.cpp cannot make a context of {context} tokens for {file}")
        self._vocabulary = self.library.llama_model_get_vocab(self._model)
        self.vocabulary = self.library.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.library.llama_free(self._context)
        self.library.llama_model_free(self._model)

    def clear(self) -> None:
        """Forget the sequence."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self._context), True)
        self.position = 0

    def feed(self, ids: list[int], *, last_only: bool = False) -> np.ndarray:
        """Go on with `ids`; the logits after each of them (or after the last), float32 (len(ids) or 1, vocabulary)."""
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, self.position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = not last_only or place == len(ids) - 1
        failed = self.library.llama_decode(self._context, batch)
        self.library.llama_batch_free(batch)
        if failed:
            raise SaapError(f"llama.cpp failed on {len(ids)} tokens at position {self.position} (code {failed})")
        self.position += len(ids)
        shape = (1 if last_only else len(ids), self.vocabulary)
        return np.ctypeslib.as_array(self.library.llama_get_logits(self._context), shape).copy()

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of a fresh sequence: float32 (len(ids), vocabulary)."""
        self.clear()
        return self.feed(ids)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `ids`, one at a time with a KV cache."""
        self.clear()
        found = [int(self.feed(ids, last_only=True)[0].argmax())]
        while len(found) < count:
            found.append(int(self.feed(found[-1:])[0].argmax()))
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the BOS and EOS that the file asks for."""
        data = text.encode()
        room = (c_int32 * (len(data) + 8))()
        count = self.library.llama_tokenize(self._vocabulary, data, len(data), room, len(room), True, True)
        return list(room[:count])
