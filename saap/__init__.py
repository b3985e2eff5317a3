"""SAAP as a library: structured pruning of large language models, step by step, without Prefect or DuckDB.

    from saap import discover, load, load_tokenizer, score, fuse, fluctuation, weight_norms, asi, select, prune, save

Importing it registers the uneven models with transformers, so `AutoModelForCausalLM.from_pretrained(folder)` works on
our checkpoints. What a name stands for is imported when the name is first used.
"""

# ruff: noqa: F401  (imported for mypy and editors)
from importlib import import_module
from typing import TYPE_CHECKING

from saap.models.registration import register_types

if TYPE_CHECKING:
    from saap.corpus import ParquetTexts
    from saap.criteria import CRITERIA
    from saap.errors import DataUnavailable, OutOfReach, SaapError
    from saap.evaluation.accuracy import ACCURACY, accuracy
    from saap.evaluation.decode_time import DecodeTime, narrowed
    from saap.evaluation.footprint import Footprint
    from saap.evaluation.perplexity import Perplexity, perplexity
    from saap.evaluation.sizes import size_of
    from saap.evaluation.speed import compare_speed
    from saap.int4.adapter import PooledAdapter, add_adapters, merge_adapters
    from saap.int4.error_feedback import quantize_with_feedback
    from saap.int4.kernels import use_int4_kernels
    from saap.int4.quantize import dequantize, quantize, to_groupwise
    from saap.models.checkpoint import load, save
    from saap.models.convert_gguf import convert_gguf
    from saap.models.families import family_of
    from saap.models.groups import Groups, choose_heads, discover, weight_norms
    from saap.models.modeling import SaapLlamaConfig, SaapLlamaForCausalLM
    from saap.models.modeling_groupwise import GroupwiseLinear
    from saap.models.tokenizer import load_tokenizer
    from saap.pruning.compensation import add_mean_bias
    from saap.pruning.least_squares import refit
    from saap.pruning.plan import removed_share, select
    from saap.pruning.surgery import mask, prune, widths
    from saap.pruning.target import select_for
    from saap.recovery.recipes import RECIPES, Groupwise, Lora, Qlora, Recipe
    from saap.recovery.recover import recover
    from saap.recovery.training import Training
    from saap.scoring.fisher import mask_fisher
    from saap.scoring.fluctuation import asi, fluctuation
    from saap.scoring.fusion import fuse
    from saap.scoring.importance import score
    from saap.scoring.own_text import own_text
    from saap.scoring.statistics import input_moments, taylor_sums
    from saap.texts import calibration_bos, read_rows, sample_tokens

_NAMES = {
    "saap.corpus": "ParquetTexts",
    "saap.criteria": "CRITERIA",
    "saap.errors": "DataUnavailable OutOfReach SaapError",
    "saap.evaluation.accuracy": "ACCURACY accuracy",
    "saap.evaluation.decode_time": "DecodeTime narrowed",
    "saap.evaluation.footprint": "Footprint",
    "saap.evaluation.perplexity": "Perplexity perplexity",
    "saap.evaluation.sizes": "size_of",
    "saap.evaluation.speed": "compare_speed",
    "saap.int4.adapter": "PooledAdapter add_adapters merge_adapters",
    "saap.int4.error_feedback": "quantize_with_feedback",
    "saap.int4.kernels": "use_int4_kernels",
    "saap.int4.quantize": "dequantize quantize to_groupwise",
    "saap.models.checkpoint": "load save",
    "saap.models.convert_gguf": "convert_gguf",
    "saap.models.families": "family_of",
    "saap.models.groups": "Groups choose_heads discover weight_norms",
    "saap.models.modeling": "SaapLlamaConfig SaapLlamaForCausalLM",
    "saap.models.modeling_groupwise": "GroupwiseLinear",
    "saap.models.tokenizer": "load_tokenizer",
    "saap.pruning.compensation": "add_mean_bias",
    "saap.pruning.least_squares": "refit",
    "saap.pruning.plan": "removed_share select",
    "saap.pruning.surgery": "mask prune widths",
    "saap.pruning.target": "select_for",
    "saap.recovery.recipes": "RECIPES Groupwise Lora Qlora Recipe",
    "saap.recovery.recover": "recover",
    "saap.recovery.training": "Training",
    "saap.scoring.fisher": "mask_fisher",
    "saap.scoring.fluctuation": "asi fluctuation",
    "saap.scoring.fusion": "fuse",
    "saap.scoring.importance": "score",
    "saap.scoring.own_text": "own_text",
    "saap.scoring.statistics": "input_moments taylor_sums",
    "saap.texts": "calibration_bos read_rows sample_tokens",
}
_PLACES = {name: place for place, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_PLACES)

if not TYPE_CHECKING:  # or mypy would take any name

    def __getattr__(name: str) -> object:
        if name not in _PLACES:
            raise AttributeError(f"module 'saap' has no attribute '{name}'")
        found = globals()[name] = getattr(import_module(_PLACES[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


register_types()
