from .harness import run_harness as run_harness
from .harness import tasks_path as tasks_path
from .run import evaluate as evaluate
