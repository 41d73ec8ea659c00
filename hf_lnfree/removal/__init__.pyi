from .arguments import RemovalArguments as RemovalArguments
from .procedure import NormRemoval as NormRemoval
from .procedure import removable as removable
from .results import RemovalSummary as RemovalSummary
from .run import remove_norms as remove_norms
from .schedule import expand as expand
from .schedule import read_schedule as read_schedule
