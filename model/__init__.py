"""DeepSeek-V3.2 on bound ops: loading, prefill, decode, generation. Names no backend."""

from dsa_hal.model.config import ModelConfig
from dsa_hal.model.generate import generate
from dsa_hal.model.precision import Precision
from dsa_hal.model.transformer import Transformer

__all__ = ["ModelConfig", "Precision", "Transformer", "generate"]
