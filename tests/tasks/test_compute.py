import json

import pytest

from saap.scoring.backward import is_offloaded
from tasks.compute import checkpoint, forget
from tasks.config import Compute
from tasks.step import Step


@pytest.mark.parametrize(("use", "on_disk"), [("whole", False), ("blocks", True), ("slices", False)])
def test_offload_leaves_on_disk_what_a_step_uses_block_by_block(tiny_folder, tmp_path, use, on_disk):
    def model(compute):
        step = Step(
            stage="score",
            key="key",
            params=json.dumps({"dtype": "float32"}),
            inputs=(),
            outside=(("model", str(tiny_folder)), ("tokenizer", str(tiny_folder))),
            compute=compute.model_dump_json(),
            store=str(tmp_path),
        )
        return checkpoint(step, "model", use=use)[0]

    try:
        assert not is_offloaded(model(Compute()))
        assert is_offloaded(model(Compute(offload=True))) == on_disk
    finally:
        forget()
