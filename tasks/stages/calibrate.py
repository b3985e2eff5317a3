"""Draw the calibration sequences."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from storage.keys import digest
from storage.tables import read_table, write_table
from tasks.artifact import Artifact, Source
from tasks.config import RunConfig
from tasks.data import calibration_texts
from tasks.inputs import Data, Tokenizer, calibration_bos, load_tokenizer
from tasks.outside import Outside
from tasks.stage import Summary, stage
from tasks.step import Step

if TYPE_CHECKING:
    import torch


class Calibration(Artifact):
    """calibration.parquet."""

    def read(self) -> "torch.Tensor":
        """The sequences, int64 (samples, length)."""
        import torch

        table = read_table(self.place, "calibration")
        samples = int(table["sample"][-1]) + 1
        return torch.from_numpy(table["token"].astype("int64")).view(samples, -1)


def write_calibration(folder: Path, tokens: np.ndarray, rows: np.ndarray) -> None:
    """calibration.parquet of sequences (samples, length) and the row each begins in, -1 where it is of none."""
    count, length = tokens.shape
    write_table(
        folder,
        "calibration",
        {
            "sample": np.repeat(np.arange(count), length),
            "position": np.tile(np.arange(length), count),
            "token": tokens.flatten(),
            "source_row": np.repeat(rows, length),
        },
    )


def _fingerprint(outside: Outside, inputs: Mapping[str, Source]) -> str:
    """LLaMA's text begins without BOS, that of other models as their tokenizer has it."""
    begins = [] if outside.model.model_type == "llama" else ["its tokenizer's BOS"]
    return digest([outside.model.tokenizer, outside.data("calibration"), *begins])


def _params(config: RunConfig) -> dict[str, int]:
    return config.calibrate.model_dump(exclude={"own"})


@stage(version=1, publishes=Calibration, params=_params, fingerprint=_fingerprint)
def calibrate(step: Step, folder: Path, *, tokenizer: Tokenizer, data: Data) -> Summary:
    from saap import sample_tokens

    texts = calibration_texts(data.name)
    tokens, rows = sample_tokens(texts, load_tokenizer(step), **step.config(), bos=calibration_bos(step))
    write_calibration(folder, tokens.numpy(), rows)
    return {"samples": len(tokens), "tokens": tokens.numel()}
