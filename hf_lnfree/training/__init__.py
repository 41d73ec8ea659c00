"""Data, the trainer, and runs that leave everything they rest on in one folder."""

from .arguments import DataArguments, LNFreeTrainingArguments, ModelArguments
from .data import TextData, load_data
from .recipes import PAPER_MODELS, PAPER_ROWS, paper_config
from .run import train
from .study import Study, run_study
from .study_comparison import compare_studies
from .study_report import write_study_report
from .trainer import LNFreeTrainer
from .windows import TokenWindows

__all__ = [
    "PAPER_MODELS",
    "PAPER_ROWS",
    "DataArguments",
    "LNFreeTrainer",
    "LNFreeTrainingArguments",
    "ModelArguments",
    "Study",
    "TextData",
    "TokenWindows",
    "compare_studies",
    "load_data",
    "paper_config",
    "run_study",
    "train",
    "write_study_report",
]
