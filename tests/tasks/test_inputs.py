import json

import pytest

from saap.scoring.backward import is_offloaded
from tasks.config import Compute
from tasks.inputs import Checkpoint, forget_model, load_model
from tasks.step import Step


@pytest.mark.parametrize(("use", "on_disk"), [("whole", False), ("layers", True), ("slices", False)])
def test_offload_leaves_on_disk_what_a_step_uses_layer_by_layer(tiny_folder, tmp_path, use, on_disk):
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
        return load_model(step, Checkpoint(tiny_folder), use=use)

    try:
        assert not is_offloaded(model(Compute()))
        assert is_offloaded(model(Compute(offload=True))) == on_disk
    finally:
        forget_model()
