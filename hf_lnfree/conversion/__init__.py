"""Models people have into ours and back, exactly."""

from .checkpoint import Checkpoint
from .convert import convert
from .folding import Folding, fold
from .lens import to_transformer_lens
from .onnx import export_onnx
from .ours_to_stock import to_stock
from .stock_to_ours import convert_checkpoint, load, ours

__all__ = [
    "Checkpoint",
    "Folding",
    "convert",
    "convert_checkpoint",
    "export_onnx",
    "fold",
    "load",
    "ours",
    "to_stock",
    "to_transformer_lens",
]
