"""The base model in training: frozen, quantised by bitsandbytes, in the dtype that the hardware computes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from dsc_hub.distill import plugin
from dsc_hub.distill.config import Plan
from dsc_hub.errors import ConfigError, ModelError
from dsc_hub.system import machine


def compute_dtype(on_cpu: bool) -> torch.dtype:
    """Return bf16 if the hardware has it, else fp32: fp16 needs loss scaling, which bf16 adapters do not allow."""
    if on_cpu:
        return getattr(torch, machine.cpu_dtype())
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def load_base(plan: Plan, folder: Path, dtype: torch.dtype, args: TrainingArguments) -> tuple[PreTrainedModel, str]:
    """Return the frozen base on this process's device, and a description of its quantization."""
    options: dict[str, Any] = {}
    if plan.quantization is not None:
        try:
            # FSDP divides only tensors of one dtype, so the 4-bit weights are stored as what the layers compute in.
            stored = {"bnb_4bit_quant_storage": dtype} if plugin.is_divided() else {}
            options["quantization_config"] = BitsAndBytesConfig(
                **{"bnb_4bit_compute_dtype": dtype} | plan.quantization | stored
            )
        except (TypeError, ValueError, AttributeError) as e:
            raise ConfigError(f"distill.quantization: {e}") from None
    # Not "auto": it spreads one copy over all GPUs, in every process. FSDP divides the model after it is loaded.
    device = "cpu" if args.use_cpu else args.local_process_index
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except (OSError, ImportError) as e:
        raise ModelError(f"can't load the model in {folder}: {str(e).splitlines()[0]}") from None
    if plan.quantization is None:
        return model, "none"
    layers = [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    if not layers:
        raise ModelError(
            f"bitsandbytes quantized no layer of the model in {folder}",
            "Set distill.method to 'lora', or choose another base model.",
        )
    for layer in layers:
        # Else, on CPUs with AVX512-BF16, the first validation converts the weights for a kernel without gradients,
        # which bitsandbytes 0.50 then uses in training, too: steps after a validation would be wrong.
        layer.support_avx512bf16_for_cpu = False
    config = options["quantization_config"]
    kind = "int8"
    if not config.load_in_8bit:
        double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
        kind = f"{config.bnb_4bit_quant_type}{double}"
    # Embeddings are not quantised, nor are experts that a model keeps in one tensor: then most of it stays wide.
    quantised = sum(layer.in_features * layer.out_features for layer in layers)
    wide = sum(p.numel() for p in model.parameters() if not isinstance(p, (bnb.nn.Params4bit, bnb.nn.Int8Params)))
    return model, f"{kind}, {len(layers)} layers, {100 * quantised / (quantised + wide):.0f} % of the parameters"


def widen_adapter(model: torch.nn.Module) -> None:
    """Convert the adapter's weights to float32.

    With a quantized base the trainer makes them bfloat16. Processors without bfloat16 instructions multiply these with
    a slow generic routine (it took 60 % of a step's time).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters by name, whole and on the CPU. All processes have to call it together."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
    return {name: p.cpu().contiguous() for name, p in whole.items()}


def set_adapter_weights(model: torch.nn.Module, weight: Callable[[str], torch.Tensor]) -> None:
    """Give each trained parameter the value that `weight` returns for its name; all processes call it together."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            value = weight(name)
            if isinstance(p, DTensor):
                value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            p.data.copy_(value)
