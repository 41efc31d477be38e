"""Write a copy of a Llama checkpoint with 8-bit weights, as vLLM reads it: rounded to nearest, without calibration.

Usage: llama_int8_checkpoint.py SOURCE_DIR OUT_DIR. Symmetric, one scale for each output channel; activations are to be
quantized at run time, one scale for each token. The embedding and the output layer stay as they are. Needs torch and
safetensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with every matrix of a layer replaced by 8-bit integers and scales."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and tensor.dim() == 2:
            scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
            result[name] = (tensor.float() / scale).round().to(torch.int8)
            result[f"{name}_scale"] = scale
        else:
            result[name] = tensor
    return result


def main() -> None:
    """Convert one directory to another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    arguments = parser.parse_args()
    shutil.copytree(arguments.source_dir, arguments.out_dir, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((arguments.source_dir / "config.json").read_text())
    (arguments.out_dir / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}, indent=2))
    tensors = quantize(load_file(arguments.source_dir / "model.safetensors"))
    save_file(tensors, arguments.out_dir / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
