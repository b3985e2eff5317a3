"""SAAP as a library: structured pruning of large language models, step by step, without Prefect or DuckDB.

    from saap import discover, load, load_tokenizer, score, fuse, fluctuation, weight_norms, asi, select, prune, save

Importing it registers the uneven models with transformers, so `AutoModelForCausalLM.from_pretrained(folder)` works on
our checkpoints.
"""

from saap.corpus import ParquetTexts
from saap.criteria import CRITERIA
from saap.errors import DataUnavailable, SaapError
from saap.evaluation.accuracy import ACCURACY, accuracy
from saap.evaluation.perplexity import Perplexity, perplexity
from saap.evaluation.sizes import size_of
from saap.evaluation.speed import compare_speed
from saap.int4.adapter import PooledAdapter, add_adapters, merge_adapters
from saap.int4.kernels import use_int4_kernels
from saap.int4.quantize import dequantize, quantize, to_groupwise
from saap.models.checkpoint import load, load_tokenizer, save
from saap.models.convert_gguf import convert_gguf
from saap.models.families import family_of
from saap.models.groups import Groups, choose_heads, discover, weight_norms
from saap.models.modeling import GroupwiseLinear, SaapLlamaConfig, SaapLlamaForCausalLM
from saap.pruning.compensation import add_mean_bias
from saap.pruning.least_squares import refit
from saap.pruning.plan import removed_share, select
from saap.pruning.surgery import mask, prune, widths
from saap.recovery.recipes import RECIPES, Groupwise, Lora, Qlora, Recipe
from saap.recovery.recover import recover
from saap.recovery.training import Training
from saap.scoring.fisher import mask_fisher
from saap.scoring.fluctuation import asi, fluctuation
from saap.scoring.fusion import fuse
from saap.scoring.importance import score
from saap.scoring.statistics import input_moments, taylor_sums
from saap.texts import read_rows, sample_tokens

__all__ = [
    "ACCURACY",
    "CRITERIA",
    "RECIPES",
    "DataUnavailable",
    "Groups",
    "Groupwise",
    "GroupwiseLinear",
    "Lora",
    "ParquetTexts",
    "Perplexity",
    "PooledAdapter",
    "Qlora",
    "Recipe",
    "SaapError",
    "SaapLlamaConfig",
    "SaapLlamaForCausalLM",
    "Training",
    "accuracy",
    "add_adapters",
    "add_mean_bias",
    "asi",
    "choose_heads",
    "compare_speed",
    "convert_gguf",
    "dequantize",
    "discover",
    "family_of",
    "fluctuation",
    "fuse",
    "input_moments",
    "load",
    "load_tokenizer",
    "mask",
    "mask_fisher",
    "merge_adapters",
    "perplexity",
    "prune",
    "quantize",
    "read_rows",
    "recover",
    "refit",
    "removed_share",
    "sample_tokens",
    "save",
    "score",
    "select",
    "size_of",
    "taylor_sums",
    "to_groupwise",
    "use_int4_kernels",
    "weight_norms",
    "widths",
]
