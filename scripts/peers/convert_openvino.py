"""Weights of an OpenVINO export in 8 or 4 bits, as ``optimum-cli export openvino --weight-format`` makes them.

``convert_openvino.py FLOAT TARGET BITS``, in OpenVINO's own environment. int4 is the language model's: groups of 128,
asymmetric; its output layer, the embedding and the tower become int8.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from optimum.intel import (  # type: ignore[import-not-found]
    OVModelForVisualCausalLM,
    OVWeightQuantizationConfig,
)

if __name__ == "__main__":
    source, target, bits = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = OVWeightQuantizationConfig(bits=bits)
    OVModelForVisualCausalLM.from_pretrained(source, compile=False, quantization_config=config).save_pretrained(target)
    for path in source.iterdir():  # tokenizers, processor settings, template
        if not (target / path.name).exists() and "_model." not in path.name:
            shutil.copy(path, target)
