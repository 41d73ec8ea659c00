from .arguments import LNFreeTrainingArguments as LNFreeTrainingArguments
from .arguments import ModelArguments as ModelArguments
from .recipes import PAPER_MODELS as PAPER_MODELS
from .recipes import PAPER_ROWS as PAPER_ROWS
from .recipes import paper_config as paper_config
from .results import RunResults as RunResults
from .run import train as train
from .trainer import LNFreeTrainer as LNFreeTrainer
