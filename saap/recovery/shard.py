"""Training by several processes (FSDP): each holds its part of the frozen weights of every layer."""

import copy
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from saap.errors import SaapError
from saap.models.families import family_of
from saap.models.modeling_groupwise import GroupwiseLinear


def claimed() -> bool:
    """Whether `accelerate launch --use_fsdp` has started this process beside others.

    It also removes the launcher's variable from the environment. Otherwise accelerate and transformers would shard too:
    what learns as well, but never the codes, and on GPUs only.
    """
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and int(os.environ.get("WORLD_SIZE", "1")) > 1


def skeleton(model: Any) -> Any:
    """A copy without values, but for the buffers that no checkpoint holds: what `gather` fills again."""
    held: dict[int, Any] = {id(b): b.to("meta") for b in model.state_dict(keep_vars=True).values()}
    for parameter in model.parameters():
        held[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, held)


def shard(model: Any, device: torch.device) -> None:
    """Leave this process its part of the frozen weights of the layers, on its device, in place.

    torch's fully_shard puts a layer together when it runs, forward and backward. What learns, and what is outside the
    layers, stays whole on every process. The model may come from the CPU, and need not fit the device; every process
    calls this with the same one. Raises SaapError for NF4 weights.
    """
    if any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
        raise SaapError("NF4 weights cannot be shared out: use --multi_gpu, or the recipe groupwise or lora")
    learning = {p for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        if isinstance(module, GroupwiseLinear):  # fully_shard shares out parameters only
            for name in list(module._buffers):
                tensor: Any = module._buffers.pop(name)
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in family_of(model.config).layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=learning)
    model.to(device)


def average_only_what_learns(student: nn.Module) -> None:
    """Make DistributedDataParallel ignore the frozen weights, because each process holds another part of them."""
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, frozen)


def gather(model: Any, empty: Any) -> None:
    """Put a sharded model's weights into its skeleton, on the CPU of the first process. All processes call this."""
    first, state = torch.distributed.get_rank() == 0, {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            state[name] = whole.detach().cpu()
    if first:
        empty.load_state_dict(state, assign=True)
        empty.tie_weights()
